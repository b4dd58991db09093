"""What each change is worth: a list of flag changes, each trained at one budget with several seeds, priced in loss and dollars.

    python ablate.py -- --preset speedrun --n_layer 8 --max_steps 280          # each part of the model, taken out
    python ablate.py --changes mine.txt --price_per_hour 2 -- --preset speedrun --minutes 1

Behind "--" stand flags of train_gpt2.py: the base. A line of --changes is flags that are added to the base's, or
`name: flags`; # begins a comment. At so many --max_steps a change is judged by its loss and by its time per step, in so
many --minutes by its loss alone, which both make.

Runs go to <out>/<change>_seed<N>, one at a time on every GPU at hand. The same command again goes on: what is finished is
not run again, and a run that was interrupted goes on from its checkpoint. Differences in loss are between runs of one seed.
The table also goes to <out>/ablation.md, a picture to <out>/ablation.png (needs requirements-dev.txt).
"""

import dataclasses
import os
import queue
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lib import checkpoint
from lib.cli import BadInput, flag, parse, run
from lib.files import make_folder, read_json, read_text, write_json
from lib.logger import read_scalars, without_compilation
from lib.moe import ExpertConfig
from train_gpt2 import check_model, settings

SCRIPT = Path(__file__).resolve().parent / "train_gpt2.py"
OURS = {"seed", "run_name", "log_dir", "resume", "plan", "tensorboard"}  # flags that are set here, or have no use
# a loss at the end is all that is asked for; the base may say otherwise
QUIET = [f"--{name}=0" for name in ("hellaswag_every", "sample_every", "save_every")] + ["--eval_every=1000000"]
SHAPE = {"block_size", "n_layer", "n_head", "n_embd", "vocab_size", "vocab_multiple", *ExpertConfig.__annotations__}


@dataclass
class Config:
    changes: str | None = flag(None, "file of changes, one per line; without it, each part of the model that the base has and "
                                     "--preset gpt2 has not is taken out")
    seeds: tuple[int, ...] = flag((1337, 2), "seeds of each change, and of the base")
    price_per_hour: float | None = flag(None, "dollars per hour of one GPU", above=0)
    out: str = flag("log/ablation", "folder of the runs, the table and the picture")
    checkpoints: bool = flag(False, "keep the checkpoints of finished runs")


@dataclass
class Run:
    """One run: what is trained, and once it is finished, what came of it. seconds: of all its steps."""
    change: str
    seed: int
    flags: list[str]
    folder: Path
    parameters: int = 0
    loss: float = 0.0
    bpb: float = 0.0
    step_ms: float = 0.0
    seconds: float = 0.0
    finished: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# What is run


def parts_taken_out(base):
    """{name: flags} that set back, one at a time, what makes the base's model another than GPT-2's, its shape apart."""
    _, model, *_ = settings(base)
    changes = {}
    for field in dataclasses.fields(model):
        value, classic = getattr(model, field.name), field.default
        if field.name not in SHAPE and value != classic:
            is_bool = isinstance(value, bool)
            words = [f"--{'' if classic else 'no-'}{field.name}"] if is_bool else [f"--{field.name}", str(classic)]
            changes["_".join(words).removeprefix("--")] = words
    if not changes:
        raise BadInput("the base has no part that --preset gpt2 has not: name changes by --changes")
    return changes


def read_changes(path):
    """A file of changes -> {name: flags}."""
    changes = {}
    for line in read_text(path, "name a file with one change per line").splitlines():
        name, _, text = line.partition("#")[0].strip().rpartition(": ")
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise BadInput(f"{path}: {text} is not a list of flags ({error}): close its quotes") from error
        if words:
            name = re.sub(r"[^\w.-]+", "_", name or " ".join(words)).strip("_-.")
            if name in ("", "base", *changes):
                raise BadInput(f"{path}: two changes are called {name!r}: give each a name, `name: flags`")
            changes[name] = words
    if not changes:
        raise BadInput(f"{path} holds no change: write one per line, flags or `name: flags`")
    return changes


def plan(cfg, base):
    """All runs, the base's first, each checked before any begins. Raises BadInput."""
    changes = {"base": []} | (read_changes(cfg.changes) if cfg.changes else parts_taken_out(base))
    runs = []
    for change, words in changes.items():
        flags = [*base, *words]
        try:
            train, model, explicit, _ = settings([*QUIET, *flags])
            check_model(model)
            for seed in cfg.seeds:
                settings([*flags, f"--seed={seed}"])
            if taken := sorted(explicit & OURS):
                raise BadInput(f"leave --{taken[0]} out" + (" and give --seeds" if taken[0] == "seed" else ""))
            if not train.eval_every:
                raise BadInput("--eval_every 0 would measure no loss: leave it out")
        except BadInput as error:
            raise BadInput(f"{change}: {error}") from error
        runs += [Run(change, seed, flags, Path(cfg.out, f"{change}_seed{seed}")) for seed in dict.fromkeys(cfg.seeds)]
    for one in runs:
        if (found := one.folder / "ablation.json").exists():
            kept = read_json(found, "give another --out")
            if kept["flags"] != one.flags:
                raise BadInput(f"{one.folder} is a run of other flags, {shlex.join(kept['flags'])}: give another --out")
            vars(one).update(kept | {"folder": one.folder})
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# Running it


