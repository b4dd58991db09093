"""What each change is worth: a list of flag changes, each trained at one budget with several seeds,
priced in loss and dollars.

    python ablate.py -- --preset speedrun --n_layer 8 --max_steps 280    # each part of the recipe, taken out
    python ablate.py -- --preset gpt2 --n_layer 8 --max_steps 280        # each part there is, put in
    python ablate.py --changes mine.txt --price_per_hour 2 -- --preset speedrun --minutes 1

Behind "--" stand flags of train_gpt2.py: the base. A line of --changes is flags that are added to
the base's, or `name: flags`; # begins a comment. With --max_steps a change is judged by its loss
and its time per step; with --minutes by its loss alone, as slower steps are then fewer.

Runs go to <out>/<change>_seed<N>, one at a time on every GPU at hand. The same command again goes
on: what is finished is not run again, and a run that was interrupted goes on from its checkpoint.
Differences in loss are between runs of one seed. The table also goes to <out>/ablation.md, a
picture to <out>/ablation.png (needs requirements-dev.txt).
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import dataclasses
import datetime
import os
import queue
import re
import shlex
import statistics
import subprocess
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lib import checkpoint
from lib.budget import LENGTHS, length_flag
from lib.cli import BadInput, choices_of, flag, parse, path_flag, run
from lib.corpus import Corpus
from lib.devices import Processes
from lib.files import locked, make_folder, read_json, read_text, replace, write_json
from lib.logger import read_scalars, without_compilation
from lib.moe import ExpertConfig
from lib.plan import make_plan
from lib.signals import StopSignals
from train_gpt2 import check_model, settings, size_of

SCRIPT = Path(__file__).resolve().parent / "train_gpt2.py"
OURS = {"seed", "run_name", "log_dir", "resume", "plan", "tensorboard", "help",
        "h"}  # flags that are set here, or have no use
# a loss at the end is all that is asked for; the base may say otherwise
QUIET = [f"--{name}=0"
         for name in ("hellaswag_every", "sample_every", "save_every")] + ["--eval_every=1000000"]
SHAPE = {
    "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "vocab_multiple",
    *ExpertConfig.__annotations__
}
TRAINING = {"optimizer", "schedule"}  # parts that are not the model's
AMOUNTS = {"dropout": (0.1,), "softcap": (15.0,)}  # of parts that are numbers, put in


@dataclass
class Config:
    changes: str | None = path_flag(
        None, "file of changes, one per line; without it, each part that the base has and "
              "--preset gpt2 has not is taken out, or, where there is none, each part is put in")
    seeds: tuple[int, ...] = flag((1337, 2), "seeds of each change, and of the base")
    price_per_hour: float | None = flag(None, "dollars per hour of one GPU", above=0)
    out: str = path_flag("log/ablation", "folder of the runs, the table and the picture")
    checkpoints: bool = flag(False, "keep the checkpoints of finished runs")


@dataclass
class Run:
    """One run: what is trained, and once it is finished, what came of it. seconds: of all its
    steps."""
    change: str
    seed: int
    flags: list[str]
    folder: str
    finished: bool = False
    commit: str | None = None
    parameters: int = 0
    loss: float = 0.0
    bpb: float = 0.0
    step_ms: float = 0.0
    seconds: float = 0.0


# ----------------------------------------------------------------------------------------------------------------------
# What is run


def default_changes(base):
    """{name: flags}, one part of model, optimizer or schedule each, the model's shape apart.

    Taken out: what the base has and --preset gpt2 has not. For a base without any, put in: every
    other choice.
    """
    train, model, *_ = settings(base)
    parts = [(model, field) for field in dataclasses.fields(model) if field.name not in SHAPE]
    parts += [(train, field) for field in dataclasses.fields(train) if field.name in TRAINING]
    taken_out, put_in = [], []
    for config, field in parts:
        if getattr(config, field.name) != field.default:
            taken_out.append((field.name, field.default))
        put_in += [(field.name, value)
                   for value in choices(config, field)
                   if value != field.default]
    changes = {}
    for name, value in taken_out or put_in:
        words = [f"--{name}", str(value)]
        if isinstance(value, bool):
            words = [f"--{name}" if value else f"--no-{name}"]
        changes["_".join(words).removeprefix("--")] = words
    return changes


def choices(config, field):
    """The values of a part that are worth a run."""
    if isinstance(field.default, bool):
        return (True, False)
    if field.name in AMOUNTS:
        return AMOUNTS[field.name]
    return choices_of(field, typing.get_type_hints(type(config))[field.name])


def read_changes(path):
    """A file of changes -> {name: flags}."""
    changes = {}
    for line in read_text(path, "name a file with one change per line").splitlines():
        name, _, text = line.partition("#")[0].strip().rpartition(": ")
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise BadInput(
                f"{path}: {text} is not a list of flags ({error}): close its quotes") from error
        if words:
            name = re.sub(r"[^\w.-]+", "_", name or " ".join(words), flags=re.ASCII).strip("_-.")
            if name in ("", "base", *changes):
                raise BadInput(
                    f"{path}: {line.strip()}: {name!r} is no name of its own: give it one, `name: flags`"
                )
            changes[name] = words
    if not changes:
        raise BadInput(f"{path} holds no change: write one per line, flags or `name: flags`")
    return changes


def shared(train):
    """What all runs must have in common, or their losses do not compare, {name: value}: data,
    validation, length."""
    return {name: getattr(train, name) for name in ("data", "val_tokens", length_flag(train))}


def check_flags(base, words):
    """-> the --device of the base with these flags added. Raises BadInput if train_gpt2.py cannot
    run that, or its loss would not compare with the base's."""
    named = {word.partition("=")[0].lstrip("-") for word in [*base, *words] if word.startswith("-")}
    if taken := sorted(OURS & named):
        raise BadInput(f"leave --{taken[0]} out"
                       + (" and give --seeds" if taken[0] == "seed" else ""))
    settings(words)  # alone: a stray word would be taken for one more --data
    whole = settings([*QUIET, *base]).train
    changed = settings([*QUIET, *base, *words])
    train, model, explicit, *_ = changed
    if unlike := [
            name for name, value in shared(whole).items() if shared(train).get(name) != value
    ]:
        raise BadInput(
            f"--{unlike[0]} is the base's to set, or losses do not compare: give two commands with an --out each"
        )
    if train.tokens_per_param:
        raise BadInput(
            "--tokens_per_param would give changes lengths of their own: give --max_steps or --minutes"
        )
    check_model(model)
    if not (explicit & set(LENGTHS) or train.max_steps):
        raise BadInput("the base has no length: give --max_steps or --minutes")
    if not train.eval_every:
        raise BadInput("--eval_every 0 would measure no loss: leave it out")
    corpus = Corpus(train)
    make_plan(changed, corpus, size_of(model, corpus), world_size=1)
    return train.device


