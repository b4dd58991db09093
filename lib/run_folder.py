"""log/<run>: config.json, log.txt, TensorBoard events and checkpoints; what lets a run be
interrupted and go on exactly.

lib/resume.py says where a run begins, `RunFolder` is the folder while it goes on. Rank 0 holds it;
the others a `RunFolder.null()`.
"""

import contextlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from lib import checkpoint
from lib.budget import UNMEASURED, tokens_of
from lib.cli import EXHAUSTED, BadInput, RankError, is_broken, launched
from lib.decoding import SHOWN
from lib.description import warnings
from lib.files import (
    DISK_FULL,
    LOST,
    check_room,
    leftovers,
    locked,
    make_folder,
    read_json,
    read_text,
    remove_empty,
    replace,
    write_json,
)
from lib.logger import Logger, Null, quoted
from lib.summary import summarize

ROOT = Path(__file__).resolve().parent.parent
FIRST_COLUMNS = ("preset", "size", "n_layer", "n_head", "n_embd", "block_size", "total_batch_size",
                 "max_lr")  # of HPARAMS


# ----------------------------------------------------------------------------------------------------------------------
# What a folder holds


def in_shell(path):
    """A path as a word of a shell's command."""
    return shlex.quote(str(path))


def check_name(name):
    """Raises BadInput unless a run's name is that of one folder: an on-start script with an unset
    variable would begin ever new runs."""
    if not name.strip() or name in (".", "..") or len(name.encode()) > 200 or re.search(
            r"[/\\\0\n\r]", name):
        raise BadInput(
            f"--run_name {name!r} is not the name of a folder: give a plain name; --log_dir says where it goes"
        )


def check_ours(folder):
    """Raises BadInput if `folder` exists and this project did not begin it: there, nothing may be
    rewound, replaced or removed."""
    names = set()
    if os.path.isdir(folder):
        names = {path.name for path in folder.iterdir()}
        names -= {path.name for path in leftovers(folder, "config.json")}
    if has_foreign_config(folder):
        raise BadInput(
            f"{folder} is not a run folder, its config.json is another program's: give another --run_name"
        )
    if names and not read_config(folder) and not checkpoint.found(folder):
        raise BadInput(
            f"{folder} is not a run folder, it holds no config.json of a run: give another --run_name"
        )


def has_foreign_config(folder):
    """Whether a folder holds another program's config.json, a Hugging Face model's for one; a
    damaged one may be a run's."""
    config = read_config(folder)
    return bool(config) and not {"train", "starts"} & config.keys()


def read_config(folder):
    """config.json of a run folder as a dict; {} if it cannot be read: a run does not depend on it.
    """
    try:
        config = read_json(folder / "config.json", "")
    except BadInput:
        return {}
    return config if isinstance(config, dict) else {}


def starts(folder):
    """What config.json says of each start of the run in `folder`, the first one first."""
    told = read_config(folder).get("starts")
    return [start for start in told if isinstance(start, dict)] if isinstance(told, list) else []


def launch_id():
    """What all processes and restarts of one torchrun have in common; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    began = ""
    with contextlib.suppress(OSError):  # not on Linux: the process id must do
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()} {began}"


def restarted(log_dir):
    """The folder of the run that this torchrun began before --max_restarts brought its processes
    back, or None."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        for path in Path(log_dir).glob("*/config.json"):
            if (told := starts(path.parent)) and told[-1].get("launch") == launch_id():
                return path.parent
    return None


def interrupted(log_dir):
    """The folder of the last run that this same command started, unless that run is finished; or
    None."""
    mine = {}
    for path in Path(log_dir).glob("*/config.json"):
        for start in starts(path.parent):
            if start.get("command") == this_command():
                mine[str(start.get("time"))] = path.parent
    if not mine or is_finished(mine[max(mine)]):
        return None
    return mine[max(mine)]


def is_finished(folder):
    """Whether the newest checkpoint of a run folder is that of the run's end."""
    found = checkpoint.found(folder)
    length = read_config(folder).get("max_steps")
    if not found or not isinstance(length, int) or found[0][0] < length:
        return False
    try:
        return bool(checkpoint.read(found[0][1]).get("finished", True))
    except BadInput:  # torn: the run goes on from the one before
        return False


def this_command():
    """The command that started this process, as text."""
    return shlex.join([*launcher(), *sys.argv])


# ----------------------------------------------------------------------------------------------------------------------
# The folder of a run


