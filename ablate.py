"""Ablations: train a list of flag changes on the same budget with several seeds, and report what
each is worth in loss, time and dollars.

    # remove each part of the recipe
    python ablate.py -- --preset speedrun --n_layer 8 --max_steps 280
    # add each available part
    python ablate.py -- --preset gpt2 --n_layer 8 --max_steps 280
    python ablate.py --changes mine.txt --price_per_hour 2 -- --preset speedrun --minutes 1
    # try every combination of some values
    python ablate.py --grid "max_lr .02 .03 .04" --grid "cooldown .4 .7" -- --preset speedrun \
        --n_layer 8 --max_steps 280

The flags of train_gpt2.py after "--" are the base. Each line of --changes is a list of flags to add
to the base, or `name: flags`; # starts a comment. A --grid is a flag and its values; a flag without
a value takes true and false. With --drop, a change that is clearly worse with the first seed is not
run with further ones. With --max_steps or --epochs, compare loss and time per step; with --minutes,
only loss, since a run with slower steps has fewer of them.

Runs go to <out>/<change>_seed<N>, one at a time on each GPU, all with the first seed before any
with the second. Run the same command again to continue: finished runs are not repeated, and
interrupted ones resume from their checkpoints. To continue on another machine, copy <out>/*.json,
the results of finished runs. --max_hours ends a command in time for a spot instance.
Differences in loss are between runs of the same seed. The table is written to <out>/ablation.md
after each run, and a plot to <out>/ablation.png at the end (needs requirements-dev.txt).
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import dataclasses
import datetime
import itertools
import math
import os
import queue
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lib import checkpoint, startup
from lib.budget import LENGTHS, length_flag
from lib.cli import BadInput, choices_of, flag, parse, path_flag, run
from lib.corpus import Corpus
from lib.devices import Processes
from lib.existing_runs import read_config
from lib.files import locked, make_folder, read_json, read_text, replace, write_json
from lib.moe import ExpertConfig
from lib.noise import interval
from lib.plan import make_plan
from lib.signals import StopSignals
from train_gpt2 import TrainConfig, check_model, settings, size_of

SCRIPT = Path(__file__).resolve().parent / "train_gpt2.py"
# flags that ablate.py sets, or that make no sense in an ablation
OURS = {
    "seed", "run_name", "log_dir", "resume", "plan", "doctor", "tensorboard", "tensorboard_host",
    "max_hours", "max_cost", "on_end", "help", "h",
}
# only the loss at the end is needed; the base may override this
QUIET = ["--hellaswag_every=0", "--sample_every=0", "--save_every=0", "--eval_every=1000000"]
# the fields of GPTConfig that default_changes leaves alone
SHAPE = {
    "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "vocab_multiple",
    *ExpertConfig.__annotations__,
}
TRAINING = {"optimizer", "schedule"}  # the fields of TrainConfig that it changes
AMOUNTS = {"dropout": (0.1,), "softcap": (15.0,)}  # the values of numeric fields that it adds
LONGEST_NAME = 150  # characters in the name of a change
LEAST_DROP = 0.01  # nats: smaller differences are never clear from one seed
# stated under the table
RULE = ("A difference is between runs of one seed. The verdict is the mean difference over the "
        "seeds ± its 95% confidence interval (Student's t, paired by seed): better or worse if "
        "the interval excludes 0, else within noise. By chance, about 1 in 20 changes without "
        "effect is called better or worse. With two seeds the interval is wide: more --seeds "
        "narrow it.")
COLUMNS = ("The base comes first, then the changes from the most helpful to the most harmful, by "
           "their mean over the seeds. Seconds are of training steps (of a resumed run at its "
           "speed since then), dollars are their price; `wall clock` has all seconds of a run, "
           "with start-up and evaluation. Means over the seeds ± half their range; memory is the "
           "peak on the GPU.")


@dataclass
class Config:
    changes: str | None = path_flag(
        None, "file of changes, one per line; without it and --grid: remove each part that the "
              "base has beyond --preset gpt2, or, if it has none, add each available part")
    grid: tuple[str, ...] | None = flag(
        None, "a flag and its values, as in \"max_lr .02 .03 .04\"; given several times, every "
              "combination is a change")
    seeds: tuple[int, ...] = flag((1337, 2), "seeds for the base and each change")
    drop: bool = flag(
        False, "no further seeds for a change that is clearly worse with the first, by the spread "
               "of the base's seeds")
    price_per_hour: float | None = flag(None, "dollars per hour of one GPU", above=0)
    max_hours: float | None = flag(
        None, "start no run that would end later than this many hours after this command's start, "
              "by the median of the finished ones; the first always starts", above=0)
    out: str = path_flag("log/ablation", "folder of the runs, the table and the plot")
    checkpoints: bool = flag(False, "keep the checkpoints of finished runs")


@dataclass
class Run:
    """One run: its flags and, once it is finished, its results. None: not measured."""
    change: str
    seed: int
    flags: list[str]
    folder: str
    finished: bool = False
    commit: str | None = None
    parameters: int = 0
    loss: float = 0.0
    bpb: float | None = None      # None also if the ids are not text
    step_ms: float | None = None  # median of the second half
    memory_gb: float | None = None
    seconds: float | None = None  # of all training steps
    total_seconds: float | None = None  # from the command to its end

    @property
    def name(self) -> str:
        return Path(self.folder).name

    @property
    def record(self) -> Path:
        """The file next to the folder that stores this object, written before the run starts."""
        return Path(f"{self.folder}.json")

    @property
    def console(self) -> Path:
        return Path(f"{self.folder}.txt")


# --------------------------------------------------------------------------------------------------
# Planning the runs


def default_changes(base: list[str]) -> dict[str, list[str]]:
    """{name: flags}, one for each part of the model (except its shape), optimizer or schedule.

    Parts that the base has beyond --preset gpt2 are removed. If there are none, every available
    part is added.
    """
    train, model, *_ = settings(base)
    parts = [(model, field) for field in dataclasses.fields(model) if field.name not in SHAPE]
    parts += [(train, field) for field in dataclasses.fields(train) if field.name in TRAINING]
    taken_out = []
    put_in = []
    for config, field in parts:
        if getattr(config, field.name) != field.default:
            taken_out.append((field.name, field.default))
        for value in choices(config, field):
            if value != field.default:
                put_in.append((field.name, value))
    changes = {}
    for name, value in taken_out or put_in:
        words = [f"--{name}", str(value)]
        if isinstance(value, bool):
            words = [f"--{name}" if value else f"--no-{name}"]
        changes["_".join(words).removeprefix("--")] = words
    return changes


def choices(config: typing.Any, field: dataclasses.Field) -> tuple:
    """The values of a field to try."""
    if isinstance(field.default, bool):
        return (True, False)
    if field.name in AMOUNTS:
        return AMOUNTS[field.name]
    return choices_of(field, typing.get_type_hints(type(config))[field.name])


def read_changes(path: str) -> dict[str, list[str]]:
    """A file of changes -> {name: flags}. Raises BadInput."""
    changes: dict[str, list[str]] = {}
    for line in read_text(path, "name a file with one change per line").splitlines():
        without_comment = line.partition("#")[0].strip()
        given, _, text = without_comment.rpartition(": ")
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise BadInput(f"{path}: {text} is not a list of flags ({error}): check its quotes"
                           ) from error
        if not words:
            continue
        name = name_of(given or " ".join(words))
        if name in ("", "base", *changes):
            raise BadInput(f"{path}: {line.strip()}: the name {name!r} is missing or already used: "
                           "give another as `name: flags`")
        changes[name] = words
    if not changes:
        raise BadInput(f"{path} has no changes: write one per line, flags or `name: flags`")
    return changes


def name_of(text: str) -> str:
    """The name of a change, as part of a folder's name."""
    return re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("_-.")


