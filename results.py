"""The results of all runs under log/ in one table, the best loss first.

    python results.py                          # of all runs under log/, also those of ablate.py
    python results.py --sort seconds           # or dollars, parameters, tokens, name, ...
    python results.py --price_per_hour 2       # dollars of runs that had no price
    python results.py --json | jq '.[0]'

A run's line has the settings that differ from its preset's. Seconds and dollars include start-up
and evaluations, over all starts. Losses compare only among runs on the same training data and
validation tokens: `gap` is the distance to the lowest of them, and `=` marks a gap within the noise
of seeds, which is printed below the table.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lib.budget import LENGTHS, tokens_of
from lib.cli import BadInput, flag, note, parse, path_flag, resolve, run
from lib.existing_runs import has_foreign_config, read_config
from lib.files import read_text
from lib.hooks import COMMANDS
from lib.noise import noise_of
from lib.resume import START_FLAGS
from train_gpt2 import PRESETS, GPTConfig, TrainConfig

# settings that do not change what a run learns, or that others repeat
UNSHOWN = {
    "preset", "config", "size", "plan", "doctor", "tok_per_sec", "price_per_hour", "max_hours",
    "max_cost", "device", "micro_batch", "log_every", "save_every", "save_minutes", "keep",
    "eval_every", "hellaswag_every", "hellaswag_file", "eval_tasks_every", "sample_every",
    "sample_prompt", *START_FLAGS, *COMMANDS,
}
# The largest difference in loss of two seeds, nats (benchmarks/race_h100_202611.md,
# benchmarks/embedding_rate_202611.md): the noise where no two runs differ only in their seed
MEASURED = {"speedrun": 0.008}
MEASURED_ELSE = 0.06
TASKS = {"hella": "hellaswag"}  # log.txt's name -> that of a result
COLUMNS = ("name", "parameters", "tokens", "seconds", "dollars", "val_loss", "gap", "bits_per_byte",
           "evals", "changes")


@dataclass
class Config:
    log_dir: str = path_flag("log", "folder of the runs, searched with its subfolders")
    sort: Literal[
        "val_loss", "bits_per_byte", "seconds", "dollars", "tokens", "parameters", "name", "time"
    ] = flag("val_loss", "column to sort by, the lowest first")
    price_per_hour: float | None = flag(
        None, "dollars per hour of the machine, for runs without a price", above=0)
    json: bool = flag(False, "print a list of JSON objects instead of a table")


@dataclass
class Result:
    """One run. None: unknown, such as the seconds of a run that was killed."""
    name: str
    time: str | None     # of its first start
    outcome: str | None  # None: it is in progress, was killed, or is of an earlier version
    preset: str
    changes: dict[str, Any]
    seed: int | None
    parameters: int | None
    tokens: int
    seconds: float | None
    dollars: float | None
    tok_per_sec: float | None  # in training steps, on all processes
    step_ms: float | None      # median of the second half of the last start's steps
    memory_gb: float | None    # peak on the GPU
    epochs: float | None       # over the source that is repeated most
    val_loss: float | None
    bits_per_byte: float | None
    evals: dict[str, float]
    device: str | None
    processes: int | None
    flops_per_token: int | None
    data: Any = field(repr=False)    # losses compare between runs of equal `data`
    gap: float | None = None         # nats above the lowest loss
    noise: float | None = None       # a smaller gap says nothing
    differs: bool | None = None      # whether the gap is beyond the noise


# --------------------------------------------------------------------------------------------------
# Reading run folders


def read_results(log_dir: str, price_per_hour: float | None) -> list[Result]:
    """The Result of every run folder below `log_dir`; a note on each damaged one. Raises BadInput
    if there is none."""
    found = []
    for path in sorted(Path(log_dir).glob("**/config.json")):
        if has_foreign_config(path.parent):
            continue
        try:
            result = read_result(path.parent, log_dir)
        except (BadInput, LookupError, TypeError, ValueError, AttributeError):
            note(f"{path} is damaged: left out")
            continue
        if result.dollars is None and price_per_hour and result.seconds:
            result.dollars = round(result.seconds / 3600 * price_per_hour, 4)
        found.append(result)
    if not found:
        raise BadInput(f"{log_dir} contains no run: name another --log_dir")
    return found


def read_result(folder: Path, log_dir: str) -> Result:
    """The Result of a run folder. Raises one of several errors if its config.json is damaged.

    The result that config.json has once the run has ended; else the last lines of log.txt.
    """
    config = read_config(folder)
    train = config["train"]
    ended = config.get("result")
    if not ended:
        ended = from_log(folder, train)
    starts = config.get("starts") or [{}]
    return Result(
        name=str(folder.relative_to(log_dir)),
        time=starts[0].get("time"),
        outcome=ended.get("outcome"),
        preset=train["preset"],
        changes=changes(train | config["model"]),
        seed=train.get("seed"),
        parameters=config.get("parameters", {}).get("total"),
        tokens=ended["tokens"],
        seconds=ended.get("seconds"),
        dollars=ended.get("dollars"),
        tok_per_sec=ended.get("tok_per_sec"),
        step_ms=ended.get("step_ms"),
        memory_gb=ended.get("memory_gb"),
        epochs=ended.get("epochs"),
        val_loss=ended.get("val_loss"),
        bits_per_byte=ended.get("bits_per_byte"),
        evals=ended["evals"],
        device=train.get("device_name"),
        processes=train.get("processes"),
        flops_per_token=train.get("flops_per_token"),
        data=[config.get("data"), train.get("val_tokens")],
    )


def from_log(folder: Path, train: dict[str, Any]) -> dict[str, Any]:
    """What log.txt says of a run that has not ended."""
    last = {}
    try:
        lines = read_text(folder / "log.txt", "").splitlines()
    except BadInput:  # there is none
        lines = []
    for line in lines:
        step, kind, value = [*line.split(), "", ""][:3]
        try:
            number = float(value)
            if kind == "train" or math.isfinite(number):
                last[TASKS.get(kind, kind)] = (int(step), number)
        except ValueError:  # a torn line
            continue
    trained, _ = last.pop("train", (-1, math.nan))
    _, loss = last.pop("val", (0, None))
    cfg = resolve(TrainConfig(), {name: train[name] for name in ("total_batch_size", "batch_warmup")
                                  if name in train})
    evals = {kind.removeprefix("eval/"): value for kind, (_, value) in last.items()}
    return {"tokens": tokens_of(trained + 1, cfg), "val_loss": loss, "evals": evals}


def changes(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that differ from its preset's."""
    preset = settings["preset"]
    if "checkpoint" in settings:  # of posttrain.py, which has no presets
        return {name: settings.get(name) for name in ("checkpoint", "data", "epochs", "max_lr")}
    usual: dict[str, Any] = {}
    for cls in (TrainConfig, GPTConfig):
        usual |= asdict(resolve(cls(), PRESETS.get(preset, {})))
    found = {}
    for name in flags_of(TrainConfig) + flags_of(GPTConfig):
        value = settings.get(name, usual[name])
        value = tuple(value) if isinstance(value, list) else value
        dropped = name in LENGTHS and value is None  # the preset's length
        if value != usual[name] and name not in UNSHOWN and not dropped:
            found[name] = value
    return found