class RunFolder:
    """log/<run> on rank 0, from its making to `close`: the lock, config.json, the log, checkpoints
    in the background."""

    def __init__(self, cfg, resume, corpus):
        """Create the folder, or take up that of an interrupted run. Raises BadInput if it holds
        something else."""
        self.folder = Path(cfg.log_dir) / (cfg.run_name
                                           or f"{cfg.preset}_{time.strftime('%Y%m%d_%H%M%S')}")
        self.work, self.keep = partial(tokens_of, cfg=cfg), cfg.keep
        self.log, self.writer, self.open_locks = Null(), Null(), contextlib.ExitStack()
        self.seconds = 0.0  # of training steps, in this start
        self.results = {}   # the latest of each evaluation, by tag
        # of the length, once it is fixed
        self.warnings = partial(warnings, cfg, corpus) if cfg.minutes else None
        self.saved = None      # step of the newest checkpoint that this start wrote, or is writing
        self.best = None       # [validation loss, step] of the best checkpoint that was written
        self.candidate = None  # the same of the one to replace it
        check_name(self.folder.name)
        self.made = make_folder(self.folder, "give another --log_dir")
        try:
            self.open_locks.enter_context(
                locked(self.folder, "end that run first, or give another --run_name"))
            check_ours(self.folder)
            if {step for step, _ in checkpoint.found(self.folder)
                } != (resume.seen if resume else set()):
                raise RankError(
                    f"{self.folder} has just been written by another process: start again")
            for name in ("log.txt", "config.json"):
                if os.path.lexists(self.folder / name):
                    check_appendable(self.folder / name)
            length = read_config(self.folder).get("max_steps")
            self.anew = not resume and os.path.exists(self.folder / "log.txt") and os.path.getsize(
                self.folder / "log.txt") > 0
            if self.anew and isinstance(length,
                                        int) and f"\n{length - 1} train " in "\n" + self._old_log():
                raise BadInput(f"{self.folder} already holds a run, finished and without checkpoints: "
                               "give another --run_name, or move it away")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def null():
        return Null()

    def _old_log(self):
        return read_text(self.folder / "log.txt", "give another --run_name")

    def begin(self, config, description, position, resume, like):
        """Rewind the folder to where the run begins, write config.json and open the log.

        config: dict of what says which run this is: goes into config.json and into every
        checkpoint. position: a lib.resume.Position. like: tensors (shapes and dtypes) of a
        checkpoint, for which there must be room on the disk, and for which memory is allocated;
        raises BadInput if there is none.
        """
        step = position.step
        check_room(self.folder, sum(t.numel() * t.element_size() for t in like), "a checkpoint",
                   checkpoint.NO_ROOM)
        changed, command = ", ".join(resume.changed) if resume else "", this_command()
        start = {
            "step": step, "from": resume and str(resume.path), "changed": changed,
            "command": command, "time": time.strftime("%Y-%m-%d %H:%M:%S"), "launch": launch_id(),
            **commit()
        }
        self.constants = {
            "model_config": config["model"], "train_config": config["train"],
            **{name: value for name, value in config.items() if name not in ("model", "train")}
        }
        self.config = config | {
            "command": command, "torch": torch.__version__, "starts": [*starts(self.folder), start]
        }
        write_json(self.folder / "config.json", self.config)  # from here on the folder is ours
        rewind(self.folder, step)
        self._open(step)
        self.say(description)
        if resume:
            self.say(f"resume  {resume.path}, step {step}; "
                     + (f"changed: {changed}" if changed else "as before"))
        if self.anew:
            self.say(f"{self.folder} holds no checkpoint: its run begins anew")
        settings = config["train"] | config["model"] | {"parameters": config.get("parameters")}
        first = {name: settings[name] for name in FIRST_COLUMNS}
        self.log.hyperparameters(step, first | settings)
        self.first = step
        self.best = position.best
        self.saved = step if checkpoint.path_of(self.folder, step).exists() else None
        self.saved_at = time.monotonic()
        self.writer = Writer(self.folder, self.keep)
        self.writer.reserve(like)

    def _open(self, step):
        write_json(self.folder / "config.json", self.config)
        save_code(self.folder, step)
        train = self.config["train"]
        self.log = Logger(self.folder, self.config["max_steps"], step, train["price_per_hour"],
                          self.work, train["log_every"])

    def recorded(self, kind):
        """{step: value} of the lines of this kind in log.txt."""
        lines = re.findall(rf"^(\d{{1,12}}) {re.escape(kind)} (\S+)$", self._old_log(),
                           re.MULTILINE)
        return {int(step): float(value) for step, value in lines}

    def save_is_due(self, minutes):
        """Whether so many minutes (0: never) have passed since the last checkpoint."""
        return bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes

    def is_best(self, loss, step):
        """Whether a validation loss is below that of the best checkpoint. If so, the checkpoint of
        this `step` replaces it, once it is written."""
        self.poll(wait=True)  # the best one may be on its way
        if not loss < (self.best or [math.inf])[0]:
            return False
        self.candidate = [loss, step]
        return True

    def save(self, state, wait=False):
        """Begin to write a checkpoint of `state`, unless that step's is there, or on its way; with
        `wait`, raise BadInput if it cannot be written."""
        if not self.folder.is_dir():  # moved or removed: the run goes on in a new one
            self._make_again(state["step"])
        if wait:
            self.poll(wait=True)  # if the step's own failed, it is tried again
        if state["step"] != self.saved or state["finished"]:
            self._start(state)
        if wait and (error := self.poll(wait=True)):
            raise error

    def _start(self, state):
        self.poll(wait=True)  # the one before
        self.log.flush()
        self.saved_at = time.monotonic()
        self.saved = state["step"]
        best = self.best
        if self.candidate and self.candidate[1] == self.saved:
            best = self.candidate
        # its max_steps may have followed --minutes
        config = partial(write_json, self.folder / "config.json", dict(self.config))
        former_best = self.best and self.best[1]
        state = self.constants | state | {"best": best}
        self.writer.start(self.saved, state, config, former_best)

    def _make_again(self, step):
        self.poll(wait=True)
        self.log.close()
        make_folder(self.folder, "see what became of it, and start again")
        self.open_locks.enter_context(locked(self.folder, "end that run first"))
        self._open(step)
        self.log.say(f"{self.folder} was moved or removed while the run went on: made again")
        self.saved = self.best = None

    def wait_copied(self):
        """Wait until the tensors being saved may change."""
        self.writer.wait_copied()

    def poll(self, wait=False):
        """Say that the checkpoint begun is written, or why not: that alone does not end a run.
        Returns the error or None."""
        try:
            line = self.writer.collect(wait)
        except BadInput as error:
            self.saved = None
            self.log.say(str(error))
            return error
        if line:
            self.log.say(line)
        if self.candidate and self.candidate[1] == self.saved and self.writer.future is None:
            self.best = self.candidate
        return None

    def give_up(self, state):
        """The newest checkpoint from before too many updates in a row were skipped; `state` is
        saved if there is none."""
        self.poll(wait=True)
        if not checkpoint.found(self.folder):
            self.saved = None
            self.save(state, wait=True)
        return checkpoint.found(self.folder)[0][1]

    def conclude(self, step, finished):
        """Say how the run ended and what to do next."""
        best = self.best
        if finished:
            cost = self.seconds, self.work(step) - self.work(self.first)
            with contextlib.suppress(
                    BadInput,
                    ValueError):  # log.txt is gone or damaged: the run is finished all the same
                losses = self.recorded("train"), self.recorded("val")
                self.say(summarize(self.folder, (self.first, step), self.results, losses, cost))
            if "samples" in self.results:
                self.say(quoted(self.results["samples"]))
        if best:
            self.say(
                f"best    validation loss {best[0]:.4f}, at step {best[1]}: {checkpoint.path_of(self.folder, best[1])}"
            )
        if finished:
            path = checkpoint.path_of(self.folder, best[1] if best else step)
            self.say(
                f"done: watch it with `tensorboard --logdir {in_shell(self.folder.parent)}`, {self._try_it(path)}"
            )
        else:
            flags = {None: f" with --run_name {in_shell(self.folder.name)}", "auto": ""}
            # a checkpoint of this folder, named again, would go back to it again
            named = flags.get(self.config["train"]["resume"],
                              f" with --resume {in_shell(self.folder)}")
            length = self.config["max_steps"]
            of_length = f" of {length}" if length < UNMEASURED else ""
            self.say(f"stopped at step {step}{of_length}: the same command{named} goes on")

    def _try_it(self, path):
        """The command that lets its user see what the checkpoint at `path` has learned, as text."""
        if self.constants.get("chat_template"):
            return f"talk to it with `python chat.py --checkpoint {in_shell(path)}`"
        prompt = shlex.quote(self.config["train"]["sample_prompt"])
        return (f"sample again with `python generate.py --checkpoint {in_shell(path)} --prompt {prompt} "
                f"--samples {SHOWN.samples} --max_new_tokens {SHOWN.max_new_tokens} --temperature {SHOWN.temperature}`")

    def set_length(self, steps, stands):
        """The run has so many steps, as --minutes of them turn out to be. Once that stands, says
        what speaks against it."""
        if stands:
            for line in self.warnings(steps) if self.warnings else ():
                self.say(line)
            self.warnings = None
        self.config["max_steps"] = steps  # written with the next checkpoint
        self.log.set_length(steps)

    def say(self, line):
        self.log.say(line)

    def log_step(self, step, scalars, seconds):
        self.seconds += seconds
        self.log.log_step(step, scalars, seconds)

    def log_evaluation(self, step, results):
        self.results.update(results)
        self.log.log_evaluation(step, results)

    def close(self):
        self.log.close()
        remove_empty(self.made)  # of a start that failed; a run's holds its files
        self.open_locks.close()