def grid_changes(grid: tuple[str, ...], base: list[str]) -> dict[str, list[str]]:
    """--grid -> {name: flags} of every combination of its values, but for the base's own.

    Raises BadInput.
    """
    values: dict[str, list[str]] = {}
    for text in grid:
        flag_name, *own = text.split() or [""]
        flag_name = flag_name.removeprefix("--")
        if not own:
            raise BadInput(f"--grid {text}: give a flag and its values in quotes, "
                           'such as --grid "max_lr .02 .03"')
        if flag_name in values or len(set(own)) < len(own):
            raise BadInput(f"--grid {text}: a flag or a value is given twice: give each once")
        values[flag_name] = own
    changes = {}
    for point in itertools.product(*values.values()):
        words = [grid_word(name, value) for name, value in zip(values, point)]
        if not is_base(base, words):
            plain = [word.removeprefix("--").replace("=", " ") for word in words]
            changes[name_of(" ".join(plain))] = words
    return changes


def grid_word(name: str, value: str) -> str:
    """A flag with its value, as one word of a command line."""
    switches = {"true": f"--{name}", "false": f"--no-{name}"}
    return switches.get(value.lower(), f"--{name}={value}")


def is_base(base: list[str], words: list[str]) -> bool:
    """Whether the base has the settings of these flags already."""
    try:
        return settings([*base, *words])[:2] == settings(base)[:2]
    except BadInput:  # check_flags names the change in the error
        return False


