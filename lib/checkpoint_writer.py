"""Write checkpoints in the background while training continues, and delete old ones."""

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lib import checkpoint
from lib.cli import EXHAUSTED, BadInput
from lib.devices import is_shard
from lib.files import check_room


class CheckpointWriter:
    """Writes checkpoints to `folder` in a thread, one at a time; keeps the newest `keep` (0: all).

    Beside the checkpoint of a run's end, and of the best one so far, it writes a weights_<step>.pt,
    which is deleted with it.

    `start` returns at once: the thread copies the tensors to the host on a CUDA stream of its own,
    while the next forward and backward passes only read them. Call `wait_copied` before changing
    them.
    """

    def __init__(self, folder: str | Path, keep: int):
        self.folder = Path(folder)
        self.keep = keep
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.future: Future[tuple[str, str]] | None = None
        self.stall = 0.0  # seconds that training waited for the latest checkpoint
        self.copied = threading.Event()
        self.copied.set()
        # Host tensors by (shape, dtype), reused for every checkpoint: pinning a gigabyte stalls
        # the GPU for a second.
        self.pool: dict[tuple, list[torch.Tensor]] = {}
        self.gathered = False  # states are gathered from shards into tensors of their own

    def reserve(self, like: Iterable[torch.Tensor]) -> None:
        """Prepare for states of tensors like these: allocate pinned memory for those on a GPU, in
        the background, unless they are shards, as lib/parallel.py gathers copies of these."""
        like = list(like)
        self.gathered = any(map(is_shard, like))
        on_gpu = [tensor for tensor in like if tensor.is_cuda and not self.gathered]

        def allocate():
            for tensor in on_gpu:
                self._allocate(tensor)

        self.executor.submit(allocate)

    def start(self, step: int, state: dict[str, Any], before: Callable[[], Any] = lambda: None,
              former_best: int | None = None) -> None:
        """Start writing ckpt_<step>.pt. `collect` the previous checkpoint first.

        before: called right before writing; if it fails, so does the checkpoint. former_best: step
        of the best checkpoint so far, which is not deleted to make room for this one.
        """
        started = time.perf_counter()
        assert self.future is None, "collect the previous checkpoint first"
        self.copied.clear()
        ready = None
        device = next((t.device for t in checkpoint.tensors(state) if t.is_cuda), None)
        if device:
            ready = (device, torch.cuda.current_stream(device).record_event())
        copy = partial(self._to_host, state, ready)
        self.future = self.executor.submit(self._write, step, copy, before, former_best)
        self.stall = time.perf_counter() - started

    def add_weights(self, step: int, best: Any) -> None:
        """Begin to write weights_<step>.pt from ckpt_<step>.pt, which is written already and turned
        out to be the best. `collect` the previous file first.

        best: its [validation loss, step].
        """
        assert self.future is None, "collect the previous checkpoint first"
        self.stall = 0.0
        self.future = self.executor.submit(self._add_weights, step, best)

    def wait_copied(self) -> None:
        """Wait until the tensors passed to `start` may change."""
        started = time.perf_counter()
        self.copied.wait()
        self.stall += time.perf_counter() - started

    @property
    def is_busy(self) -> bool:
        """Whether a file was started and has not been collected."""
        return self.future is not None

    def collect(self, wait: bool = False) -> str | None:
        """A line about the file in progress once it is written; None before that, or without one.

        Raises BadInput if it cannot be written.
        """
        future = self.future
        if future is None or not (wait or future.done()):
            return None
        self.future = None
        started = time.perf_counter()
        error = future.exception()  # waits for it
        self.stall += time.perf_counter() - started
        if isinstance(error, OSError):  # the folder was removed or is read-only
            remedy = EXHAUSTED.get(error.errno or 0, "check the folder")
            raise BadInput(f"cannot save a checkpoint in {self.folder} ({error.strerror}): "
                           f"{remedy}") from error
        saved, about_weights = future.result()
        return f"{saved}; training waited {self.stall * 1e3:.0f} ms{about_weights}"

    def _write(self, step: int, copy: Callable[[], dict], before: Callable[[], Any],
               former_best: int | None) -> tuple[str, str]:
        """-> (a line about the checkpoint, its end about the weights, "" without any)."""
        started = time.perf_counter()
        path = checkpoint.path_of(self.folder, step)
        try:
            state = copy()
        except Exception as error:
            raise BadInput(f"cannot save {path}: no memory for a copy "
                           f"({type(error).__name__}: {str(error)[:80]})") from error
        finally:
            self.copied.set()
        size = checkpoint.n_bytes(state)
        self._make_room(size, former_best)
        before()
        best = state.get("best")
        best_step = best[1] if best else None
        about_weights = ""
        if state.get("finished") or best_step == step:
            # before the checkpoint: a finished run has both, whenever it is killed
            about_weights = self._write_weights(step, state, size)
        try:
            checkpoint.write(path, state)
        except BadInput:
            checkpoint.path_of(self.folder, step, "weights").unlink(missing_ok=True)
            raise
        self._delete_old(best_step)
        saved = f"saved {path}, {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s"
        return saved, about_weights

    def _add_weights(self, step: int, best: Any) -> tuple[str, str]:
        """-> a line in two parts, as `_write` returns them."""
        path = checkpoint.path_of(self.folder, step)
        try:
            state = checkpoint.read(path)
        except BadInput as error:
            return f"no weights of {path} ({error})", ""
        return f"{path} is the best", self._write_weights(step, state | {"best": best}, 0)

    def _write_weights(self, step: int, state: dict, size: int) -> str:
        """Write weights_<step>.pt -> the end of a line about it.

        size: bytes that the checkpoint needs. An error is only reported, as the checkpoint matters
        more.
        """
        path = checkpoint.path_of(self.folder, step, "weights")
        try:
            weights = checkpoint.weights_of(state)
            needed = size + checkpoint.n_bytes(weights)
            check_room(self.folder, needed, "with the checkpoint it", "free some disk space")
            checkpoint.write(path, weights)
        except (BadInput, OSError, RuntimeError, MemoryError) as error:
            reason = str(error) or type(error).__name__
            return f"; no {path.name} ({reason.splitlines()[0]})"
        return f"; also {path.name}, without the optimizer"

    def _make_room(self, size: int, best: int | None) -> None:
        """Delete checkpoints, oldest first, until `size` bytes are free; keep the newest and the
        one of step `best`."""
        if not self.keep:
            return
        for path in reversed(self._newest_first(best)[1:]):
            if shutil.disk_usage(self.folder).free < size:
                self._delete(path)

    def _delete_old(self, best: int | None) -> None:
        """Delete all but the newest `keep` checkpoints and the one of step `best`."""
        if not self.keep:
            return
        for path in self._newest_first(best)[self.keep:]:
            self._delete(path)

    def _delete(self, path: Path) -> None:
        """Delete a checkpoint and its weights_<step>.pt."""
        path.unlink(missing_ok=True)
        weights = path.with_name(f"weights_{path.name.removeprefix('ckpt_')}")
        weights.unlink(missing_ok=True)

    def _newest_first(self, best: int | None) -> list[Path]:
        """The checkpoints except the one of step `best`."""
        return [path for step, path in checkpoint.found(self.folder) if step != best]

    def _to_host(self, state: dict, ready: tuple | None) -> Any:
        """A copy of `state` on the CPU. ready: (device, event to wait for) on a GPU, else None."""
        if self.gathered:
            return state
        spare = {key: list(buffers) for key, buffers in self.pool.items()}
        copies: dict[tuple, torch.Tensor] = {}

        def copy(tensor):
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if key not in copies:  # tied weights stay one tensor
                buffers = spare.get((tensor.shape, tensor.dtype)) or [self._allocate(tensor)]
                copies[key] = buffers.pop().copy_(tensor, non_blocking=True)
            return copies[key]

        if ready is None:
            return checkpoint.map_tensors(copy, state)
        device, event = ready
        stream = torch.cuda.Stream(device)
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            state = checkpoint.map_tensors(copy, state)
        stream.synchronize()
        return state

    def _allocate(self, tensor: torch.Tensor) -> torch.Tensor:
        shape, dtype = tensor.shape, tensor.dtype
        try:
            buffer = torch.empty(shape, dtype=dtype, pin_memory=tensor.is_cuda)
        except RuntimeError:  # pinned memory may be limited; unpinned memory is slower to copy to
            buffer = torch.empty(shape, dtype=dtype)
        self.pool.setdefault((shape, dtype), []).append(buffer)
        return buffer