@contextlib.contextmanager
def explained(cfg, micro_batch=None):
    """What the machine lacks, in one line: memory, a compiler, room on the disk.

    micro_batch: sequences per forward pass, once known."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise RankError(f"out of GPU memory with --micro_batch {micro_batch or cfg.micro_batch}: "
                        "give a smaller one") from error
    except (RuntimeError, MemoryError) as error:
        if checkpoint.is_memory(error):
            raise RankError("out of memory: free some, raise `ulimit -v`, or give a smaller "
                            "--micro_batch") from error
        if type(error).__module__ not in ("torch._dynamo.exc",
                                          "torch._inductor.exc"):  # importing these takes a second
            raise
        raise RankError(f"torch.compile failed ({str(error).splitlines()[0]}): "
                        "see to its compiler, or give --no-compile") from error
    except OSError as error:
        if error.errno not in LOST or is_broken(sys.stdout):  # the console's disk, it may be
            raise
        if error.errno not in DISK_FULL:
            raise RankError(f"the disk of {error.filename or cfg.log_dir} fails ({error.strerror}): see "
                            "to it, and the same command goes on from the newest checkpoint") from error
        raise RankError(f"the disk of {cfg.log_dir} is full: free some space, "
                        "and the same command goes on from the newest checkpoint") from error


def check_appendable(path):
    """Raises BadInput if a file of a run cannot be opened for writing: a folder, a pipe, immutable.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)))
        if not path.is_file():
            raise OSError(0, "not a regular file")
    except OSError as error:
        raise BadInput(
            f"cannot write {path} ({error.strerror}): give another --run_name") from error


