"""What a run says: to the console, to log.txt and to TensorBoard."""

import contextlib
import datetime
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

from lib.budget import UNMEASURED, hours_and_dollars
from lib.cli import BadInput
from lib.files import sync

# TensorBoard tag -> kind of line in log.txt, words on the console
RECORDED = {
    "Loss/train": "train", "Loss/val": "val", "Loss/val_pretraining": "val_pretraining",
    "eval/hellaswag": "hella"
}
LABELS = {
    "Loss/val": "val loss", "Loss/val_bpb": "bits per byte",
    "Loss/val_pretraining": "pretraining val loss",
    "Loss/val_pretraining_bpb": "pretraining bits per byte", "eval/hellaswag": "HellaSwag acc_norm"
}
EVENTS = re.compile(r"events\.out\.tfevents\.([0-9]{1,10})\.")
COMPILED = 10  # times as long as its neighbours: a step that compiled a new shape


class Null:
    """Stands in for an object on the ranks that have none: every method is a no-op and returns
    None."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Logger:
    """Console, log.txt and TensorBoard of one run folder.

    What TensorBoard has of first_step and later is forgotten: these steps run again. Tags are named
    so that TensorBoard, which sorts their groups by name with capitals first, shows Loss, eval,
    optim, perf, and the norms of parts (weights) last.
    """

    def __init__(self, folder, max_steps, first_step, price_per_hour=None, work=lambda steps: steps,
                 log_every=None):
        """work: what the first so many steps amount to, by which the time left is predicted;
        steps may grow, as with --batch_warmup. log_every: steps per line on the console; None: see
        `_is_shown`."""
        self.work = work
        self.log_every = log_every
        self.shown = (first_step, -math.inf
                      )  # the latest step that has a line on the console, and when, seconds
        from tensorboard.compat.proto import event_pb2, summary_pb2  # slow to import: only rank 0 pays
        from tensorboard.summary.writer.record_writer import RecordWriter
        from tqdm import tqdm

        self.protos, self.max_steps, self.first_step = (event_pb2,
                                                        summary_pb2), max_steps, first_step
        self.price_per_hour = price_per_hour
        # seconds per unit of work in the latest steps, without the first, which also loads kernels
        self.recent = deque(maxlen=20)
        # open as long as the run
        self.file = open(folder / "log.txt", "a", buffering=1)  # noqa: SIM115
        number = next_events_number(folder)
        # written here and not by SummaryWriter, whose thread meets a full disk or a folder that is
        # gone with a traceback
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}"
        self.records = RecordWriter(open(folder / name, "ab"))  # noqa: SIM115
        self._event(file_version="brain.Event:2", step=0)
        if number > 1:
            self._event(session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
                        step=first_step)
        self.bar = tqdm(initial=first_step, unit="step",
                        dynamic_ncols=True) if sys.stdout.isatty() else None
        self.set_length(max_steps)

    # -- console --

    def say(self, text):
        with self._console():
            print(f"{text}\n", end="", flush=True) if self.bar is None else self.bar.write(text)

    @contextlib.contextmanager
    def _console(self):
        """A run outlives its console: after Ctrl-C to `| tee` too, or with the connection gone, it
        must still be saved."""
        try:
            yield
        except OSError:
            self.bar, nowhere = None, os.open(os.devnull, os.O_WRONLY)
            for stream in (2, 1) if os.path.sameopenfile(
                    1, 2) else (1,):  # errors are still said where they can be
                os.dup2(nowhere, stream)

    def set_length(self, steps):
        """How long the run is; UNMEASURED: not known yet."""
        self.max_steps = steps
        if self.bar is not None:
            self.bar.total = steps if steps < UNMEASURED else None

    # -- a step, an evaluation --

    def log_step(self, step, scalars, seconds):
        """One training step: its scalars by tag (None: not known here; a list: a histogram's bars)
        to TensorBoard and, the main ones, to log.txt and the console."""
        pace = seconds / (self.work(step + 1) - self.work(step))
        if step > self.first_step:
            self.recent.append(pace)
        typical = statistics.median(self.recent or [pace])

        def ahead(first):
            return typical * (self.work(self.max_steps) - self.work(first))

        eta = "unknown until steps are timed"
        if self.max_steps < UNMEASURED:
            eta = datetime.timedelta(seconds=round(ahead(step + 1)))
        self.scalars(step, scalars)
        mfu, memory, rate = (scalars.get(f"perf/{name}")
                             for name in ("mfu", "memory_gb", "tok_per_sec"))
        text = (f"loss {scalars['Loss/train']:.4f} | lr {scalars['optim/lr']:.2e} | norm {scalars['optim/grad_norm']:.3f} | "
                f"{seconds * 1e3:.0f} ms | {rate:,.0f} tok/s | MFU {f'{mfu:.1%}' if mfu is not None else 'n/a'} | "
                f"{f'{memory:.1f} GB | ' if memory else ''}ETA {eta}")
        if self.bar is not None:
            with self._console():
                self.bar.set_postfix_str(text, refresh=False)
                self.bar.update(step + 1 - self.bar.n)
        elif self._is_shown(step):
            self.say(f"step {step} | {text}")
            self.shown = (step, time.monotonic())
        if step + 1 - self.first_step == min(10, self.max_steps):
            left = hours_and_dollars(ahead(self.first_step), self.price_per_hour)
            self.say(f"predicted: {left} of training steps, at {rate * pace / typical:,.0f} tok/s")

    def _is_shown(self, step):
        """Whether the console gets a line for this step: every --log_every; without it each of the
        first ten, the last, and between them one per second or per hundred steps, whichever comes
        first."""
        if self.log_every:
            return step % self.log_every == 0
        if step < self.first_step + 10 or step + 1 == self.max_steps:
            return True
        shown, shown_at = self.shown
        return step - shown >= 100 or time.monotonic() - shown_at >= 1

    def log_evaluation(self, step, results):
        """What an evaluation found: by tag, a number or a list of texts."""
        numbers = {tag: value for tag, value in results.items() if not isinstance(value, list)}
        self.scalars(step, numbers)
        if numbers:
            self.say(f"step {step} | " + " | ".join(f"{LABELS.get(tag, tag)} {value:.4f}"
                                                    for tag, value in numbers.items()))
        for tag, texts in results.items():
            if isinstance(texts, list):
                if step < self.max_steps:  # those of the end are said at the end
                    self.say(quoted(texts))
                self.text(step, tag,
                          "\n\n---\n\n".join(textwrap.indent(text, "    ") for text in texts))

    def scalars(self, step, scalars):
        """Numbers by tag to TensorBoard, losses and evaluations also as lines `step kind value` of
        log.txt; a list becomes a histogram."""
        _, summary = self.protos
        bars = {tag: value for tag, value in scalars.items() if isinstance(value, list)}
        scalars = {
            tag: value for tag, value in scalars.items() if value is not None and tag not in bars
        }
        for tag, value in scalars.items():
            if kind := RECORDED.get(tag, tag if tag.startswith("eval/") else None):
                self.file.write(f"{step} {kind} {value:.6f}\n")
        values = [summary.Summary.Value(tag=tag, simple_value=v) for tag, v in scalars.items()]
        values += [
            summary.Summary.Value(tag=tag, histo=histogram(counts)) for tag, counts in bars.items()
        ]
        self._event(summary=summary.Summary(value=values), step=step)

    def text(self, step, tag, text):
        from torch.utils.tensorboard.summary import text as summary

        self._event(summary=summary(tag,
                                    text.encode(errors="replace").decode()),
                    step=step)  # a lone surrogate has no UTF-8

    def hyperparameters(self, step, values):
        """All settings, as a table under TEXT and, in this same run, under HPARAMS."""
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in values.items()}
        self.text(step, "hyperparameters",
                  "\n".join(["|flag|value|", "|-|-|"] + [f"|{k}|{v}|" for k, v in values.items()]))
        for summary in hparams(plain, {"Loss/val": 0.0, "eval/hellaswag": 0.0}):
            self._event(summary=summary)

    def _event(self, **fields):
        event, _ = self.protos
        self.records.write(event.Event(wall_time=time.time(), **fields).SerializeToString())
        self.records.flush()  # to the file at once: TensorBoard is watched while the run goes on

    def flush(self):
        """What was logged so far survives a crash: called before a checkpoint, from which later
        steps run again."""
        sync(self.file.fileno())

    def close(self):
        if self.bar is not None:
            with self._console():
                self.bar.close()
        for file in (self.records, self.file):
            with contextlib.suppress(OSError):  # a full disk has been reported by now
                file.close()


def next_events_number(folder):
    """One more than the largest number in the names of a folder's event files; 1 for the first.

    TensorBoard reads the files in the order of their names, and a start forgets steps only in the
    files before its own. Earlier versions, like TensorBoard's writers, number them by the clock,
    which may go back or be another machine's.
    """
    names = [EVENTS.match(path.name) for path in folder.glob("events.out.tfevents.*")]
    numbers = [int(name[1].ljust(10, "0")) for name in names if name]  # names are compared as text
    return max(numbers, default=0) + 1


def quoted(texts):
    """Texts as a mail quotes them, a blank line between two."""
    return "\n\n".join(textwrap.indent(text, "> ", lambda line: True) for text in texts)


def histogram(counts):
    """The fields of TensorBoard's histogram in which the bar from i - 0.5 to i + 0.5 is counts[i].
    """
    return {
        "min": -0.5, "max": len(counts) - 0.5, "num": sum(counts),
        "sum": sum(i * n for i, n in enumerate(counts)),
        "sum_squares": sum(i * i * n for i, n in enumerate(counts)),
        "bucket_limit": [i + 0.5 for i in range(len(counts))], "bucket": counts
    }


def read_scalars(folder):
    """What a run folder's TensorBoard events hold: {tag: {step: value}}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: {event.step: event.value
              for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def without_compilation(seconds):
    """Seconds of steps -> the same, where the first, and any that takes COMPILED times the median
    of its neighbours, counts as that median."""
    typical = [
        statistics.median(seconds[max(i - 10, 1):max(i, 1)] + seconds[i + 1:i + 11] or seconds)
        for i in range(len(seconds))
    ]
    return [
        usual if i == 0 or took > COMPILED * usual else took
        for i, (took, usual) in enumerate(zip(seconds, typical))
    ]


class SpikeDetector:
    """Losses far above the median of the 50 before, judged by how far those lie apart.

    Batches of a few documents differ by nats, batches of half a million tokens by hundredths. A
    spike is SPREADS standard deviations above the median, and where losses hardly differ, at least
    `floor` nats; a floor of 0: nothing is a spike.
    """

    SPREADS = 8  # healthy runs in benchmarks/, of 2,048 to 524,288 tokens per step, stay below 6.5

    def __init__(self, floor):
        self.floor = floor
        self.losses = deque(maxlen=50)

    def __call__(self, loss):
        """A line if `loss` is a spike, else None; finite losses count for the next."""
        line = self._judge(loss)
        if math.isfinite(loss):
            self.losses.append(loss)
        return line

    def _judge(self, loss):
        if not self.floor or len(self.losses) < 10:
            return None
        median = statistics.median(self.losses)
        spread = spread_of(self.losses)
        if loss > median + max(self.SPREADS * spread, self.floor):
            return f"spike: loss {loss:.4f}, median before {median:.4f}, spread {spread:.4f}"
        return None


def spread_of(losses):
    """The standard deviation of losses around their trend, of medians, which no spike among them
    moves.

    1.4826 times the median absolute deviation is that of a normal distribution (Rousseeuw & Croux
    1993).
    """
    losses = list(losses)
    half = len(losses) // 2
    slope = (statistics.median(losses[-half:]) - statistics.median(losses[:half])) / (len(losses)
                                                                                      - half)
    residuals = [loss - slope * i for i, loss in enumerate(losses)]
    center = statistics.median(residuals)
    return 1.4826 * statistics.median(abs(residual - center) for residual in residuals)


class RecompileMonitor:
    """`with monitor("training"):` reports a compilation in the block after the first: it takes as
    long as many steps."""

    def __init__(self, say):
        self.say, self.done, self.count = say, set(), 0

    @contextlib.contextmanager
    def __call__(self, what):
        from torch._dynamo.utils import counters  # slow to import, but any optimizer imports it, too

        before = counters["stats"]["unique_graphs"]
        yield
        if counters["stats"]["unique_graphs"] > before and what in self.done:
            self.count += 1
            self.say(
                f"{what} was recompiled, {self.count} times by now: TORCH_LOGS=recompiles tells why"
            )
        self.done.add(what)


def progress(iterable, what, processes):
    """The iterable, with a bar on a terminal if it takes long; one process draws it."""
    from tqdm import tqdm

    disable = None if processes.main else True  # None: only where there is no terminal
    return tqdm(iterable, desc=what, leave=False, delay=2, disable=disable)


def serve_tensorboard(log_dir, port):
    """Serve TensorBoard from a thread of this process, so that it ends with the run. Raises
    BadInput if the port is taken."""
    from tensorboard import program

    remedy = "give another --tensorboard port, or end what uses it"
    with socket.socket() as probe:  # TensorBoard itself says it in four lines
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise BadInput(
                f"TensorBoard cannot use port {port} ({error.strerror}): {remedy}") from error
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", "--logdir", log_dir, "--port", str(port), "--bind_all"])
    try:
        board.launch()
    except program.TensorBoardServerException as error:
        raise BadInput(f"TensorBoard cannot use port {port}: {remedy}") from error
    print(f"TensorBoard at http://localhost:{port}, open to every host that reaches this port")