def plan(cfg, base):
    """-> (all runs, the base's first, each checked before any begins; the --device of each). Raises
    BadInput."""
    for seed in cfg.seeds:
        settings([f"--seed={seed}"])
    changes = {"base": []} | (read_changes(cfg.changes) if cfg.changes else default_changes(base))
    runs, devices = [], set()
    for change, words in changes.items():
        try:
            devices.add(check_flags(base, words))
            if len(change) > 150:
                raise BadInput(
                    "too long for the name of a folder: give it a short one, `name: flags`")
        except BadInput as error:
            raise BadInput(f"{change[:60]}: {error}") from error
        for seed in dict.fromkeys(cfg.seeds):
            runs.append(
                Run(change, seed, [*base, *words], str(Path(cfg.out, f"{change}_seed{seed}"))))
    for one in runs:
        kept = read_json(record(one), "give another --out") if record(one).exists() else {}
        if kept and (kept.keys() != vars(one).keys() or kept["flags"] != one.flags):
            raise BadInput(
                f"{one.folder} is a run of other flags, {shlex.join(kept.get('flags', []))}: give another --out"
            )
        if not kept and Path(one.folder).exists():
            raise BadInput(f"{one.folder} was not begun by ablate.py: give another --out")
        vars(one).update(kept | {"folder": one.folder})
    return runs, devices


def record(one):
    """The file beside a run's folder that says what it is, from before it begins."""
    return Path(f"{one.folder}.json")


# ----------------------------------------------------------------------------------------------------------------------
# Running it


def slots(devices):
    """What CUDA_VISIBLE_DEVICES is to say for each run that may go on at a time; [None]: one, and
    nothing is said."""
    count, named = torch.cuda.device_count() if devices <= {
        "auto", "cuda"
    } else 0, os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count] or [None]