def shared(train: TrainConfig) -> dict[str, typing.Any]:
    """The settings that must be equal for losses to be comparable: data, validation, length."""
    return {name: getattr(train, name) for name in ("data", "val_tokens", length_flag(train))}


def check_flags(base: list[str], words: list[str]) -> str:
    """Check the base with these flags added, and return its --device.

    Raises BadInput if train_gpt2.py would reject it, or its loss is not comparable to the base's.
    """
    for name in sorted(OURS & flag_names([*base, *words])):
        remedy = " and give --seeds" if name == "seed" else ""
        raise BadInput(f"leave --{name} out{remedy}")
    settings(words)  # without the base: after it, a stray word could become one more --data
    base_train = settings([*QUIET, *base]).train
    changed = settings([*QUIET, *base, *words])
    train, model, explicit, *_ = changed
    for name, value in shared(base_train).items():
        if shared(train).get(name) != value:
            raise BadInput(f"--{name} must be the same as the base's, or losses do not compare: "
                           "run two commands with different --out")
    if changed.auto:
        raise BadInput("--size auto and --dollars choose for each run: give --depth and --minutes")
    if train.tokens_per_param:
        raise BadInput("--tokens_per_param sets a different length for each change: give "
                       "--max_steps or --minutes")
    check_model(model)
    if not (explicit & set(LENGTHS) or train.max_steps):
        raise BadInput("the base has no length: give --max_steps or --minutes")
    if not train.eval_every:
        raise BadInput("--eval_every 0 measures no loss: leave it out")
    corpus = Corpus(train)
    make_plan(changed, corpus, size_of(model, corpus), world_size=1)
    return train.device


def flag_names(words: list[str]) -> set[str]:
    """The names of the flags among words of a command line."""
    return {word.partition("=")[0].lstrip("-") for word in words if word.startswith("-")}


def plan(cfg: Config, base: list[str]) -> tuple[list[Run], set[str]]:
    """-> (all runs, seed by seed and the base's first; their values of --device). Checks every run
    before any starts. Raises BadInput."""
    for seed in cfg.seeds:
        settings([f"--seed={seed}"])
    if cfg.drop and len(set(cfg.seeds)) == 1:
        raise BadInput("--drop needs the spread of several seeds: give more --seeds")
    flags = {}
    devices = set()
    for change, words in {"base": [], **find_changes(cfg, base)}.items():
        try:
            devices.add(check_flags(base, words))
            if len(change) > LONGEST_NAME:
                raise BadInput("too long for a folder name: give a short one as `name: flags`")
        except BadInput as error:
            raise BadInput(f"{change[:60]}: {error}") from error
        flags[change] = [*base, *words]
    runs = []
    for seed in dict.fromkeys(cfg.seeds):
        for change, words in flags.items():
            folder = str(Path(cfg.out, f"{change}_seed{seed}"))
            runs.append(with_record(Run(change, seed, words, folder)))
    return runs, devices


