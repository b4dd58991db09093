r"""Loss against seconds of training: our presets and the scripts they compete with, side by side on
one GPU.

    # GPT-2 tokens; the val split is exactly val.parquet
    python fineweb.py --source ../shared/corpus/val.parquet \
        "../shared/corpus/train-0000[0-8].parquet" --val_tokens 2495235 --out race_data
    python benchmarks/race.py --data race_data --parquet ../shared/corpus \
        --contestants ../contestants --row "--preset speedrun --minutes 5" \
        --row "baseline: --preset gpt2 --max_steps 300"

A row is a set of flags of train_gpt2.py, optionally with a name. race_contestants.py lists the
other scripts and how they are patched.

Seconds count training steps only, without evaluation or compilation, measured alike for all: the
device is synchronized before and after each step, and a step that compiles a new shape counts as
the median of its neighbors (`without_compilation`). Beside them are the seconds from the command
to its end, with compilation and evaluations, and their price. Losses are per GPT-2 token over the
first VAL_TOKENS of the val split. Bits per byte are over the same tokens, or over the whole split
for autoresearch and for rows with --val_tokens 2495235.

--out gets <name>.log, lines of `seconds step val_loss` (bits per byte for autoresearch). A table of
all logs is printed; without --contestants and --row only that. Rows that have a log are not run
again, so a race may take several calls.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from race_contestants import PATCHES, VAL_TOKENS, lay_out, patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lib.logger import read_scalars  # noqa: E402

# what train_gpt2.py logs: to TensorBoard, in log.txt
TAG_STEP_MS = "perf/step_ms"
TAG_BPB = "Loss/val_bpb"
VAL = "val"
# the contestant to beat, and its final loss
BARS = {"R1": ("build_nanogpt", 5.144), "R2": ("train_gpt_simple", 3.880)}
COMPILED = 10  # a step this many times slower than its neighbors compiled a new shape


@dataclass
class Result:
    """One run. kind: "gpt2" if losses are nats per GPT-2 token of the first VAL_TOKENS, "other" if
    they are not comparable."""
    kind: str = "gpt2"
    parameters: int = 0
    device: str = ""
    bpb: float = 0.0                             # at the end
    whole: bool = False                          # bpb is on the whole val split
    command: float | None = None                 # seconds from the command to its end
    steps: list = field(default_factory=list)    # seconds of each step
    val: list = field(default_factory=list)      # (steps done, loss)

    def curve(self):
        """-> [(seconds of training, steps, val loss), ...], without compilation."""
        total = [0.0, *np.cumsum(without_compilation(self.steps)).tolist()]
        return [(total[step], step, loss) for step, loss in self.val]


def without_compilation(seconds: list[float]) -> list[float]:
    """Seconds of steps without time spent compiling.

    The first, and any that takes COMPILED times the median of its neighbors, is replaced by that
    median.
    """
    cleaned = []
    for i, took in enumerate(seconds):
        neighbors = seconds[max(i - 10, 1):max(i, 1)] + seconds[i + 1:i + 11]
        usual = statistics.median(neighbors or seconds)
        compiled = i == 0 or took > COMPILED * usual
        cleaned.append(usual if compiled else took)
    return cleaned


def run(command, folder, env):
    """Run to the end, with its output in folder/console.txt -> seconds. A failure ends the race."""
    console = folder / "console.txt"
    started = time.perf_counter()
    with open(console, "w") as file:
        code = subprocess.call(command, cwd=folder, env=os.environ | env, stdout=file,
                               stderr=subprocess.STDOUT)
    if code:
        sys.exit(f"{shlex.join(command)} failed:\n{console.read_text()[-3000:]}")
    return time.perf_counter() - started


def val_split(data):
    """The tokens and bytes of the val split, from meta.json."""
    return json.loads((Path(data) / "meta.json").read_text())["splits"]["val"]


# --------------------------------------------------------------------------------------------------
# Contestants and rows


def read_contestant(name, folder, data):
    """The lines that a contestant's Clock wrote -> Result."""
    result = Result("other" if name == "autoresearch" else "gpt2")
    for line in (folder / "clock.txt").read_text().splitlines():
        key, *words = line.split()
        if key == "step":
            result.steps.append(float(words[0]))
        elif key == "val":
            result.val.append((int(words[0]), float(words[1])))
        elif key == "parameters":
            result.parameters = int(words[0])
        else:
            result.device = " ".join(words)
    _, last = result.val[-1]
    if result.kind == "gpt2":
        split = val_split(data)
        result.bpb = last / math.log(2) * split["tokens"] / split["bytes"]
    else:
        result.bpb = last
        result.whole = True
    return result