def run_one(one, gpu, cfg, children):
    """Run it to its end on this GPU, its console in <folder>.txt -> None, or why it has not come to
    its end."""
    env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    command = [
        sys.executable,
        str(SCRIPT), *QUIET, *one.flags, f"--seed={one.seed}",
        f"--log_dir={Path(one.folder).parent}", f"--run_name={Path(one.folder).name}"
    ]
    write_json(record(one), vars(one))
    console = Path(f"{one.folder}.txt")
    with open(console, "a") as file:
        # a session of its own: a signal reaches it through `run_all` alone, once
        child = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT,
                                 start_new_session=True)
        children.append(child)
        code = child.wait()
    if code < 0:
        return f"ended by signal {-code}, {console} has its last words"
    if code:
        return (console.read_text(errors="replace").strip().splitlines()
                or [f"exit code {code}"])[-1]
    return None if read_result(one, cfg) else "stopped before its end"


def read_result(one, cfg):
    """Fill in what a finished run logged, and keep it. False if it was stopped before its end."""
    folder = Path(one.folder)
    config = read_json(folder / "config.json", "see its console")
    scalars, last = read_scalars(folder), config["max_steps"]
    if last not in scalars.get("Loss/val", ()):
        return False
    took = without_compilation([ms / 1e3 for ms in scalars["perf/step_ms"].values()])
    one.parameters, one.loss, one.bpb = config["parameters"]["total"], scalars["Loss/val"][
        last], scalars["Loss/val_bpb"][last]
    one.seconds, one.step_ms = sum(took), 1e3 * statistics.median(took[len(took) // 2:])
    one.commit, one.finished = config["starts"][-1].get("commit"), True
    write_json(record(one), vars(one))
    for _, path in () if cfg.checkpoints else checkpoint.found(folder):
        path.unlink()
    return True


def time_left(ended, all_of_them, seconds):
    """The number of runs left and their time, as text, when `ended` runs took `seconds`."""
    to_go = all_of_them - ended
    eta = datetime.timedelta(seconds=round(seconds / ended * to_go))
    return f"{to_go} to go, ETA {eta}" if to_go else "the last one"


def run_all(runs, devices, cfg, processes):
    """Run what is not finished, one at a time on each GPU. Raises BadInput if some do not come to
    their end."""
    free, children, failed = queue.SimpleQueue(), [], []
    for gpu in slots(devices):
        free.put(gpu)

    def work(one):
        gpu, name = free.get(), Path(one.folder).name
        try:
            why = run_one(one, gpu, cfg, children)
        except (OSError, BadInput) as error:
            why = str(error)
        finally:
            free.put(gpu)
        ended.append(one)
        result = why or f"val loss {one.loss:.4f}, {one.seconds:.1f} s of steps"
        print(f"{name}: {result}; {time_left(len(ended), len(left), time.monotonic() - started)}",
              flush=True)
        if why:
            failed.append(f"{name} as it says: {why}")

    left = [one for one in runs if not one.finished]
    ended = []
    started = time.monotonic()
    print(
        f"{len(left)} of {len(runs)} runs to go, {free.qsize()} at a time; what they say is in {cfg.out}/*.txt",
        flush=True)
    with StopSignals(lambda line: print(line, flush=True),
                     processes) as stop, ThreadPoolExecutor(free.qsize()) as pool:
        waiting = [pool.submit(work, one) for one in left]
        while not all(done.done() for done in waiting):
            if stop.requested:
                pool.shutdown(wait=False, cancel_futures=True)
                while children:
                    children.pop().terminate(
                    )  # once: train_gpt2.py saves and ends; a second time, it would end unsaved
            time.sleep(0.1)
    if stop.requested:
        raise KeyboardInterrupt("stopped: the same command goes on")
    for done in waiting:
        done.result()  # a bug shows itself
    if failed:
        raise BadInput(f"{len(failed)} of {len(runs)} runs did not come to their end, {failed[0]} "
                       "Mend it and give the same command, or leave that change out")


# ----------------------------------------------------------------------------------------------------------------------
# What came of it


def differences(runs):
    """{change: {seed: loss less the base's of the same seed}}, for finished runs; the base's own
    among them, all 0."""
    base, found = {one.seed: one.loss for one in runs if one.change == "base" and one.finished}, {}
    for one in runs:
        if one.finished and one.seed in base:
            found.setdefault(one.change, {})[one.seed] = one.loss - base[one.seed]
    return found


def with_spread(values):
    """The mean of a figure over the seeds, and half of their range where there are several."""
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.1f}"


def table(runs, price):
    """A Markdown table of what is finished, what costs most loss first."""
    worth = differences(runs)
    groups = {
        change: [
            one for one in runs if one.change == change and one.seed in found and one.finished
        ] for change, found in worth.items()
    }
    ms = {change: statistics.mean(one.step_ms for one in group) for change, group in groups.items()}
    lines = [
        "| change | parameters | val loss, by seed | bits per byte | difference in loss | ms per step | seconds |"
        + " dollars |" * bool(price), "|---|---:|---:|---:|---:|---:|---:|" + "---:|" * bool(price)
    ]
    for change in sorted(
            groups, key=lambda change:
        (change != "base", -statistics.mean(worth[change].values()))):
        group = groups[change]
        seconds = statistics.mean(one.seconds for one in group)
        cells = [
            change, f"{group[0].parameters / 1e6:.1f}M",
            ", ".join(f"{one.seed}: {one.loss:.4f}" for one in group),
            f"{statistics.mean(one.bpb for one in group):.4f}",
            "" if change == "base" else ", ".join(f"{d:+.4f}" for d in worth[change].values()),
            with_spread([one.step_ms for one in group]) +
            ("" if change == "base" else f" ({ms[change] / ms['base'] - 1:+.1%})"),
            with_spread([one.seconds for one in group])
        ]
        lines.append("| " + " | ".join(cells + ([f"{seconds / 3600 * price:.4f}"] if price else []))
                     + " |")
    losses = [one.loss for one in groups["base"]]
    lines += ["", f"The base's seeds differ by {max(losses) - min(losses):.4f}; a difference is between runs of one seed: "
              "believe it where the seeds agree." if len(losses) > 1 else "One seed proves little: give more --seeds."]
    lines.append("The base comes first, then what costs most loss, on average over the seeds, down to what gains most; "
                 "seconds and ms per step are means over the seeds ± half their range.")
    if len(commits := {one.commit for group in groups.values() for one in group}) > 1:
        lines.append(f"Runs of {len(commits)} commits: what changed between them counts, too.")
    return "\n".join(lines)


def picture(runs, path):
    """Each change's difference in loss, a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    worth = {
        change: [*found.values()] for change, found in differences(runs).items() if change != "base"
    }
    order = sorted(worth, key=lambda change: statistics.mean(worth[change]))
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.35 * len(order)))
    axes.barh(order, [statistics.mean(worth[change]) for change in order], color="C0", alpha=0.4)
    for change in order:
        axes.plot(worth[change], [change] * len(worth[change]), "o", color="C0", ms=4)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xscale("symlog", linthresh=0.01)  # one that fails must not hide the others
    axes.set(xlabel="val loss less the base's, nats per token; a dot per seed")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(argv):
    if "--" not in argv and not {"-h", "--help"} & set(argv):
        raise BadInput(
            'flags of train_gpt2.py, the base, stand behind "--": give at least --preset and a length'
        )
    cut = argv.index("--") if "--" in argv else len(argv)
    (cfg,), _ = parse((Config,), argv[:cut], __doc__)
    processes = Processes("cpu")
    if processes.distributed:
        raise BadInput("ablate.py uses every GPU by itself: start it without torchrun")
    runs, devices = plan(cfg, argv[cut + 1:])
    if taken := [
            path for path in map(Path(cfg.out).joinpath, ("ablation.md", "ablation.png"))
            if path.is_dir()
    ]:
        raise BadInput(f"{taken[0]} is a folder: name another --out")
    make_folder(cfg.out, "name another --out")
    with locked(cfg.out, "end that ablate.py first, or name another --out"):
        try:
            run_all(runs, devices, cfg, processes)
        finally:
            if differences(runs):
                text, to = table(runs, cfg.price_per_hour), Path(cfg.out, "ablation.md")
                replace(
                    to, lambda file: file.write(
                        f"`{shlex.join(['python', 'ablate.py', *argv])}`\n\n{text}\n".encode()))
                print(f"\n{text}", flush=True)
                try:
                    picture(runs, to.with_suffix(".png"))
                except ImportError:
                    print("no picture: `pip install -r requirements-dev.txt` has matplotlib")


if __name__ == "__main__":
    run(main)
