"""What lets a run be interrupted: checkpoints that are whole or not there, stop signals, a log that can be rewound.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, ckpt_<step>.pt, as torch.save writes it: a zip archive
whose every record carries a CRC-32. torch.load does not look at these; `read` does. It is written under a temporary
name, flushed to the disk, then renamed; `Writer` does so from a background thread while training goes on.
"""

import contextlib
import copy
import errno
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from lib.cli import BadInput, RankError

NAME = re.compile(r"ckpt_(\d+)\.pt")
NOT_THE_FILE = (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ESTALE)  # may pass


def found(folder):
    """The checkpoints of a run folder by their names: list of (step, path), newest first."""
    names = [(NAME.fullmatch(path.name), path) for path in Path(folder).glob("ckpt_*.pt")] if os.path.isdir(folder) else []
    return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)


class Torn(BadInput):
    """A file that is there and can be read, but is no whole checkpoint."""


def path_of(folder, step):
    return Path(folder) / f"ckpt_{step:05d}.pt"


def require(path):
    """Raises BadInput where there is no file."""
    if not os.path.isfile(path):
        raise BadInput(f"no checkpoint at {path}: name a ckpt_<step>.pt of a folder under log/")


def read(path):
    """A checkpoint, its tensors memory-mapped on the CPU. Raises Torn if it is torn, damaged or foreign, else BadInput.

    Loaded with weights_only=True: nothing in a downloaded file can run.
    """
    require(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise TypeError(type(state).__name__)
        return state
    except Exception as error:  # zipfile and torch.load raise many kinds on a foreign or torn file
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in NOT_THE_FILE:
            raise RankError(f"cannot read {path} ({type(error).__name__}: {error}): mend that and start again") from error
        raise Torn(f"{path} is not a whole checkpoint of this project ({type(error).__name__}: {str(error)[:80]}): "
                       "try an earlier ckpt_<step>.pt") from error


def newest(folder, warn):
    """(path, state) of the newest whole checkpoint of a run folder, or None if there are none at all.

    Torn ones are skipped, after `warn` has been called with a line about each. Raises BadInput if all are torn.
    """
    candidates = found(folder)
    for _, path in candidates:
        try:
            return path, read(path)
        except Torn as error:
            warn(f"skipped: {error}")
    if candidates:
        raise BadInput(f"{folder} holds no whole checkpoint: delete those there to begin anew, or give another --run")
    return None


def write(path, state):
    """Write `state` so that `path` is never half a checkpoint. Raises BadInput if there is no room or no right to."""
    check_room(Path(path).parent, n_bytes(state))
    try:
        replace(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise BadInput(f"cannot save {path} ({type(error).__name__}: {str(error)[:80]}): free some disk space, or see to the disk; "
                       "the checkpoints before it stay") from error


def replace(path, write):
    """Call `write` with a binary file, so that `path` holds either what it did or all that was written, on the disk."""
    path = Path(path)
    partial = path.with_suffix(".tmp")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name == "posix":  # the new name itself is on the disk once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def check_room(folder, needed):
    """Raises BadInput if the disk of `folder` has not so many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(f"a checkpoint needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free: free some disk space, or "
                       "--keep fewer; the checkpoints already there are whole")


def tensors(state):
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors(value)


def map_tensors(change, state):
    """`state` with `change` applied to each tensor; tuples become lists."""
    if isinstance(state, torch.Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: map_tensors(change, value) for key, value in state.items()}
    return [map_tensors(change, value) for value in state] if isinstance(state, (list, tuple)) else state


def n_bytes(state):
    """Bytes of the tensors in `state`, those that share memory counted once."""
    return sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors(state)}.values())


OF_A_START = ("run", "log_dir", "resume", "tensorboard")  # settings of one start, not of a run


@dataclass
class Resume:
    """A checkpoint to continue from; `changed` collects, as text, what is not as it was."""

    path: Path
    state: dict
    seen: set  # steps of the checkpoints in the run folder, before this one was read
    changed: list = field(default_factory=list)

    def adopt(self, cfg, model_cfg, given):
        """Take every setting that was not given from the checkpoint.

        Raises BadInput if one that was given does not fit its weights; notes the others that differ.
        """
        misfits, rope = [], self.state["model_config"]["pos"] == "rope"
        free = {"dropout", "init"} | ({"block_size"} if rope else set())  # do not shape the weights
        for config, before in ((cfg, self.state["train_config"]), (model_cfg, self.state["model_config"])):
            for name in (f.name for f in fields(config) if f.name in before and f.name not in OF_A_START):
                own = getattr(config, name)
                if name not in given:
                    setattr(config, name, before[name])
                elif own != before[name]:
                    fits = name in free if config is model_cfg else name != "optimizer"
                    (self.changed if fits else misfits).append(f"--{name} {before[name]} -> {own}")
        if misfits:
            raise BadInput(f"{self.path} does not fit these flags: {', '.join(misfits)}; give them as it was made, or begin "
                           "another --run")
        numbers = [self.state["step"], self.state["max_steps"], *(self.state["loader"][name] for name in ("epoch", "shard", "offset"))]
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or not isinstance(self.state["optimizer"], dict):
            raise TypeError("no training state")


def to_resume(cfg, given):
    """--resume and --run -> Resume or None. May set cfg.log_dir and cfg.run.

    A run's own checkpoints come before the one it began with: the same command, given again, continues.
    """
    def warn(line):
        if os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr)

    start = None if cfg.resume in (None, "auto") else Path(cfg.resume)
    home = start and (start if os.path.isdir(start) else start.parent).absolute()
    if cfg.run is None and start and "log_dir" not in given and os.path.exists(home / "config.json"):
        cfg.log_dir, cfg.run = str(home.parent), home.name
    begun = restarted(cfg.log_dir)
    if cfg.run is None and begun:
        cfg.run = begun.name
    if cfg.run is None and cfg.resume == "auto":
        raise BadInput("--resume auto continues the run that --run names: give its name, or --resume PATH")
    own = cfg.run and (Path(cfg.log_dir) / cfg.run).absolute()
    seen = {step for step, _ in found(own)} if own else set()
    if seen and (home is None or own.resolve() != home.resolve() or begun == Path(cfg.log_dir) / cfg.run):
        if start:
            warn(f"--resume {start} is where {cfg.run} may begin; it has checkpoints of its own and goes on from these")
        return Resume(*newest(own, warn), seen)
    if start is None:
        return None
    if os.path.isdir(start):
        if not found(start):
            raise BadInput(f"--resume {start}: this folder holds no ckpt_<step>.pt; name another")
        return Resume(*newest(start, warn), seen)
    return Resume(start, read(start), seen)


def load_optimizer(optimizer, state):
    """Load the moments of a checkpoint into `optimizer`, whose own settings (weight decay, betas, ...) stay."""
    settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    state = copy.deepcopy(state)  # a CPU's moments would stay in the checkpoint's file, memory-mapped
    for group, own in zip(state["param_groups"], settings):  # before loading: a fused AdamW wants its step counts on the GPU
        group.update(own)
    optimizer.load_state_dict(state)


def starts(folder):
    """What config.json says of each start of the run in `folder`, the first one first."""
    try:
        return list(json.loads((folder / "config.json").read_text())["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def launch_id():
    """What all processes and restarts of one torchrun have in common; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    began = ""
    with contextlib.suppress(OSError):  # not on Linux: the number of the process must do
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()} {began}"


def restarted(log_dir):
    """The folder of the run that this torchrun began before --max_restarts brought its processes back, or None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        for path in Path(log_dir).glob("*/config.json"):
            with contextlib.suppress(LookupError, TypeError):
                if starts(path.parent)[-1]["launch"] == launch_id():
                    return path.parent
    return None


def make_run_folder(log_dir, name, resumes):
    """Create log_dir/run, or take up the folder of a run that was interrupted.

    Raises BadInput if it holds a finished run without a checkpoint to continue from, or cannot be written.
    """
    folder = Path(log_dir) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").touch()
        with tempfile.TemporaryFile(dir=folder):
            log = (folder / "log.txt").read_text(errors="replace")
    except OSError as error:
        raise BadInput(f"cannot write {folder} ({error.strerror}): give another --log_dir") from error
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        length = json.loads((folder / "config.json").read_text())["max_steps"]
        if not resumes and f"\n{length - 1} train " in f"\n{log}":
            raise BadInput(f"{folder} already holds a run, finished and without checkpoints: give another --run name, or move it away")
    return folder


def rewind(folder, step):
    """Make a run folder what it was when its checkpoint of `step` was saved.

    Half-written files go. The lines of log.txt from `step` on go, since these steps run again. Checkpoints of later steps
    (torn, or of a course that is given up) are set aside as ckpt_<step>.pt.aside. TensorBoard is rewound by purge_step.
    """
    folder = Path(folder)
    for partial in folder.glob("*.tmp"):
        partial.unlink()
    for later, path in found(folder):
        if later > step:
            os.replace(path, path.with_suffix(".pt.aside"))
    lines = [line for line in (folder / "log.txt").read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    kept = b"".join(line for line in lines if not re.match(rb"\d+ ", line) or int(line.split()[0]) < step)
    replace(folder / "log.txt", lambda file: file.write(kept))


@contextlib.contextmanager
def locked(folder):
    """Hold the lock of a run folder; it goes with the process, however that ends. Raises BadInput if another holds it."""
    handle = None
    try:
        import fcntl  # not on Windows

        handle = os.open(folder, os.O_RDONLY) if folder else None
        if folder:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BadInput(f"{folder} is in use by a run that goes on: end that one first, or give another --run") from error
    except (ImportError, OSError):
        pass  # no such locks here
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


class Writer:
    """Writes checkpoints to `folder` from a background thread, one at a time, and keeps the newest `keep` (0: all).

    `start` returns at once: the thread copies the tensors to the host, on a CUDA stream of its own, while the next
    forward and backward passes only read them. Whoever changes them calls `wait_copied` before.
    """

    def __init__(self, folder, keep):
        self.folder, self.keep = Path(folder), keep
        self.executor, self.future = ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), None
        self.copied = threading.Event()
        self.copied.set()
        self.stall = 0.0  # seconds that training waited for the latest checkpoint
        self.pool = {}    # (shape, dtype) -> host tensors to copy to, kept: pinning a gigabyte halts a GPU for a second

    def reserve(self, parameters, copies):
        """Allocate, in the background, what checkpoints with so many tensors of these shapes will be copied to."""
        self.executor.submit(lambda: [self._allocate(t) for t in parameters for _ in range(copies) if t.is_cuda])

    def start(self, step, state):
        """Begin to write ckpt_<step>.pt. Collect the previous one by `collect` first."""
        started = time.perf_counter()
        assert self.future is None, "collect the previous checkpoint first"
        self.copied.clear()
        device = next((t.device for t in tensors(state) if t.is_cuda), None)
        ready = device and (device, torch.cuda.current_stream(device).record_event())
        self.future = self.executor.submit(self._write, path_of(self.folder, step), state, ready)
        self.stall = time.perf_counter() - started

    def wait_copied(self):
        """Wait until the tensors given to `start` may change."""
        started = time.perf_counter()
        self.copied.wait()
        self.stall += time.perf_counter() - started

    def collect(self, wait=False):
        """None while there is nothing to say, else a line about the checkpoint written. Raises BadInput if that failed."""
        if self.future is None or not (wait or self.future.done()):
            return None
        future, self.future = self.future, None
        return f"{future.result()}; training waited {self.stall * 1e3:.0f} ms"

    def _write(self, path, state, ready):
        started = time.perf_counter()
        try:
            state = self._to_host(state, ready)
        except Exception as error:
            raise BadInput(f"cannot save {path}: no copy of it fits into memory ({type(error).__name__}: {str(error)[:80]})") from error
        finally:
            self.copied.set()
        size = n_bytes(state)
        if self.keep:
            for _, old in found(self.folder)[:0:-1]:  # from the oldest on, all but the newest make room if they must
                if shutil.disk_usage(self.folder).free < size:
                    old.unlink(missing_ok=True)
        write(path, state)
        if self.keep:
            for _, old in found(self.folder)[self.keep:]:
                old.unlink(missing_ok=True)
        return f"saved {path}, {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s"

    def _to_host(self, state, ready):
        spare, copies = {key: list(buffers) for key, buffers in self.pool.items()}, {}

        def copy(tensor):
            key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
            if key not in copies:  # tied weights stay one tensor
                buffers = spare.get((tensor.shape, tensor.dtype)) or [self._allocate(tensor)]
                copies[key] = buffers.pop().copy_(tensor, non_blocking=True)
            return copies[key]

        if ready is None:
            return map_tensors(copy, state)
        device, event = ready
        stream = torch.cuda.Stream(device)
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            state = map_tensors(copy, state)
        stream.synchronize()
        return state

    def _allocate(self, tensor):
        try:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        except RuntimeError:  # containers may limit pinned memory: plain memory is slower to copy to
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.pool.setdefault((tensor.shape, tensor.dtype), []).append(buffer)
        return buffer


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP, while `with` lasts: the first sets `received` to its name, a second ends the process.

    A thread listens, since Python runs signal handlers in the main thread alone, which may hang in a collective after
    another process has died. `patience`: seconds the main thread has after the first signal to call `heard`; then the
    process is ended. torchrun passes on the signal that a terminal has sent already: `echo` seconds of repeats are one.
    """

    def __init__(self, say, patience=None, echo=0.0):
        self.say, self.patience, self.echo = say, patience, echo
        self.received, self.taken = None, threading.Event()

    def heard(self):
        """The main thread has seen the request and is well."""
        self.taken.set()

    def __enter__(self):
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            names = ("SIGTERM", "SIGINT", "SIGHUP")
            self.before = {getattr(signal, name): None for name in names if hasattr(signal, name)}
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
                del self.before[signal.SIGHUP]  # nohup: the run is meant to outlive its terminal
            for number in self.before:  # a handler must exist for the number to be written to the socket
                self.before[number] = signal.signal(number, lambda *_: None)
            self.before_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_):
        if self.before is not None:
            signal.set_wakeup_fd(self.before_fd)
            for number, handler in self.before.items():
                signal.signal(number, handler)
            self.writer.close()  # ends the thread
        self.taken.set()

    def _listen(self):
        first = 0.0
        while number := self.reader.recv(1):
            if number[0] not in self.before:
                continue
            if self.received is None:
                first, self.received = time.monotonic(), signal.Signals(number[0]).name
                if self.patience:
                    threading.Thread(target=self._impatient, daemon=True).start()
                self.say(f"{self.received}: this step is finished, then the run is saved; a second signal ends it at once")
            elif time.monotonic() - first > self.echo:
                os._exit(128 + number[0])

    def _impatient(self):
        if not self.taken.wait(self.patience):
            print(f"{self.received}, and this process did not come to the end of its step within {self.patience:g} s", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
