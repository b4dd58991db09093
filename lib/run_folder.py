"""The folder log/<run> while its run is training: config.json, log.txt, TensorBoard, checkpoints.

Rank 0 has a `RunFolder`, the other ranks a `RunFolder.null()`. lib/resume.py picks the checkpoint
to continue from, lib/checkpoint_writer.py writes checkpoints in the background.
"""

import contextlib
import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lib import checkpoint, summary
from lib.budget import UNMEASURED, tokens_of, work_of
from lib.checkpoint_writer import CheckpointWriter
from lib.cli import BadInput, RankError
from lib.description import warnings
from lib.existing_runs import check_name, check_ours, read_config, starts
from lib.files import (
    check_appendable,
    check_room,
    locked,
    make_folder,
    read_text,
    remove_empty,
    write_json,
)
from lib.hooks import OnEnd, Sync, check_commands, without_commands
from lib.logger import PREDICTED, Logger, Null, quoted
from lib.provenance import commit, launch_id, save_code, this_command
from lib.resume import Position, Resume
from lib.rewind import rewind
from lib.spending import Spending
from lib.streams import CorpusLike
from lib.tracker import check_installed, start_tracker

# the first columns of TensorBoard's HPARAMS table
FIRST_COLUMNS = ("preset", "size", "n_layer", "n_head", "n_embd", "block_size", "total_batch_size",
                 "max_lr")