def rewind(folder, step):
    """Make a run folder what it was when its checkpoint of `step` was saved.

    Half-written files go. The lines of log.txt from `step` on go, since these steps run again.
    Checkpoints of later steps (torn, or of a course that is given up) are set aside as
    ckpt_<step>.pt.aside, or .aside.2 and so on where an earlier course left one. TensorBoard is
    rewound by the log.
    """
    folder = Path(folder)
    for name in ("ckpt_*.pt", "*.json", "log.txt"):
        for unfinished in leftovers(folder, name):
            unfinished.unlink()
    for later, path in checkpoint.found(folder):
        if later > step:
            os.replace(path, free_name(path.with_suffix(".pt.aside")))
    (folder / "log.txt").touch()
    lines = [
        line for line in (folder / "log.txt").read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
    kept = b"".join(line for line in lines
                    if not (number := re.match(rb"(\d{1,12}) ", line)) or int(number[1]) < step)
    replace(folder / "log.txt", lambda file: file.write(kept))


def free_name(path):
    """`path` if nothing has that name, else the first of <path>.2, <path>.3, ... that nothing has.
    """
    candidate = path
    number = 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def commit():
    """{"commit": hash} of the code where the project is a git checkout, else {}."""
    told = _git("rev-parse", "HEAD")
    return {"commit": told.decode().strip()} if told else {}


def save_code(folder, step):
    """What made the run: train_gpt2.py, the script that runs, and the diff from the commit that
    config.json names. A later start with other code adds its own."""
    scripts = {ROOT / "train_gpt2.py", Path(sys.argv[0]).resolve()}
    contents = {
        path.name: path.read_bytes()
        for path in sorted(scripts)
        if path.parent == ROOT and path.suffix == ".py"
    }
    for name, content in (*contents.items(), ("code.diff", _git("diff", "HEAD"))):
        path = folder / name
        if path.exists() and (not path.is_file() or path.read_bytes() != (content or b"")):
            path = path.with_name(f"{path.stem}_from_{step:05d}{path.suffix}")
        if content:
            replace(path, lambda file, content=content: file.write(content))


def _git(*arguments):
    """What git prints, as bytes; None where there is no git or no checkout."""
    try:
        told = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, timeout=20,
                              check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout if told.returncode == 0 else None


def launcher():
    """The words before the script's name in the command that started this process."""
    told = launched()
    return ["torchrun", f"--nproc_per_node={told['local_world_size']}"] if told else ["python"]


class Writer:
    """Writes checkpoints to `folder` from a background thread, one at a time, and keeps the newest
    `keep` (0: all).

    `start` returns at once: the thread copies the tensors to the host, on a CUDA stream of its own,
    while the next forward and backward passes only read them. Whoever changes them calls
    `wait_copied` before.
    """

    def __init__(self, folder, keep):
        self.folder, self.keep = Path(folder), keep
        self.executor, self.future = ThreadPoolExecutor(1, thread_name_prefix="checkpoint"), None
        self.copied = threading.Event()
        self.copied.set()
        self.stall = 0.0  # seconds that training waited for the latest checkpoint
        self.pool = {
        }  # (shape, dtype) -> host tensors to copy to, kept: pinning a gigabyte halts a GPU for a second

    def reserve(self, like):
        """Allocate, in the background, pinned memory for a checkpoint of tensors like these; a
        CPU's need none."""
        self.executor.submit(lambda: [self._allocate(t) for t in like if t.is_cuda])

    def start(self, step, state, before=lambda: None, former_best=None):
        """Begin to write ckpt_<step>.pt. Collect the previous one by `collect` first.

        before: called right before it is written; if it fails, the checkpoint does. former_best:
        step of a checkpoint that must not make room for this one, whatever state["best"] says.
        """
        started = time.perf_counter()
        assert self.future is None, "collect the previous checkpoint first"
        self.copied.clear()
        device = next((t.device for t in checkpoint.tensors(state) if t.is_cuda), None)
        ready = device and (device, torch.cuda.current_stream(device).record_event())
        copy = partial(self._to_host, state, ready)
        path = checkpoint.path_of(self.folder, step)
        self.future = self.executor.submit(self._write, path, copy, before, former_best)
        self.stall = time.perf_counter() - started

    def wait_copied(self):
        """Wait until the tensors given to `start` may change."""
        started = time.perf_counter()
        self.copied.wait()
        self.stall += time.perf_counter() - started

    def collect(self, wait=False):
        """None while there is nothing to say, else a line about the checkpoint written. Raises
        BadInput if that failed."""
        if self.future is None or not (wait or self.future.done()):
            return None
        (future, self.future), started = (self.future, None), time.perf_counter()
        error = future.exception()  # waits for it
        self.stall += time.perf_counter() - started
        if isinstance(error, OSError):  # the folder is gone, or not ours to change
            remedy = EXHAUSTED.get(error.errno, "see what became of it")
            raise BadInput(f"cannot save a checkpoint in {self.folder} ({error.strerror}): {remedy}"
                           ) from error
        return f"{future.result()}; training waited {self.stall * 1e3:.0f} ms"

    def _write(self, path, copy, before, former_best):
        started = time.perf_counter()
        try:
            state = copy()
        except Exception as error:
            raise BadInput(f"cannot save {path}: no copy of it fits into memory "
                           f"({type(error).__name__}: {str(error)[:80]})") from error
        finally:
            self.copied.set()
        size = checkpoint.n_bytes(state)
        if self.keep:
            # from the oldest on, all but the newest make room if they must
            for old in self._others(former_best)[:0:-1]:
                if shutil.disk_usage(self.folder).free < size:
                    old.unlink(missing_ok=True)
        before()
        checkpoint.write(path, state)
        if self.keep:
            best = (state.get("best") or (None, None))[1]
            for old in self._others(best)[self.keep:]:
                old.unlink(missing_ok=True)
        return f"saved {path}, {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s"

    def _others(self, best):
        """The checkpoints, newest first, but for that of the step `best`."""
        return [path for step, path in checkpoint.found(self.folder) if step != best]

    def _to_host(self, state, ready):
        spare, copies = {key: list(buffers) for key, buffers in self.pool.items()}, {}

        def copy(tensor):
            key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
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

    def _allocate(self, tensor):
        try:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        except RuntimeError:  # containers may limit pinned memory: plain memory is slower to copy to
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.pool.setdefault((tensor.shape, tensor.dtype), []).append(buffer)
        return buffer
