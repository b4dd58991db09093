"""torch.compile for training: whether it pays, ahead of the first step, with results kept on disk.

A model compiles part by part (`GPT.compile`): all blocks share one graph, which training and
evaluation share too, so the time does not grow with depth. What is compiled is kept in CACHE, in
the project, where it outlives a stopped instance; processes and versions of the code may share it.
"""

import contextlib
import gc
import os
import tempfile
import threading
import time
from pathlib import Path

import torch

from lib.devices import autocast, peak_flops

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "torchinductor"
HEARTBEAT = 15  # seconds between signs of life

# From benchmarks/cold_start_h200_202611.md, for models of 16M to 124M parameters on an H200
MFU_EAGER, MFU_COMPILED = 0.11, 0.40
SECONDS = 25  # that compiling takes, imports included, where nothing is cached


def worth_compiling(flops, device):
    """Whether a run of `flops` FLOPs on one device saves more time by compiling than that takes.

    On cuda alone. Where the device's speed is unknown: yes.
    """
    if device.type != "cuda":
        return False
    peak = peak_flops(device)
    if peak is None:
        return True
    saved = flops / peak * (1 / MFU_EAGER - 1 / MFU_COMPILED)
    return saved > SECONDS


def off():
    """Context in which compiled parts run as plain PyTorch, for shapes that vary between calls."""
    return torch.compiler.set_stance("force_eager")


def prepare():
    """Begin, in the background, what compiling needs first: imports of seconds, worker processes.
    """
    # torch itself sets the variable to its default, once a part of inductor is imported
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder in (None, default_cache_dir()) and _writable(CACHE):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE)
    gc.disable()  # see lib/startup.py; until compile_ahead is done
    threading.Thread(target=_import, name="import inductor", daemon=True).start()


def _import():
    with contextlib.suppress(Exception):  # compiling meets it again, unless the process is ending
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.warm_pool()  # else the first kernels are compiled one by one in this process
        import torch._inductor.compile_fx  # noqa: F401


def _writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def compile_ahead(model, batch, evaluating, say):
    """Compile `model` for training on micro-batches like `batch`, by a pass over it.

    batch: (idx, targets), int64 (B, T) each, and a Packed where rows hold several texts.
    evaluating: compile the evaluation's loss, too. say: called with lines for the user.
    A damaged cache costs a warning and a second attempt without it.
    """
    from torch._dynamo.utils import counters

    started = time.perf_counter()
    say("compiling the model, part by part, for training and evaluation")
    model.compile(dynamic=False)
    with _alive(say, started):
        try:
            _pass(model, batch, evaluating)
        except RuntimeError as error:
            cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
            if isinstance(error, torch.cuda.OutOfMemoryError) or not _holds_kernels(cache):
                raise
            say(f"warning: compiling failed with what {cache} holds "
                f"({str(error).splitlines()[0][:100]}): trying without it")
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor_")
            torch.compiler.reset()
            _pass(model, batch, evaluating)
    gc.freeze()  # what is there by now stays: later collections need not look at it
    gc.enable()
    graphs = counters["stats"]["unique_graphs"]
    cached = counters["aot_autograd"]["autograd_cache_hit"]
    seconds = time.perf_counter() - started
    say(f"compiled {graphs} graphs, {cached} of them from the cache, in {seconds:.1f} s")


def _holds_kernels(cache):
    return cache is not None and any(Path(cache).glob("fxgraph/*"))


def _pass(model, batch, evaluating):
    with autocast(batch[0].device):
        model(*batch).backward()
        model.zero_grad(set_to_none=True)
        if evaluating:
            model.eval()
            model(*batch)
            model.train()


@contextlib.contextmanager
def _alive(say, started):
    """Show every HEARTBEAT seconds that the block is still at work."""
    done = threading.Event()

    def beat():
        while not done.wait(HEARTBEAT):
            say(f"compiling, {time.perf_counter() - started:.0f} s so far")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
