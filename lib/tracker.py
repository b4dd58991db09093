"""An experiment tracker beside TensorBoard, with the same tags: trackio or wandb.

Both are optional packages with the same interface: `init` returns a run with `log` and `finish`. A
thread makes all calls, so training neither waits for a tracker nor ends because one fails.
"""

import html
import importlib
import queue
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.cli import BadInput
from lib.files import read_json, write_json
from lib.logger import Null

PROJECT = "train_gpt2"  # under which the tracker lists the runs
LIMIT = 60              # seconds to wait for the tracker at the end of a run
MOST = 100_000          # entries that may wait for the tracker


def check_installed(kind: str | None) -> None:
    """Raises BadInput if the package of a --tracker is missing."""
    if kind is None:
        return
    try:
        module = importlib.import_module(kind)
    except ImportError:
        module = None
    if not hasattr(module, "init"):  # a folder wandb/ can be imported, too
        raise BadInput(f"--tracker {kind} needs the package {kind}: `pip install {kind}`, "
                       "or leave the flag out")


def start_tracker(kind: str | None, folder: Path, first_step: int, config: dict[str, Any],
                  say: Callable[[str], Any]) -> "Tracker | Null":
    """The Tracker of a run folder; Null without --tracker.

    A run that resumes in its folder continues the tracker's run, whose id is in tracker.json.
    """
    if kind is None:
        return Null()
    path = folder / "tracker.json"
    known: Any = None
    if first_step > 0 and path.exists():
        known = read_json(path, "move it away")
    resumes = isinstance(known, dict) and kind in known
    run_id = known[kind] if resumes else uuid.uuid4().hex[:8]
    write_json(path, {kind: run_id})
    connect = {"trackio": connect_trackio, "wandb": connect_wandb}[kind]
    return Tracker(kind, lambda: connect(folder, run_id, resumes, config), say)


def connect_trackio(folder: Path, run_id: str, resumes: bool,
                    config: dict[str, Any]) -> tuple[Callable, Callable]:
    """-> (the function that logs a step, the one that ends the run)."""
    import trackio

    # trackio finds a run by its name
    run = trackio.init(project=PROJECT, name=f"{folder.name}_{run_id}", config=config,
                       resume="allow" if resumes else "never")

    def log(step, values):
        run.log(as_objects(values, trackio, trackio.Markdown), step=step)

    return log, run.finish


def connect_wandb(folder: Path, run_id: str, resumes: bool,
                  config: dict[str, Any]) -> tuple[Callable, Callable]:
    """-> (the function that logs a step, the one that ends the run)."""
    import wandb

    settings = wandb.Settings(console="off", init_timeout=30, login_timeout=30)
    run = wandb.init(project=PROJECT, name=folder.name, id=run_id, config=config, dir=str(folder),
                     resume="allow" if resumes else None, settings=settings)
    # not wandb's own step, which cannot go back: a resumed run repeats steps
    run.define_metric("*", step_metric="step")

    def preformatted(text):
        return wandb.Html(f"<pre>{html.escape(text)}</pre>")

    def log(step, values):
        run.log({"step": step, **as_objects(values, wandb, preformatted)})

    return log, run.finish


def as_objects(values: dict[str, Any], module: Any,
               as_text: Callable[[str], Any]) -> dict[str, Any]:
    """{tag: number, text, or list of a histogram's bars at 0, 1, 2, ...} with a tracker's objects
    in place of texts and histograms."""
    objects = {}
    for tag, value in values.items():
        if isinstance(value, str):
            value = as_text(value)
        elif isinstance(value, list):
            edges = [i - 0.5 for i in range(len(value) + 1)]
            value = module.Histogram(np_histogram=(value, edges))
        objects[tag] = value
    return objects


class Tracker:
    """Passes what a run logs to a tracker's thread. Its methods return at once, except `close`.

    connect: -> (log(step, values), finish()), called in that thread. The first failure is reported
    by `say`, once; whatever comes after it is dropped.
    """

    def __init__(self, kind: str, connect: Callable[[], Any], say: Callable[[str], Any]):
        self.kind = kind
        self.connect = connect
        self.say = say
        self.entries: queue.Queue = queue.Queue(MOST)
        self.failure: str | None = None
        self.is_reported = False
        self.thread = threading.Thread(target=self._work, name=kind, daemon=True)
        self.thread.start()

    def write_scalars(self, step: int, scalars: dict[str, Any]) -> None:
        """Log numbers by tag; a list becomes a histogram."""
        self._put((step, scalars))

    def write_text(self, step: int, tag: str, text: str) -> None:
        self._put((step, {tag: text}))

    def close(self) -> None:
        """Wait, at most LIMIT seconds, until everything is logged and the run is ended."""
        self._put(None)
        if self.failure is None:
            self.thread.join(LIMIT)
            if self.thread.is_alive():
                self.failure = f"it did not finish within {LIMIT} s"
        self._report()

    def _put(self, entry: Any) -> None:
        if self.failure is None:
            try:
                self.entries.put_nowait(entry)
            except queue.Full:
                self.failure = "it does not keep up"
        self._report()

    def _report(self) -> None:
        if self.failure and not self.is_reported:
            self.is_reported = True
            self.say(f"warning: no more is logged to {self.kind}: {self.failure}; "
                     "TensorBoard and log.txt have everything")

    def _work(self) -> None:
        try:
            log, finish = self.connect()
            for step, values in iter(self.entries.get, None):
                log(step, values)
            finish()
        except BaseException as error:  # wandb raises SystemExit and KeyboardInterrupt, too
            lines = str(error).splitlines() or [""]
            self.failure = f"{type(error).__name__}: {lines[0][:200].rstrip('.')}"