def row_command(flags, folder, args):
    return [
        sys.executable, str(ROOT / "train_gpt2.py"), f"--data={args.data.resolve()}",
        f"--val_tokens={VAL_TOKENS}", f"--eval_every={args.every}", "--hellaswag_every=0",
        "--sample_every=0", "--save_every=0", "--save_minutes=0", f"--log_dir={folder.resolve()}",
        "--run_name=run", *shlex.split(flags),
    ]


def read_row(folder, data):
    """The logs of train_gpt2.py -> Result."""
    config = json.loads((folder / "config.json").read_text())
    settings = config["train"]
    (trained_on,) = settings["data"]
    scalars = read_scalars(folder)
    val = []
    for line in (folder / "log.txt").read_text().splitlines():
        step, kind, loss = line.split()
        if kind == VAL:
            val.append((int(step), float(loss)))
    console = (folder.parent / "console.txt").read_text()
    device = re.search(r"^device  (.*), torch", console, re.M)[1]
    comparable = settings["val_tokens"] == VAL_TOKENS and Path(trained_on) == data.resolve()
    return Result(
        kind="gpt2" if comparable else "other",
        parameters=config["parameters"]["total"],
        device=f"{device}, torch {config['torch']}",
        bpb=list(scalars[TAG_BPB].values())[-1],
        whole=settings["val_tokens"] >= val_split(trained_on)["tokens"] - 1,
        steps=[ms / 1e3 for ms in scalars[TAG_STEP_MS].values()],
        val=val,
    )


# --------------------------------------------------------------------------------------------------
# Logs and the table


def reaches(curve, target):
    """Seconds until the loss first falls to `target`, interpolated between two validations; None if
    it never does."""
    for (t0, _, a), (t1, _, b) in zip(curve, curve[1:]):
        if b <= target < a:
            return t0 + (t1 - t0) * (a - target) / (a - b)
    return None


def write_log(path, result):
    keys = ("kind", "parameters", "device", "bpb", "whole", "command")
    head = {key: getattr(result, key) for key in keys}
    lines = [f"# {json.dumps(head)}"]
    for seconds, step, loss in result.curve():
        lines.append(f"{seconds:.3f} {step} {loss:.6f}")
    path.write_text("\n".join(lines) + "\n")


def read_logs(out):
    """-> {name: (the head of its log, its curve)} of a folder."""
    logs = {}
    for path in sorted(out.glob("*.log")):
        head, *lines = path.read_text().splitlines()
        curve = [tuple(map(float, line.split())) for line in lines]
        logs[path.stem] = (json.loads(head.removeprefix("# ")), curve)
    return logs


def table(logs, price):
    """Logs as a Markdown table, the fewest bits per byte first. price: dollars per hour."""
    bars = [f"{bar}: s to {target:.3f}" for bar, (_, target) in BARS.items()]
    head = ["run", "parameters", "seconds of training", "from the command on", "dollars", "steps",
            "val loss", "R3: bits per byte", *bars]
    rows = [head, ["---"] * len(head)]
    for name in sorted(logs, key=lambda name: logs[name][0]["bpb"]):
        rows.append(table_row(name, logs, price))
    devices = sorted({head["device"] for head, _ in logs.values()})
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    note = (f"\\* over the first {VAL_TOKENS:,} tokens of val, the others over all of it. In "
            "brackets: the share of the seconds that build_nanogpt (R1) or train_gpt_simple (R2) "
            f"takes. Dollars: from the command on, at ${price:g} per hour.")
    return "\n".join([*devices, "", *lines, "", note])