def find_changes(cfg: Config, base: list[str]) -> dict[str, list[str]]:
    """{name: flags} of all changes to try. Raises BadInput."""
    if not cfg.changes and not cfg.grid:
        return default_changes(base)
    changes = read_changes(cfg.changes) if cfg.changes else {}
    combinations = grid_changes(cfg.grid, base) if cfg.grid else {}
    for name in sorted(changes.keys() & combinations.keys()):
        raise BadInput(f"--changes and --grid both hold {name}: leave one out")
    return changes | combinations


def with_record(one: Run) -> Run:
    """The run with its results from an earlier command, if any. Raises BadInput if its folder
    belongs to another run."""
    if not one.record.exists():
        if Path(one.folder).exists():
            raise BadInput(f"{one.folder} was not started by ablate.py: give another --out")
        return one
    kept = read_json(one.record, "give another --out")
    if not kept.keys() <= vars(one).keys() or kept.get("flags") != one.flags:
        raise BadInput(f"{one.folder} is a run with other flags, "
                       f"{shlex.join(kept.get('flags', []))}: give another --out")
    return Run(**kept | {"folder": one.folder})


# --------------------------------------------------------------------------------------------------
# Running


def slots(devices: set[str]) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each run that can be active at the same time; [None]: one run, with
    the variable unchanged."""
    if not devices <= {"auto", "cuda"}:
        return [None]
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    return [*names[:count]] or [None]


def train(one: Run, gpu: str | None, cfg: Config, children: list) -> str | None:
    """Train a run on this GPU, or only read its result if it has ended already. Returns None, or
    the reason why it did not finish."""
    write_json(one.record, vars(one))
    if not read_result(one):
        remove_unusable(one)
        error = launch(one, gpu, children)
        if error:
            return error
    if not cfg.checkpoints:
        for _, path in checkpoint.found(one.folder) + checkpoint.found(one.folder, "weights"):
            path.unlink()
    return None


def launch(one: Run, gpu: str | None, children: list) -> str | None:
    """Start train_gpt2.py and wait for it, with its output in <folder>.txt; read its result.
    Returns None, or the reason why it did not finish."""
    env = dict(os.environ)
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    place = [f"--log_dir={Path(one.folder).parent}", f"--run_name={one.name}"]
    command = [sys.executable, str(SCRIPT), *QUIET, *one.flags, f"--seed={one.seed}", *place]
    with open(one.console, "a") as file:
        # in its own session, so that signals only reach it through run_all
        child = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT,
                                 start_new_session=True)
        children.append(child)
        code = child.wait()
    if code < 0:
        return f"ended by signal {-code}, see the end of {one.console}"
    if code:
        lines = one.console.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"
    if not read_result(one):
        return "stopped before its last step"
    return None


def remove_unusable(one: Run) -> None:
    """Remove the folder of a run that was killed after its last step but before its result was
    written: train_gpt2.py does not continue it. Raises BadInput if it is still in training."""
    folder = Path(one.folder)
    if not folder.exists():
        return
    with locked(folder, "end that run first"):
        config = read_config(folder)
        saved = [step for step, _ in checkpoint.found(folder)]
        is_over = config.get("max_steps") in saved
        if "result" not in config and (is_over or not saved):
            shutil.rmtree(folder)


def read_result(one: Run) -> bool:
    """Fill in and save the results of a finished run. False if it did not finish."""
    config = read_config(Path(one.folder))
    result = config.get("result") or {}
    if result.get("outcome") != "finished":
        return False
    one.parameters = result["parameters"]
    one.loss = math.nan if result["val_loss"] is None else result["val_loss"]
    one.bpb = result["bits_per_byte"]
    one.step_ms = result.get("step_ms")
    one.memory_gb = result.get("memory_gb")
    if result["tok_per_sec"]:  # of the last start
        one.seconds = result["tokens"] / result["tok_per_sec"]
    one.total_seconds = result["seconds"]
    one.commit = config["starts"][-1].get("commit")
    one.finished = True
    write_json(one.record, vars(one))
    return True


def has_time(runs: list[Run], deadline: float) -> bool:
    """Whether a run started now ends before the deadline, judged by the median of the finished
    runs; true if there is none. deadline: of time.monotonic."""
    took = [one.total_seconds for one in runs if one.finished and one.total_seconds]
    if not took:
        return time.monotonic() < deadline
    return time.monotonic() + statistics.median(took) < deadline


def time_left(ended: int, total: int, seconds: float) -> str:
    """The number of remaining runs and their time, as text, after `ended` runs took `seconds`."""
    left = total - ended
    if not left:
        return "the last one"
    eta = datetime.timedelta(seconds=round(seconds / ended * left))
    return f"{left} to go, ETA {eta}"


def stages(runs: list[Run], cfg: Config, todo: list[Run]) -> Iterator[list[Run]]:
    """Split the runs in `todo` into those that may run in any order, one list after another.

    With --drop, the second list is made once the first has finished, and the runs that it leaves
    out are removed from `todo`.
    """
    if not cfg.drop:
        yield list(todo)
        return
    first = [one for one in todo if one.change == "base" or one.seed == cfg.seeds[0]]
    yield first
    losers = dropped(runs, cfg)
    for change in losers:
        print(f"{change}: dropped, clearly worse with seed {cfg.seeds[0]}", flush=True)
    for one in list(todo):
        if one.change in losers and not one.finished:
            todo.remove(one)
    yield [one for one in todo if one not in first]


def run_all(runs: list[Run], devices: set[str], cfg: Config, processes: Processes,
            save: Callable[[], typing.Any]) -> None:
    """Train all unfinished runs, one at a time on each GPU. Raises BadInput if some fail.

    save: called after each run; if it fails, that is only printed.
    """
    deadline = startup.take_start() + 3600 * (cfg.max_hours or math.inf)
    free: queue.SimpleQueue = queue.SimpleQueue()
    for gpu in slots(devices):
        free.put(gpu)
    at_once = free.qsize()
    todo = [one for one in runs if not one.finished]
    ended: list[Run] = []
    left_out: list[Run] = []
    failed: list[str] = []
    children: list[subprocess.Popen] = []
    started = time.monotonic()

    def work(one):
        gpu = free.get()
        try:
            if not has_time(runs, deadline):
                left_out.append(one)
                return
            error = train(one, gpu, cfg, children)
        except (OSError, BadInput) as raised:
            error = str(raised)
        finally:
            free.put(gpu)
        ended.append(one)
        result = error or f"val loss {one.loss:.4f}, {with_spread([one.seconds])} s of steps"
        eta = time_left(len(ended), len(todo), time.monotonic() - started)
        print(f"{one.name}: {result}; {eta}", flush=True)
        if error:
            failed.append(f"{one.name}: {error}")
        try:
            save()
        except (OSError, BadInput) as raised:
            print(f"warning: the table is not written ({raised})", flush=True)

    print(f"{len(todo)} of {len(runs)} runs to go, {at_once} at a time; their output is in "
          f"{cfg.out}/*.txt", flush=True)
    signals = StopSignals(lambda line: print(line, flush=True), processes)
    with signals as stop, ThreadPoolExecutor(at_once) as pool:
        for stage in stages(runs, cfg, todo):
            futures = [pool.submit(work, one) for one in stage]
            while not all(future.done() for future in futures):
                if stop.requested:
                    pool.shutdown(wait=False, cancel_futures=True)
                    # once per child: it saves and exits; a second signal would stop it
                    # without saving
                    while children:
                        children.pop().terminate()
                time.sleep(0.1)
            if stop.requested:
                raise KeyboardInterrupt("stopped: run the same command again to continue")
            for future in futures:
                future.result()  # raises unexpected errors
    if left_out:
        names = ", ".join(one.name for one in left_out)
        print(f"--max_hours {cfg.max_hours:g} left no time for {len(left_out)} of {len(runs)} "
              f"runs: {names}. Run the same command again to continue")
    if failed:
        raise BadInput(f"{len(failed)} of {len(runs)} runs failed, {failed[0]} Fix it and run the "
                       "same command again, or leave that change out")


# --------------------------------------------------------------------------------------------------
# Results


def differences(runs: list[Run]) -> dict[str, dict[int, float]]:
    """{change: {seed: its loss minus the base's of the same seed}} of all finished runs, including
    the base's own."""
    base = {one.seed: one.loss for one in runs if one.change == "base" and one.finished}
    found: dict[str, dict[int, float]] = {}
    for one in runs:
        if one.finished and one.seed in base:
            found.setdefault(one.change, {})[one.seed] = one.loss - base[one.seed]
    return found


def verdict(differences: list[float]) -> str:
    """What the differences in loss from the base, one per seed, say about a change; empty for a
    single seed."""
    if len(differences) == 1:
        return ""
    if not all(map(math.isfinite, differences)):
        return "not finite"
    mean, margin = interval(differences)
    word = "within noise"
    if abs(mean) > margin:
        word = "worse" if mean > 0 else "better"
    return f"{word}: {mean:+.4f} ± {margin:.4f}"


def drop_limit(runs: list[Run]) -> float | None:
    """The difference in loss from the base, in nats, above which --drop drops a change.

    With 97.5% confidence (Student's t), it is more than two of the base's seeds differ by. None
    until all of these have finished.
    """
    base = [one for one in runs if one.change == "base"]
    losses = [one.loss for one in base]
    if not all(one.finished for one in base) or not all(map(math.isfinite, losses)):
        return None
    _, margin = interval(losses)
    between_two = math.sqrt(2 * len(losses))  # interval is of the mean of all
    return max(margin * between_two, LEAST_DROP)


def dropped(runs: list[Run], cfg: Config) -> list[str]:
    """The changes that --drop gives no further seeds."""
    limit = drop_limit(runs) if cfg.drop else None
    if limit is None:
        return []
    unfinished = {one.change for one in runs if not one.finished}
    losers = []
    for change, by_seed in differences(runs).items():
        first = by_seed.get(cfg.seeds[0], 0.0)
        if change in unfinished and not first <= limit:  # also if it is not a number
            losers.append(change)
    return losers


def mean_difference(by_seed: Iterable[float]) -> float:
    """The mean over the seeds; infinite if one is not a number."""
    mean = statistics.mean(by_seed)
    return math.inf if math.isnan(mean) else mean


def with_spread(values: list[float | None]) -> str:
    """The mean of a figure over the seeds and, for several, half their range."""
    known = [value for value in values if value is not None]
    if not known:
        return "n/a"
    mean = f"{statistics.mean(known):.1f}"
    if len(known) == 1:
        return mean
    return f"{mean} ± {(max(known) - min(known)) / 2:.1f}"


def markdown(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(runs: list[Run], cfg: Config) -> str:
    """A Markdown table of all finished runs: the base, then changes from the best on."""
    worth = differences(runs)
    groups: dict[str, list[Run]] = {change: [] for change in worth}
    for one in runs:
        if one.finished and one.seed in worth.get(one.change, ()):
            groups[one.change].append(one)
    base = groups["base"]
    names = ["change", "parameters", "val loss, by seed", "bits per byte", "difference in loss",
             "verdict", "ms per step", "memory, GB", "seconds", "wall clock"]
    if cfg.price_per_hour:
        names.append("dollars")
    lines = [markdown(names), f"|---|{'---:|' * (len(names) - 1)}"]
    changes = [change for change in groups if change != "base"]
    changes.sort(key=lambda change: mean_difference(worth[change].values()))
    losers = dropped(runs, cfg)
    for change in ["base", *changes]:
        judged = ""
        if change in losers:
            judged = "worse, dropped"
        elif change != "base":
            judged = verdict([*worth[change].values()])
        cells = row(groups[change], base, judged, cfg.price_per_hour)
        lines.append(markdown([change, *cells]))
    losses = [one.loss for one in base]
    note = "One seed proves little, so there is no verdict: give more --seeds."
    if len(losses) > 1:
        note = f"The base's seeds differ by {max(losses) - min(losses):.4f}. {RULE}"
    lines += ["", note]
    lines.append(COLUMNS)
    if losers:
        lines.append(f"Dropped changes were not run with all seeds: with seed {cfg.seeds[0]} their "
                     f"loss was more than {drop_limit(runs):.4f} above the base's, which the "
                     "spread of the base's seeds does not explain.")
    commits = {one.commit for group in groups.values() for one in group}
    if len(commits) > 1:
        lines.append(f"These are runs of {len(commits)} commits: differences include code changes.")
    return "\n".join(lines)


def row(group: list[Run], base: list[Run], judged: str, price: float | None) -> list[str]:
    """The cells of one change: its runs, compared with the base's of the same seeds. judged: its
    verdict."""
    loss_of_base = {one.seed: one.loss for one in base}
    losses = ", ".join(f"{one.seed}: {one.loss:.4f}" for one in group)
    ms = with_spread([one.step_ms for one in group])
    step_ms = mean_of(group, "step_ms")
    step_ms_of_base = mean_of(base, "step_ms")
    apart = ""
    if group is not base:
        apart = ", ".join(f"{one.loss - loss_of_base[one.seed]:+.4f}" for one in group)
        if step_ms and step_ms_of_base:
            ms += f" ({step_ms / step_ms_of_base - 1:+.1%})"
    cells = [
        f"{group[0].parameters / 1e6:.1f}M",
        losses,
        with_digits(mean_of(group, "bpb"), 4),
        apart,
        judged,
        ms,
        with_digits(mean_of(group, "memory_gb"), 1),
        with_spread([one.seconds for one in group]),
        with_spread([one.total_seconds for one in group]),
    ]
    if price:
        seconds = mean_of(group, "seconds")
        dollars = None if seconds is None else seconds / 3600 * price
        cells.append(with_digits(dollars, 4))
    return cells


def with_digits(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def mean_of(group: list[Run], name: str) -> float | None:
    """The mean of a field over the runs; None if it is unknown for one."""
    values = [getattr(one, name) for one in group]
    return None if None in values else statistics.mean(values)


def plot(runs: list[Run], path: Path) -> None:
    """Draw each change's difference in loss, with one dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    worth = {change: list(by_seed.values()) for change, by_seed in differences(runs).items()}
    del worth["base"]
    # upwards: the best is on top, as in the table
    order = sorted(worth, key=lambda change: mean_difference(worth[change]), reverse=True)
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.35 * len(order)))
    means = [statistics.mean(worth[change]) for change in order]
    axes.barh(order, means, color="C0", alpha=0.4)
    for change in order:
        axes.plot(worth[change], [change] * len(worth[change]), "o", color="C0", ms=4)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xscale("symlog", linthresh=0.01)  # keeps the others visible if one diverges
    axes.set(xlabel="val loss minus the base's, nats per token; one dot per seed")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_table(runs: list[Run], cfg: Config, argv: list[str]) -> str:
    """Save a table of all finished runs -> the table, empty without a finished base."""
    if not differences(runs):
        return ""
    text = table(runs, cfg)
    command = shlex.join(["python", "ablate.py", *argv])
    content = f"`{command}`\n\n{text}\n"
    replace(Path(cfg.out, "ablation.md"), lambda file: file.write(content.encode()))
    return text


def report(runs: list[Run], cfg: Config, argv: list[str]) -> None:
    """Print and save the table, and save the plot."""
    text = save_table(runs, cfg, argv)
    if not text:
        return
    print(f"\n{text}", flush=True)
    try:
        plot(runs, Path(cfg.out, "ablation.png"))
    except ImportError:
        print("no plot: for matplotlib, `pip install -r requirements-dev.txt`")


def main(argv: list[str]) -> None:
    if "--" not in argv and not {"-h", "--help"} & set(argv):
        raise BadInput('the base, flags of train_gpt2.py, goes after "--": give at least --preset '
                       "and a length")
    end = argv.index("--") if "--" in argv else len(argv)
    base = argv[end + 1:]
    (cfg,), _ = parse((Config,), argv[:end], __doc__)
    processes = Processes("cpu")
    if processes.distributed:
        raise BadInput("ablate.py already uses all GPUs: start it without torchrun")
    runs, devices = plan(cfg, base)
    for name in ("ablation.md", "ablation.png"):
        path = Path(cfg.out, name)
        if path.is_dir():
            raise BadInput(f"{path} is a folder: name another --out")
    make_folder(cfg.out, "name another --out")
    with locked(cfg.out, "end that ablate.py first, or name another --out"):
        try:
            run_all(runs, devices, cfg, processes, save=lambda: save_table(runs, cfg, argv))
        finally:
            report(runs, cfg, argv)


if __name__ == "__main__":
    run(main)
