"""torch.compile for training: whether it pays off, and compiling before the first step.

The model is compiled part by part (`GPT.compile`). All blocks share one graph, in training and
evaluation, so compile time does not grow with depth. Compiled kernels are cached in the project
folder (CACHE), so they outlive a stopped instance; processes and versions of the code may share it.
"""

import contextlib
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from lib.background import every
from lib.checkpoint import is_memory
from lib.cli import RankError, note
from lib.devices import autocast, is_sharded, peak_flops
from lib.kernels import compiler_problem

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "torchinductor"
HEARTBEAT = 15  # seconds between progress lines

# Measured in benchmarks/cold_start_h200_202611.md, for 16M to 124M parameters on an H200
MFU_EAGER = 0.11
MFU_COMPILED = 0.40
SECONDS = 25  # to compile without a cache, including imports


def worth_compiling(flops: float, device: torch.device, dtype: str = "auto") -> bool:
    """Whether compiling saves more time in a run of `flops` FLOPs on one device than it takes.

    dtype: a choice of --dtype. Only on CUDA; True if the device's speed is unknown.
    """
    if device.type != "cuda":
        return False
    peak = peak_flops(device, dtype)
    if peak is None:
        return True
    saved = flops / peak * (1 / MFU_EAGER - 1 / MFU_COMPILED)
    return saved > SECONDS


def can_decode(device: torch.device) -> bool:
    """Whether to compile decoding, if --compile asks for it: on CUDA. Notes a missing compiler."""
    if device.type != "cuda":
        return False
    problem = compiler_problem(device)
    if problem:
        note(f"warning: generating without torch.compile, slower: {problem}")
    return problem is None


def off() -> AbstractContextManager:
    """Context that runs compiled parts as plain PyTorch, for shapes that vary between calls."""
    return torch.compiler.set_stance("force_eager")


def prepare() -> None:
    """Start slow imports and worker processes of the compiler in the background."""
    # torch sets the variable to its default when a part of inductor is imported
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder in (None, default_cache_dir()) and _is_writable(CACHE):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE)
    gc.disable()  # until compile_ahead is done, see lib/startup.py
    threading.Thread(target=_import, name="import inductor", daemon=True).start()


def _import() -> None:
    with contextlib.suppress(Exception):  # compiling raises it again, unless the process is ending
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.warm_pool()  # else this process compiles the first kernels one by one
        import torch._inductor.compile_fx  # noqa: F401


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def compile_ahead(model: torch.nn.Module, batches: list[tuple], evaluating: bool,
                  say: Callable[[str], Any]) -> None:
    """Compile `model` by running a training pass over a micro-batch of each size.

    batches: of each size (idx, targets), int64 (B, T) each, and a Packed if rows contain several
    texts. evaluating: compile the evaluation loss for the first size, too. say: called with lines
    to print. If compiling fails with a cache, warns and tries again without it. If it fails without
    one, or is known to fail, warns and leaves the model as plain PyTorch. A sharded model cannot be
    used after a failed pass, in which its processes exchange weights: then raises RankError.
    """
    problem = compiler_problem(batches[0][0].device)
    if problem is None:
        problem = _compile(model, batches, evaluating, say)
    if problem:
        say(f"warning: training without torch.compile, slower: {problem}")
    gc.freeze()  # later collections skip the objects that exist now
    gc.enable()


def _compile(model, batches, evaluating, say):
    """Compile the model -> why it failed, or None."""
    from torch._dynamo.utils import counters

    started = time.perf_counter()
    say("compiling the model, part by part, for training and evaluation")
    model.compile(dynamic=False)

    def progress():
        say(f"compiling, {time.perf_counter() - started:.0f} s so far")

    with every(HEARTBEAT, progress):
        reason = _failure(model, batches, evaluating)
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        if reason and is_sharded(model):
            raise RankError(f"torch.compile failed ({reason[:200]}): delete its cache, {cache}, "
                            "or give --no-compile")
        if reason and _holds_kernels(cache):
            say(f"warning: compiling failed with the cache in {cache} ({reason[:100]}): "
                "trying without it")
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor_")
            torch.compiler.reset()
            reason = _failure(model, batches, evaluating)
    if reason:
        torch.compiler.set_stance("force_eager")  # for the rest of this process
        model.zero_grad(set_to_none=True)
        model.train()
        return reason
    graphs = counters["stats"]["unique_graphs"]
    cached = counters["aot_autograd"]["autograd_cache_hit"]
    seconds = time.perf_counter() - started
    say(f"compiled {graphs} graphs, {cached} of them from the cache, in {seconds:.1f} s")
    return None


def _failure(model, batches, evaluating):
    """Run the training passes -> the first line of its error, or None. Raises if memory runs out.

    Missing compilers, headers and old GPUs raise errors of many types, not all of them torch's.
    """
    try:
        _run(model, batches, evaluating)
    except Exception as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or is_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None


def _holds_kernels(cache: str | None) -> bool:
    return cache is not None and any(Path(cache).glob("fxgraph/*"))


def _run(model, batches: list[tuple], evaluating: bool) -> None:
    with autocast(model):
        for batch in batches:
            model(*batch).backward()
            model.zero_grad(set_to_none=True)
        if evaluating:
            model.eval()
            model(*batches[0])
            model.train()