def table_row(name, logs, price):
    head, curve = logs[name]
    seconds, steps, loss = curve[-1]
    bpb = f"{head['bpb']:.4f}"
    if not head["whole"]:
        bpb += " *"
    command = head.get("command")  # logs of earlier races do not have it
    spent = ["-", "-"]
    if command:
        spent = [f"{command:.1f}", f"{command / 3600 * price:.3f}"]
    cells = [name, f"{head['parameters']:,}", f"{seconds:.1f}", *spent, f"{steps:,.0f}",
             f"{loss:.4f}", bpb]
    for rival, target in BARS.values():
        took = reaches(curve, target) if head["kind"] == "gpt2" else None
        if took is None:
            cells.append("-")
            continue
        cell = f"{took:.1f}"
        if rival in logs:
            _, rivals_curve = logs[rival]
            rival_took = reaches(rivals_curve, target) or rivals_curve[-1][0]
            cell += f" (1/{rival_took / took:.1f})"
        cells.append(cell)
    return cells


def plot(logs, path):
    """Draw losses per GPT-2 token against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, (head, curve) in logs.items():
        if head["kind"] != "gpt2":
            continue
        seconds, _, losses = zip(*curve[1:])
        millions = head["parameters"] / 1e6
        axes.plot(seconds, losses, marker="o", ms=3, label=f"{name}, {millions:.0f}M")
    for rival, target in BARS.values():
        axes.axhline(target, color="gray", lw=0.8, ls="--")
        axes.annotate(f"{rival} ends at {target:.3f}", (0.01, target), xytext=(0, 2),
                      xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=8,
                      color="gray")
    axes.set(xscale="log", xlabel="seconds of training steps",
             ylabel="val loss, nats per GPT-2 token")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(title="recipe, parameters", fontsize=8, loc="upper left", bbox_to_anchor=(0.2, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def race(name, flags, args):
    """Run a contestant (flags: None) or a row, and write its log, unless that exists."""
    log = args.out / f"{name}.log"
    folder = args.out / "runs" / name
    if log.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    is_contestant = flags is None
    if is_contestant:
        command, env = patch(name, args.contestants, folder)
    else:
        command, env = row_command(flags, folder, args), {}
    print(f"{time.strftime('%H:%M:%S')} {name}: {shlex.join(command)}", flush=True)
    if args.dry_run:
        return
    if is_contestant:
        lay_out(name, args.contestants, folder, args.data, args.parquet)
    seconds = run(command, folder, env)
    if is_contestant:
        result = read_contestant(name, folder, args.data)
    else:
        result = read_row(folder / "run", args.data)
    result.command = seconds
    write_log(log, result)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path,
                        help="folder of GPT-2 token shards that fineweb.py made")
    parser.add_argument("--contestants", help="folder of their sources; without it, only rows run")
    parser.add_argument("--only", nargs="*", choices=PATCHES, default=[*PATCHES],
                        help="the contestants to run")
    parser.add_argument("--parquet", type=Path,
                        help="folder of train-0000[0-8] and val, for autoresearch")
    parser.add_argument("--row", action="append", default=[],
                        help="flags of train_gpt2.py, or `name: flags`")
    parser.add_argument("--every", type=int, default=25, help="steps between a row's validations")
    parser.add_argument("--out", type=Path, default=Path("race"),
                        help="folder of logs, table and runs")
    parser.add_argument("--picture", type=Path, help="plot of all logs to write")
    parser.add_argument("--price_per_hour", type=float, default=2.0, help="dollars of the machine")
    parser.add_argument("--dry_run", action="store_true",
                        help="patch the sources and print the commands only")
    args = parser.parse_args()
    if (args.contestants or args.row) and not args.data:
        parser.error("--data is missing: name the folder of shards")
    jobs = {}  # name -> flags, None for a contestant
    if args.contestants:
        jobs = dict.fromkeys(args.only)
    for row in args.row:
        name, _, flags = row.rpartition(": ")
        jobs[name or re.sub(r"[^\w.]+", "_", flags).strip("_")] = flags
    for name, flags in jobs.items():
        race(name, flags, args)
    logs = read_logs(args.out)
    if logs:
        print(table(logs, args.price_per_hour))
        if args.picture:
            plot(logs, args.picture)


if __name__ == "__main__":
    main()