def flags_of(cls: type) -> list[str]:
    return [setting.name for setting in fields(cls) if setting.metadata.get("help")]


# --------------------------------------------------------------------------------------------------
# Comparing


def compare(results: list[Result]) -> dict[str, str]:
    """Set gap, noise and differs -> {preset: a line about its noise}."""
    noise = {}
    lines = {}
    for preset in dict.fromkeys(result.preset for result in results):
        same = [result for result in results if result.preset == preset]
        groups = seeds_of(same)
        found = noise_of(groups)
        runs = sum(len(losses) for losses in groups if len(losses) > 1)
        how = f"from the standard deviation of {runs} runs that differ only in --seed"
        if found is None:
            found = MEASURED.get(preset, MEASURED_ELSE)
            how = ("the largest difference between two seeds in benchmarks/, as no run here has a "
                   "second seed")
        noise[preset] = found
        lines[preset] = f"{preset}: gaps up to {found:.4f} nats (marked =) may be noise: {how}"
    for result in results:
        if result.val_loss is None:
            continue
        lowest, preset = min((other.val_loss, other.preset) for other in results
                             if other.val_loss is not None and other.data == result.data)
        result.gap = round(result.val_loss - lowest, 6)
        result.noise = max(noise[result.preset], noise[preset])
        result.differs = result.gap > result.noise
    return lines


def seeds_of(results: Iterable[Result]) -> list[list[float]]:
    """The losses of finished runs, one list per setting with one loss per seed."""
    groups: dict[str, dict] = {}
    for result in results:
        if result.val_loss is None or result.outcome not in ("finished", None):
            continue
        settings = {name: value for name, value in result.changes.items() if name != "seed"}
        key = json.dumps([settings, result.data, result.parameters], sort_keys=True)
        groups.setdefault(key, {})[result.seed] = result.val_loss
    return [list(losses.values()) for losses in groups.values()]


# --------------------------------------------------------------------------------------------------
# Printing


def table(results: list[Result]) -> str:
    rows = [[column.replace("_", " ") for column in COLUMNS]]
    rows += [cells(result) for result in results]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:-2], widths[1:-2])]
        padded += [row[-2].ljust(widths[-2]), row[-1]]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def cells(result: Result) -> list[str]:
    """The cells of COLUMNS."""
    name = result.name
    if result.outcome != "finished":
        name += f" ({result.outcome or 'no result'})"
    gap = number(result.gap, ".4f")
    if result.differs is False:
        gap = f"= {gap}"
    words = [f"{key}={show(value)}" for key, value in result.changes.items()]
    return [
        name,
        number(result.parameters, ",d"),
        number(result.tokens, ",d"),
        number(result.seconds, ",.0f"),
        number(result.dollars, ".4f"),
        number(result.val_loss, ".4f"),
        gap,
        number(result.bits_per_byte, ".4f"),
        " ".join(f"{task}={value:.4f}" for task, value in result.evals.items()),
        " ".join([result.preset, *words]),
    ]


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(show, value))
    if isinstance(value, float):  # a rate times a factor has 17 digits
        return f"{value:g}"
    return str(value)


def main(argv: list[str]) -> None:
    (cfg,), _ = parse((Config,), argv, __doc__)
    results = read_results(cfg.log_dir, cfg.price_per_hour)
    noise = compare(results)

    def key(result):
        value = getattr(result, cfg.sort)
        return (value is None, value if value is not None else 0)

    results.sort(key=key)
    if cfg.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
        return
    print(table(results))
    print()
    for line in noise.values():
        print(line)


if __name__ == "__main__":
    run(main)