def is_finite(value: Any) -> bool:
    """Whether a result is a finite number, not texts or NaN."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def no_warnings(steps: int) -> list[str]:
    return []


class RunFolder:
    """Locks a run's folder, writes all its files, and prints to the console.

    Call `begin` before anything else and `close` at the end.
    """

    def __init__(self, cfg: Any, resume: Resume | None, corpus: CorpusLike):
        """Create the folder, or take over the folder of an interrupted run, and lock it.

        cfg: a TrainConfig. resume: a Resume or None. Raises BadInput if the folder has other
        content, or is in use.
        """
        check_installed(cfg.tracker)
        check_commands(cfg)
        name = cfg.run_name or f"{cfg.preset}_{time.strftime('%Y%m%d_%H%M%S')}"
        check_name(name)
        self.folder = Path(cfg.log_dir) / name
        self.keep = cfg.keep
        self.tokens_of = partial(tokens_of, cfg=cfg)
        self.epochs_of = corpus.most_repeated  # tokens -> (epochs, of which source)
        self.work_of = partial(work_of, cfg=cfg, costs=(1, 1, 1))
        # with --minutes, the length and its warnings are known only once steps are timed
        self.warnings = partial(warnings, cfg, corpus) if cfg.minutes else no_warnings
        self.spending = Spending(cfg, resume.state if resume else {})
        self.log: Any = Null()
        self.sync: Any = Null()
        self.on_end: Any = Null()
        self.outcome = "failed"  # for --on_end, until the run ends in another way
        self.error: str | None = None
        self.writer: Any = Null()
        self.open_locks = contextlib.ExitStack()
        self.config: dict[str, Any] = {}
        self.step: int | None = None  # of the next update
        self.step_seconds: list[float] = []  # of each training step since this start
        self.memory_gb: float | None = None  # peak on the GPU
        self.results: dict[str, Any] = {}  # latest result of each evaluation, by tag
        # step of the newest checkpoint that is written or being written
        self.saved: int | None = None
        # [validation loss, step] of the best checkpoint that is written, and of the next best one
        self.best: list | None = None
        self.candidate: list | None = None  # becomes `best` once it is written
        self.made = make_folder(self.folder, "give another --log_dir")
        try:
            self._take_over(resume.seen if resume else set())
            self.starts_over = not resume and self._has_log()
            if self.starts_over and self._is_finished():
                raise BadInput(f"{self.folder} already contains a finished run without "
                               "checkpoints: give another --run_name, or move it away")
            if cfg.on_end:
                self.on_end = OnEnd(cfg.on_end, self.folder)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def null() -> Any:
        return Null()

    def _take_over(self, seen: set[int]) -> None:
        """Lock the folder and check that it may be written to.

        seen: steps of the checkpoints that it had when the settings were read.
        """
        remedy = "end that run first, or give another --run_name"
        self.open_locks.enter_context(locked(self.folder, remedy))
        check_ours(self.folder)
        steps = {step for step, _ in checkpoint.found(self.folder)}
        if steps != seen:
            raise RankError(f"{self.folder} has just been written by another process: start again")
        for name in ("log.txt", "config.json"):
            if os.path.lexists(self.folder / name):
                check_appendable(self.folder / name, "give another --run_name")

    def _has_log(self) -> bool:
        path = self.folder / "log.txt"
        return path.exists() and path.stat().st_size > 0

    def _is_finished(self) -> bool:
        """Whether log.txt has the last step that config.json names."""
        length = read_config(self.folder).get("max_steps")
        if not isinstance(length, int):
            return False
        return re.search(rf"^{length - 1} train ", self._read_log(), re.MULTILINE) is not None

    def set_costs(self, costs: Sequence[float]) -> None:
        """Set the FLOPs per token at each of lib/budget.py's `contexts`, before `begin`."""
        self.work_of = partial(self.work_of, costs=costs)

    def begin(self, config: dict[str, Any], description: str, position: Position,
              resume: Any, like: Iterable[torch.Tensor]) -> None:
        """Rewind the folder to the first step, write config.json and open the log.

        config: settings and identity of the run, for config.json and every checkpoint. position: a
        lib.resume.Position. like: tensors with a checkpoint's shapes and dtypes, to check the disk
        space and reserve memory. Raises BadInput if the disk is too full.
        """
        step = position.step
        like = list(like)
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in like)
        check_room(self.folder, n_bytes, "a checkpoint", checkpoint.NO_ROOM)
        changed = ", ".join(resume.changed) if resume else ""
        self._set_config(config, step, resume and str(resume.path), changed)
        write_json(self.folder / "config.json", self.config)  # marks this as a run folder
        rewind(self.folder, step)
        self._open(step)
        self.say(description)
        if resume:
            what = f"changed: {changed}" if changed else "as before"
            self.say(f"resume  {resume.path}, step {step}; {what}")
        if self.starts_over:
            self.say(f"{self.folder} has no checkpoint: starting its run over")
        settings = config["train"] | config["model"] | {"parameters": config.get("parameters")}
        settings = without_commands(settings)
        first = {name: settings[name] for name in FIRST_COLUMNS}
        self.log.hyperparameters(step, first | settings)
        self.first = step
        self.step = step
        self.best = position.best
        self.saved = step if checkpoint.path_of(self.folder, step).exists() else None
        self.saved_at = time.monotonic()
        self.writer = CheckpointWriter(self.folder, self.keep)
        self.writer.reserve(like)
        if config["train"]["sync"]:
            self.sync = Sync(config["train"]["sync"], self.folder, self.say)

    def _set_config(self, config: dict[str, Any], step: int, path: str | None,
                    changed: str) -> None:
        """Set the content of config.json, and the constant entries of every checkpoint."""
        command = this_command()
        start = {
            "step": step, "from": path, "changed": changed, "command": command,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"), "launch": launch_id(), **commit()
        }
        self.config = config | {
            "command": command, "torch": torch.__version__, "starts": [*starts(self.folder), start]
        }
        self.constants = {f"{name}_config": config[name] for name in ("model", "train")}
        for name, value in config.items():
            if name not in ("model", "train"):
                self.constants[name] = value

    def _open(self, step: int) -> None:
        write_json(self.folder / "config.json", self.config)
        save_code(self.folder, step)
        train = self.config["train"]
        self.log = Logger(self.folder, self.config["max_steps"], step, train["price_per_hour"],
                          self.work_of, train["log_every"])
        settings = without_commands(train | self.config["model"])
        self.log.tracker = start_tracker(train["tracker"], self.folder, step, settings, self.say)

    # -- log --

    def recorded(self, kind: str) -> dict[int, float]:
        """{step: value} from the lines of this kind in log.txt."""
        pattern = rf"^(\d{{1,12}}) {re.escape(kind)} (\S+)$"
        lines = re.findall(pattern, self._read_log(), re.MULTILINE)
        return {int(step): float(value) for step, value in lines}

    def _read_log(self) -> str:
        return read_text(self.folder / "log.txt", "give another --run_name")

    def say(self, line: str) -> None:
        self.log.say(line)

    def log_step(self, step: int, scalars: dict[str, Any], seconds: float) -> None:
        self.step_seconds.append(seconds)
        self.memory_gb = scalars.get("perf/memory_gb")
        self.step = step + 1
        self.log.log_step(step, scalars | {"perf/dollars": self.spending.dollars}, seconds)
        if step + 1 - self.first == PREDICTED:
            warning = self.spending.foresee(step + 1, self.log.max_steps, self.log.seconds_left())
            if warning:
                self.say(warning)

    def log_evaluation(self, step: int, results: dict[str, Any]) -> None:
        self.results.update(results)
        self.log.log_evaluation(step, results)

    def limit_is_reached(self) -> bool:
        """Whether --max_hours or --max_cost ends the run now."""
        return self.spending.limit() is not None

    def set_length(self, steps: int, is_final: bool) -> None:
        """Set the number of steps that fit in --minutes; warn about it once it is final."""
        if is_final:
            for line in self.warnings(steps):
                self.say(line)
            self.warnings = no_warnings
        self.config["max_steps"] = steps  # written with the next checkpoint
        self.log.set_length(steps)

    # -- checkpoints --

    def save_is_due(self, minutes: float) -> bool:
        """Whether `minutes` (0: never) have passed since the last checkpoint."""
        return bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes

    def is_best(self, loss: float, step: int) -> bool:
        """Whether a validation loss is below the best checkpoint's.

        If so, the checkpoint of `step` becomes the best one once it is written.
        """
        self.poll(wait=True)  # the best one may still be being written
        if not loss < (self.best or [math.inf])[0]:
            return False
        self.candidate = [loss, step]
        return True

    def save(self, state: dict[str, Any], wait: bool = False) -> None:
        """Start writing a checkpoint of `state`, unless its step is saved or being saved; then only
        its weights, if it turned out to be the best.

        A checkpoint of the same step is replaced if the run has finished, or ends by --max_hours or
        --max_cost: what it spent since, such as waiting for data, would be lost.

        wait: return once it is written. Raises BadInput if it cannot be written.
        """
        if not self.folder.is_dir():  # moved or removed
            self._make_again(state["step"])
        if wait:
            self.poll(wait=True)  # if a checkpoint of this step failed, try again
        ends = state["finished"] or (wait and self.limit_is_reached())
        if state["step"] != self.saved or ends:
            self._start_saving(state)
        elif self.candidate and self.candidate[1] == self.saved and not self.writer.is_busy:
            self.writer.add_weights(self.saved, self.candidate)
        error = self.poll(wait=True) if wait else None
        if error:
            raise error

    def _start_saving(self, state: dict[str, Any]) -> None:
        self.poll(wait=True)  # the previous checkpoint
        self.log.flush()
        self.saved_at = time.monotonic()
        self.saved = state["step"]
        best = self.best
        if self.candidate and self.candidate[1] == self.saved:
            best = self.candidate
        # config.json is rewritten, as --minutes may have changed max_steps
        write_config = partial(write_json, self.folder / "config.json", dict(self.config))
        former_best = self.best[1] if self.best else None
        state = self.constants | state | {"best": best} | self.spending.state()
        self.writer.start(self.saved, state, write_config, former_best)

    def _make_again(self, step: int) -> None:
        self.poll(wait=True)
        self.log.close()
        make_folder(self.folder, "check what happened to it, and start again")
        self.open_locks.enter_context(locked(self.folder, "end that run first"))
        self._open(step)
        self.say(f"{self.folder} was moved or removed during the run: made again")
        self.saved = None
        self.best = None

    def wait_copied(self) -> None:
        """Wait until the tensors being saved are copied and may change."""
        self.writer.wait_copied()

    def poll(self, wait: bool = False) -> BadInput | None:
        """Print a line once the checkpoint in progress is written.

        Returns its error, which does not stop training, or None.
        """
        try:
            line = self.writer.collect(wait)
        except BadInput as error:
            self.saved = None
            self.say(str(error))
            return error
        if line:
            self.say(line)
            self.sync.request()
        if self.candidate and self.candidate[1] == self.saved and not self.writer.is_busy:
            self.best = self.candidate
        return None

    def give_up(self, state: dict[str, Any]) -> Path:
        """The path of the newest checkpoint, which is from before the non-finite steps; saves
        `state` if there is none."""
        self.outcome = "gave_up"
        self.poll(wait=True)
        if not checkpoint.found(self.folder):
            self.saved = None
            self.save(state, wait=True)
        return checkpoint.found(self.folder)[0][1]

    # -- end --

    def conclude(self, step: int, finished: bool) -> None:
        """Print how the run ended and what to do next."""
        self.outcome = "stopped"
        if finished:
            self.outcome = "finished"
            self._say_results(step)
        elif self.limit_is_reached():
            self.outcome = "limit"
        if self.best:
            loss, best_step = self.best
            path = checkpoint.path_of(self.folder, best_step)
            self.say(f"best    validation loss {loss:.4f}, at step {best_step}: {path}")
        spent = self.spending.summary()
        if spent:
            self.say(spent)
        train = self.config["train"]
        if self.outcome == "limit":
            self.say(f"stopped at step {step} by {self.spending.limit()}: raise it and run "
                     "the same command again to continue")
            return
        if not finished:
            self.say(summary.how_to_continue(self.folder, step, self.config["max_steps"],
                                             train["resume"]))
            return
        path = checkpoint.path_of(self.folder, self.best[1] if self.best else step)
        can_chat = bool(self.constants.get("chat_template"))
        self.say(summary.what_next(path, can_chat, train["sample_prompt"]))

    def _say_results(self, step: int) -> None:
        cost = (sum(self.step_seconds), self.tokens_of(step) - self.tokens_of(self.first))
        with contextlib.suppress(BadInput, ValueError):  # log.txt is missing or damaged
            losses = (self.recorded("train"), self.recorded("val"))
            self.say(summary.summarize(self.folder, (self.first, step), self.results, losses, cost))
        if "samples" in self.results:
            self.say(quoted(self.results["samples"]))

    def note_error(self, error: BaseException) -> None:
        """Called if the run ends in an error."""
        self.error = str(error) or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            self.outcome = "stopped"
        elif self.outcome != "gave_up":
            self.outcome = "failed"

    def close(self) -> None:
        """Also copies the last state with --sync and runs --on_end, both within time limits."""
        self.log.close()
        self._record_result()
        self.on_end.tell(self.outcome, self._end_values())  # this process may be killed from here
        self.sync.close()
        remove_empty(self.made)  # only after a failed start is the folder empty
        self.open_locks.close()
        line = self.on_end.finish()
        if line:
            self.say(line)
        if "result" in self.config:
            self.say(json.dumps({"run": str(self.folder)} | self.config["result"]))

    def _record_result(self) -> None:
        """Add the result of this start to config.json, unless it failed before its first step."""
        if self.step is None:
            return
        values = self._end_values()
        numbers = {tag: round(number, 6) for tag, number in self.results.items()
                   if is_finite(number)}
        evals = {tag.removeprefix("eval/"): number for tag, number in numbers.items()
                 if tag.startswith("eval/")}
        tokens = self.tokens_of(self.step)
        trained = tokens - self.tokens_of(self.first)  # since this start
        seconds = sum(self.step_seconds)
        second_half = self.step_seconds[len(self.step_seconds) // 2:]
        memory = self.memory_gb
        steps = values["steps"]
        self.config["result"] = {
            "outcome": self.outcome,
            "step": self.step,
            "steps": None if steps == UNMEASURED else steps,
            "parameters": self.config["parameters"]["total"],
            "tokens": tokens,
            "epochs": round(self.epochs_of(tokens)[0], 4),
            "seconds": round(3600 * self.spending.hours, 1),
            "dollars": values["dollars"],
            "tok_per_sec": round(trained / seconds) if seconds else None,
            "step_ms": round(1e3 * statistics.median(second_half), 3) if second_half else None,
            "memory_gb": None if memory is None else round(memory, 3),
            "val_loss": numbers.get("Loss/val"),
            "bits_per_byte": numbers.get("Loss/val_bpb"),
            "evals": evals,
        }
        with contextlib.suppress(OSError, BadInput):  # a full disk has been reported by now
            write_json(self.folder / "config.json", self.config)

    def _end_values(self) -> dict[str, Any]:
        """Values for the environment of --on_end, besides the outcome."""
        dollars = self.spending.dollars
        return {
            "step": self.step,
            "steps": self.config.get("max_steps"),
            "loss": self.results.get("Loss/val"),
            "hours": round(self.spending.hours, 4),
            "dollars": None if dollars is None else round(dollars, 4),
            "error": self.error,
        }


@contextlib.contextmanager
def closing(run: Any) -> Iterator[None]:
    """Close a RunFolder at the end of the block, also after an error, which it notes."""
    try:
        yield
    except BaseException as error:
        run.note_error(error)
        raise
    finally:
        run.close()