def gpus():
    """What CUDA_VISIBLE_DEVICES is to say for each run that may go on at a time; None: nothing, on a machine without GPUs."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count] or [None]


def run_one(one, gpu, cfg, children):
    """Run it to its end, on this GPU, its console in <folder>.txt. False if it ended before."""
    env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    command = [sys.executable, str(SCRIPT), *QUIET, *one.flags, f"--seed={one.seed}", f"--log_dir={one.folder.parent}",
               f"--run_name={one.folder.name}"]
    with open(f"{one.folder}.txt", "a") as console:
        # a session of its own: Ctrl-C reaches it through `run_all` alone, once
        child = subprocess.Popen(command, env=env, stdout=console, stderr=subprocess.STDOUT, start_new_session=True)
        children.append(child)
        return child.wait() == 0 and read_result(one, cfg)


def read_result(one, cfg):
    """Fill in what a finished run logged, and keep it in ablation.json. False if it was stopped before its end."""
    config = read_json(one.folder / "config.json", "see its console")
    losses, bits = (read_scalars(one.folder, tag) for tag in ("Loss/val", "Loss/val_bpb"))
    if (last := config["max_steps"]) not in losses:
        return False
    took = without_compilation([ms / 1e3 for ms in read_scalars(one.folder, "perf/step_ms").values()])
    one.parameters, one.loss, one.bpb = config["parameters"]["total"], losses[last], bits[last]
    one.seconds, one.step_ms, one.finished = sum(took), 1e3 * statistics.median(took[len(took) // 2:]), True
    write_json(one.folder / "ablation.json", {**vars(one), "folder": str(one.folder)})
    for _, path in () if cfg.checkpoints else checkpoint.found(one.folder):
        path.unlink()
    return True


def run_all(runs, cfg):
    """Run what is not finished, one at a time on each GPU. Raises BadInput if some cannot be."""
    slots, children, failed = queue.SimpleQueue(), [], []
    for gpu in gpus():
        slots.put(gpu)

    def work(one):
        gpu = slots.get()
        try:
            if run_one(one, gpu, cfg, children):
                print(f"{one.folder.name}: val loss {one.loss:.4f}, {one.seconds:.1f} s of steps", flush=True)
            else:
                failed.append(one)
        finally:
            slots.put(gpu)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    pool = ThreadPoolExecutor(slots.qsize())
    left = [pool.submit(work, one) for one in runs if not one.finished]
    try:
        for done in left:
            done.result()
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("stopped: the same command goes on") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(done.done() for done in left):
            while children:
                children.pop().terminate()  # once: train_gpt2.py saves and ends; a second time, it would end unsaved
            time.sleep(0.1)
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        lines = Path(f"{failed[0].folder}.txt").read_text().strip().splitlines() or ["nothing was said"]
        raise BadInput(f"{len(failed)} of {len(runs)} runs did not finish; {failed[0].folder.name} says: {lines[-1]} "
                       f"({failed[0].folder}.txt has the rest): mend it and give the same command, or leave that change out")


# ----------------------------------------------------------------------------------------------------------------------
# What came of it


def differences(runs):
    """{change: [loss less the base's of the same seed, ...]}, for finished runs; the base's own among them, all 0."""
    base = {one.seed: one.loss for one in runs if one.change == "base" and one.finished}
    found = {}
    for one in runs:
        if one.finished and one.seed in base:
            found.setdefault(one.change, []).append(one.loss - base[one.seed])
    return found


def table(runs, price):
    """A Markdown table of what is finished, what costs most loss first, and what the base's seeds differ by."""
    worth = differences(runs)
    groups = {change: [one for one in runs if one.change == change and one.finished] for change in worth}
    ms = {change: statistics.mean(one.step_ms for one in group) for change, group in groups.items()}
    lines = ["| change | parameters | val loss, each seed | bits per byte | difference in loss | ms per step | seconds |"
             + " dollars |" * bool(price), "|---|---:|---:|---:|---:|---:|---:|" + "---:|" * bool(price)]
    for change in sorted(groups, key=lambda change: (change != "base", -statistics.mean(worth[change]))):
        group = groups[change]
        seconds = statistics.mean(one.seconds for one in group)
        cells = [change, f"{group[0].parameters / 1e6:.1f}M", ", ".join(f"{one.loss:.4f}" for one in group),
                 f"{statistics.mean(one.bpb for one in group):.4f}",
                 "" if change == "base" else ", ".join(f"{d:+.4f}" for d in worth[change]),
                 f"{ms[change]:.1f}" + ("" if change == "base" else f" ({ms[change] / ms['base'] - 1:+.1%})"), f"{seconds:.1f}"]
        lines.append("| " + " | ".join(cells + ([f"{seconds / 3600 * price:.4f}"] if price else [])) + " |")
    losses = [one.loss for one in groups["base"]]
    spread = f"by {max(losses) - min(losses):.4f}" if len(losses) > 1 else "by what one of them does not tell"
    noise = (f"The base's seeds differ {spread}. A difference is between runs of one seed, of the same text in the same order: "
             "believe it where the seeds agree.")
    return "\n".join([*lines, "", noise])


def picture(runs, path):
    """Each change's difference in loss, a dot per seed, and what it adds to a step's time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    worth = {change: found for change, found in differences(runs).items() if change != "base"}
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
    cut = argv.index("--") if "--" in argv else len(argv)
    (cfg,), _ = parse((Config,), argv[:cut], __doc__)
    runs = plan(cfg, argv[cut + 1:])
    make_folder(Path(cfg.out), "name another --out")
    try:
        run_all(runs, cfg)
    finally:
        if differences(runs):
            text = table(runs, cfg.price_per_hour)
            print(f"\n{text}")
            Path(cfg.out, "ablation.md").write_text(f"`{shlex.join(['python', 'ablate.py', *argv])}`\n\n{text}\n")
            try:
                picture(runs, Path(cfg.out, "ablation.png"))
            except ImportError:
                print("no picture: `pip install -r requirements-dev.txt` has matplotlib")


if __name__ == "__main__":
    run(main)
