"""Logging to the console, to log.txt and to TensorBoard."""

import contextlib
import datetime
import errno
import logging
import math
import os
import re
import socket
import statistics
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lib.budget import UNMEASURED, hours_and_dollars
from lib.cli import BadInput
from lib.files import sync

# TensorBoard tag -> its name in log.txt, on the console
RECORDED = {
    "Loss/train": "train", "Loss/val": "val", "Loss/val_pretraining": "val_pretraining",
    "eval/hellaswag": "hella"
}
LABELS = {
    "Loss/val": "val loss", "Loss/val_bpb": "bits per byte",
    "Loss/val_pretraining": "pretraining val loss",
    "Loss/val_pretraining_bpb": "pretraining bits per byte", "eval/hellaswag": "HellaSwag acc_norm"
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OTHER_PORT = "give another --tensorboard port, or end the process that uses it"
OTHER_HOST = "name an address of this machine, or leave it out"
EVENTS = re.compile(r"events\.out\.tfevents\.([0-9]{1,10})\.")
PREDICTED = 10  # steps after which the length of the run in hours is predicted


class Null:
    """Stands in for an object on ranks without one: every method is a no-op and returns None."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Logger:
    """Console, log.txt and TensorBoard of one run folder.

    Events of `first_step` and later steps are dropped from TensorBoard, as these steps run again.
    """

    def __init__(self, folder: Path, max_steps: int, first_step: int,
                 price_per_hour: float | None = None,
                 work_of: Callable[[int, int], float] = lambda step, steps: step,
                 log_every: int | None = None):
        """work_of: (n, length of the run) -> work in the first n steps, in any unit, to predict the
        remaining time, as steps may grow (--batch_warmup, --context_warmup). log_every: steps per
        line on the console; None: see `_is_shown`."""
        from tqdm import tqdm

        self.max_steps = max_steps
        self.first_step = first_step
        self.next_step = first_step
        self.price_per_hour = price_per_hour
        self.work_of = work_of
        self.log_every = log_every
        self.shown = (first_step, -math.inf)  # step and time of the last step line, seconds
        # seconds per unit of work of the latest steps, without the first, which also loads kernels
        self.recent: deque[float] = deque(maxlen=20)
        # open until the end of the run
        self.file = open(folder / "log.txt", "a", buffering=1)  # noqa: SIM115
        self.events = EventFile(folder, first_step)
        self.tracker: Any = Null()  # a lib.tracker.Tracker gets what TensorBoard gets
        self.bar: tqdm | None = None
        if sys.stdout.isatty():
            self.bar = tqdm(initial=first_step, unit="step", dynamic_ncols=True)
        self.set_length(max_steps)

    # -- console --

    def say(self, text: str) -> None:
        with self._console():
            if self.bar is None:
                print(f"{text}\n", end="", flush=True)
            else:
                self.bar.write(text)

    @contextlib.contextmanager
    def _console(self) -> Iterator[None]:
        """Continue without a console once it is gone (a closed connection, Ctrl-C to `| tee`), so
        that the run is still saved."""
        try:
            yield
        except OSError:
            self.bar = None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if os.path.sameopenfile(1, 2):  # else errors can still be printed
                os.dup2(nowhere, 2)
            os.dup2(nowhere, 1)

    def set_length(self, steps: int) -> None:
        """Set the length of the run; UNMEASURED: not known yet."""
        self.max_steps = steps
        if self.bar is not None:
            self.bar.total = steps if steps < UNMEASURED else None

    # -- a step, an evaluation --

    def log_step(self, step: int, scalars: dict[str, Any], seconds: float) -> None:
        """Log a training step. scalars: {tag: number, None if unknown, or bars of a histogram}."""
        self.next_step = step + 1
        work = self.work_of(step + 1, self.max_steps) - self.work_of(step, self.max_steps)
        pace = seconds / work
        if step > self.first_step:
            self.recent.append(pace)
        typical = statistics.median(self.recent or [pace])
        self.scalars(step, scalars)
        text = step_line(scalars, seconds, self._eta(step + 1, typical))
        if self.bar is not None:
            with self._console():
                self.bar.set_postfix_str(text, refresh=False)
                self.bar.update(step + 1 - self.bar.n)
        elif self._is_shown(step):
            self.say(f"step {step} | {text}")
            self.shown = (step, time.monotonic())
        if step + 1 - self.first_step == min(PREDICTED, self.max_steps):
            duration = hours_and_dollars(self._remaining(self.first_step, typical),
                                         self.price_per_hour)
            rate = scalars["perf/tok_per_sec"] * pace / typical
            self.say(f"predicted: {duration} of training steps, at {rate:,.0f} tok/s")

    def seconds_left(self) -> float:
        """Seconds of training after the last logged step, at the speed of the latest steps."""
        typical = statistics.median(self.recent)
        return self._remaining(self.next_step, typical)

    def _remaining(self, step: int, pace: float) -> float:
        """Seconds of training from `step` to the end, at `pace` seconds per unit of work."""
        steps = self.max_steps
        return pace * (self.work_of(steps, steps) - self.work_of(step, steps))

    def _eta(self, step: int, pace: float) -> str:
        if self.max_steps >= UNMEASURED:
            return "unknown until steps are timed"
        return str(datetime.timedelta(seconds=round(self._remaining(step, pace))))

    def _is_shown(self, step: int) -> bool:
        """Whether the console gets a line for this step.

        Every --log_every steps; without it, the first ten, the last, and between them one per
        second or per hundred steps, whichever comes first.
        """
        if self.log_every:
            return step % self.log_every == 0
        if step < self.first_step + 10 or step + 1 == self.max_steps:
            return True
        shown, shown_at = self.shown
        return step - shown >= 100 or time.monotonic() - shown_at >= 1

    def log_evaluation(self, step: int, results: dict[str, Any]) -> None:
        """Log an evaluation's results: {tag: number or list of texts}."""
        texts = {tag: value for tag, value in results.items() if isinstance(value, list)}
        numbers = {tag: value for tag, value in results.items() if tag not in texts}
        self.scalars(step, numbers)
        if numbers:
            shown = [f"{LABELS.get(tag, tag)} {value:.4f}" for tag, value in numbers.items()]
            self.say(" | ".join([f"step {step}", *shown]))
        for tag, samples in texts.items():
            if step < self.max_steps:  # the summary at the end prints the last ones
                self.say(quoted(samples))
            indented = [textwrap.indent(sample, "    ") for sample in samples]
            text = "\n\n---\n\n".join(indented)
            self.events.write_text(step, tag, text)
            self.tracker.write_text(step, tag, text)

    def scalars(self, step: int, scalars: dict[str, Any]) -> None:
        """Write numbers by tag to TensorBoard, losses and evaluations to log.txt, too.

        A list becomes a histogram; None is left out.
        """
        scalars = {tag: value for tag, value in scalars.items() if value is not None}
        for tag, value in scalars.items():
            kind = RECORDED.get(tag, tag if tag.startswith("eval/") else None)
            if kind:
                self.file.write(f"{step} {kind} {value:.6f}\n")
        self.events.write_scalars(step, scalars)
        self.tracker.write_scalars(step, scalars)

    def hyperparameters(self, step: int, values: dict[str, Any]) -> None:
        """Write all settings to TensorBoard, as a table under TEXT and under HPARAMS."""
        rows = [f"|{name}|{value}|" for name, value in values.items()]
        self.events.write_text(step, "hyperparameters", "\n".join(["|flag|value|", "|-|-|", *rows]))
        self.events.write_hparams(values, metrics=("Loss/val", "eval/hellaswag"))

    def flush(self) -> None:
        """Flush log.txt to the disk, so that it is never behind a checkpoint."""
        sync(self.file.fileno())

    def close(self) -> None:
        self.tracker.close()
        if self.bar is not None:
            with self._console():
                self.bar.close()
        for file in (self.events, self.file):
            with contextlib.suppress(OSError):  # a full disk has been reported by now
                file.close()


def step_line(scalars: dict[str, Any], seconds: float, eta: str) -> str:
    """A training step for the console."""
    mfu = scalars.get("perf/mfu")
    memory = scalars.get("perf/memory_gb")
    parts = [
        f"loss {scalars['Loss/train']:.4f}",
        f"lr {scalars['optim/lr']:.2e}",
        f"norm {scalars['optim/grad_norm']:.3f}",
        f"{seconds * 1e3:.0f} ms",
        f"{scalars['perf/tok_per_sec']:,.0f} tok/s",
        "MFU n/a" if mfu is None else f"MFU {mfu:.1%}",
    ]
    if memory:
        parts.append(f"{memory:.1f} GB")
    return " | ".join([*parts, f"ETA {eta}"])


def quoted(texts: Iterable[str]) -> str:
    """Texts quoted as in an email, separated by blank lines."""
    return "\n\n".join(textwrap.indent(text, "> ", lambda line: True) for text in texts)


# --------------------------------------------------------------------------------------------------
# TensorBoard


class EventFile:
    """A file of TensorBoard events, written without buffering, as it is watched during the run.

    It is not a SummaryWriter, whose thread ends in a traceback on a full disk or in a removed
    folder. TensorBoard sorts groups by name, capitals first, so tags are named to show Loss, eval,
    optim, perf, and last the gradient norms of parts (weights).
    """

    def __init__(self, folder: Path, first_step: int):
        # slow to import, so only rank 0 does
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        number = next_events_number(folder)
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
        self.records = RecordWriter(open(folder / name, "ab"))  # noqa: SIM115
        self._write(file_version="brain.Event:2", step=0)
        if number > 1:  # drops the steps from first_step on in earlier files
            self._write(session_log=SessionLog(status=SessionLog.START), step=first_step)

    def write_scalars(self, step: int, scalars: dict[str, Any]) -> None:
        """Write numbers by tag; a list becomes a histogram."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = []
        histograms = []
        for tag, value in scalars.items():
            if isinstance(value, list):
                histograms.append(Summary.Value(tag=tag, histo=histogram(value)))
            else:
                numbers.append(Summary.Value(tag=tag, simple_value=value))
        self._write(summary=Summary(value=numbers + histograms), step=step)

    def write_text(self, step: int, tag: str, text: str) -> None:
        from torch.utils.tensorboard.summary import text as summary_of

        encodable = text.encode(errors="replace").decode()  # a lone surrogate has no UTF-8
        self._write(summary=summary_of(tag, encodable), step=step)

    def write_hparams(self, values: dict[str, Any], metrics: Iterable[str]) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {}
        for name, value in values.items():
            plain[name] = value if isinstance(value, (bool, int, float)) else str(value)
        for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
            self._write(summary=summary)

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.records.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self.records.flush()

    def close(self) -> None:
        self.records.close()


def next_events_number(folder: Path) -> int:
    """One more than the largest number in the names of a folder's event files; 1 for the first.

    TensorBoard reads the files in the order of their names, and a restart drops steps only from
    files before its own. Earlier versions and TensorBoard's own writers use the time as the number,
    which may go backwards or come from another machine.
    """
    numbers = []
    for path in folder.glob("events.out.tfevents.*"):
        match = EVENTS.match(path.name)
        if match:
            numbers.append(int(match[1].ljust(10, "0")))  # names are compared as text
    return max(numbers, default=0) + 1


def histogram(counts: list[int]) -> dict[str, Any]:
    """The fields of a TensorBoard histogram with counts[i] in the bar from i - 0.5 to i + 0.5."""
    return {
        "min": -0.5,
        "max": len(counts) - 0.5,
        "num": sum(counts),
        "sum": sum(i * n for i, n in enumerate(counts)),
        "sum_squares": sum(i * i * n for i, n in enumerate(counts)),
        "bucket_limit": [i + 0.5 for i in range(len(counts))],
        "bucket": counts,
    }


def read_scalars(folder: str | Path) -> dict[str, dict[int, float]]:
    """The scalars in a run folder's TensorBoard events: {tag: {step: value}}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a resumed run replaces its steps
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        scalars[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return scalars


def serve_tensorboard(log_dir: str, port: int, host: str) -> None:
    """Serve TensorBoard from a thread of this process, so that it ends with the run.

    host: address to listen on. Raises BadInput if it is not this machine's, or the port is taken.
    """
    from tensorboard import program

    _check_free(host, port)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", "--logdir", log_dir, "--port", str(port), "--host", host])
    try:
        board.launch()
    except program.TensorBoardServerException as error:
        raise BadInput(f"TensorBoard cannot use port {port}: {OTHER_PORT}") from error
    if host in LOOPBACK:
        print(f"TensorBoard at http://localhost:{port}, for this machine only")
    else:
        print(f"TensorBoard at http://{host}:{port}, without a password, open to every host that "
              "reaches this port")


def _check_free(host: str, port: int) -> None:
    """Raises BadInput unless a server can listen there; TensorBoard's own error has four lines."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except UnicodeError as error:
        raise BadInput(f"--tensorboard_host {host} is not a host name: {OTHER_HOST}") from error
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise BadInput(f"TensorBoard cannot listen on --tensorboard_host {host} "
                           f"({error.strerror}): {OTHER_HOST}") from error
        raise BadInput(f"TensorBoard cannot use port {port} ({error.strerror}): "
                       f"{OTHER_PORT}") from error


# --------------------------------------------------------------------------------------------------
# Watching a run


class SpikeDetector:
    """Finds losses far above the median of the 50 before, relative to their spread.

    Losses of batches of a few documents differ by whole nats, those of half a million tokens by
    hundredths. A spike is SPREADS standard deviations above the median, and at least `floor` nats;
    floor 0: nothing is a spike.
    """

    SPREADS = 8  # healthy runs in benchmarks/, of 2,048 to 524,288 tokens per step, stay below 6.5

    def __init__(self, floor: float):
        self.floor = floor
        self.losses: deque[float] = deque(maxlen=50)

    def __call__(self, loss: float) -> str | None:
        """A line of text if `loss` is a spike, else None. Finite losses are kept."""
        line = self._judge(loss)
        if math.isfinite(loss):
            self.losses.append(loss)
        return line

    def _judge(self, loss: float) -> str | None:
        if not self.floor or len(self.losses) < 10:
            return None
        median = statistics.median(self.losses)
        spread = spread_of(self.losses)
        threshold = median + max(self.SPREADS * spread, self.floor)
        if not loss > threshold:  # or NaN
            return None
        return f"spike: loss {loss:.4f}, median before {median:.4f}, spread {spread:.4f}"


def spread_of(losses: Iterable[float]) -> float:
    """The standard deviation of losses around their trend, estimated from medians, so that spikes
    do not affect it.

    For a normal distribution it is 1.4826 times the median absolute deviation (Rousseeuw & Croux
    1993).
    """
    losses = list(losses)
    half = len(losses) // 2
    rise = statistics.median(losses[-half:]) - statistics.median(losses[:half])
    slope = rise / (len(losses) - half)
    residuals = [loss - slope * i for i, loss in enumerate(losses)]
    center = statistics.median(residuals)
    return 1.4826 * statistics.median(abs(residual - center) for residual in residuals)


class RecompileMonitor:
    """`with monitor("training"):` reports every compilation in the block after its first.

    A recompilation takes as much time as many steps.
    """

    def __init__(self, say: Callable[[str], Any]):
        self.say = say
        self.done: set[str] = set()
        self.count = 0

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        from torch._dynamo.utils import counters  # slow, but any optimizer imports it, too

        before = counters["stats"]["unique_graphs"]
        yield
        if counters["stats"]["unique_graphs"] > before and what in self.done:
            self.count += 1
            self.say(f"{what} was recompiled, {self.count} times by now: "
                     "TORCH_LOGS=recompiles shows why")
        self.done.add(what)


def progress(iterable: Iterable, what: str, processes: Any) -> Iterable:
    """The iterable with a progress bar on rank 0's terminal if it takes long."""
    from tqdm import tqdm

    disable = None if processes.main else True  # None: disabled without a terminal
    return tqdm(iterable, desc=what, leave=False, delay=2, disable=disable)
