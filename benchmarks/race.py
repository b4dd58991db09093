r"""Loss against seconds of training: our presets and the scripts they are measured by, side by side
on one GPU.

    python fineweb.py --source ../shared/corpus/val.parquet "../shared/corpus/train-0000[0-8].parquet" \
        --val_tokens 2495235 --out race_data         # GPT-2 tokens; the val split is val.parquet, no more and no less
    python benchmarks/race.py --data race_data --parquet ../shared/corpus --contestants ../contestants \
        --row "--preset speedrun --minutes 5" --row "baseline: --preset gpt2 --max_steps 300"

A row is a set of flags of train_gpt2.py, with a name if wanted. race_contestants.py says what the
others are and how they are patched.

Seconds are those of training steps, without evaluation and without compilation, for all alike: the
device is synchronized before and after a step, and one that compiles a new shape counts as its
neighbours do (`without_compilation`). Losses are per GPT-2 token over the first VAL_TOKENS of the
val split; bits per byte over the same, or over the whole split for a row with as many --val_tokens
(2495235) and for autoresearch.

--out gets <name>.log, lines of `seconds step val_loss` (autoresearch: bits per byte), and a table
of all logs is printed, without --contestants and --row that alone. What has a log is not run again,
so a race may take several calls.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from race_contestants import PATCHES, VAL_TOKENS, lay_out, patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lib.logger import read_scalars, without_compilation  # noqa: E402

TAG_STEP_MS, TAG_BPB, VAL = "perf/step_ms", "Loss/val_bpb", "val"  # what train_gpt2.py logs: to TensorBoard, in log.txt
BARS = {"R1": ("build_nanogpt", 5.144),
        "R2": ("train_gpt_simple", 3.880)}  # whom to beat, and the loss it ends with


@dataclass
class Result:
    """One run. kind: "gpt2" for nats per GPT-2 token of the first VAL_TOKENS, "other" for losses
    not to be compared."""
    kind: str = "gpt2"
    parameters: int = 0
    device: str = ""
    bpb: float = 0.0                             # at the end
    whole: bool = False                          # bpb is on the whole val split
    steps: list = field(default_factory=list)    # seconds of each update
    val: list = field(default_factory=list)      # (updates made, loss)

    def curve(self):
        """-> [(seconds of training, updates, val loss), ...], compilation left out."""
        total = [0.0, *np.cumsum(without_compilation(self.steps)).tolist()]
        return [(total[step], step, loss) for step, loss in self.val]


def run(command, folder, env):
    """Run to the end, its output in folder/console.txt; a failure ends the race."""
    console = folder / "console.txt"
    with open(console, "w") as file:
        code = subprocess.call(command, cwd=folder, env=os.environ | env, stdout=file,
                               stderr=subprocess.STDOUT)
    if code:
        sys.exit(f"{shlex.join(command)} failed:\n{console.read_text()[-3000:]}")


def val_split(data):
    """What meta.json says of the val split: tokens, bytes."""
    return json.loads((Path(data) / "meta.json").read_text())["splits"]["val"]


def read_contestant(name, folder, data):
    """What a contestant's clock wrote -> Result."""
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
    if result.kind == "gpt2":
        result.bpb = result.val[-1][1] / math.log(2) * val_split(data)["tokens"] / val_split(
            data)["bytes"]
    else:
        result.bpb, result.whole = result.val[-1][1], True
    return result


def row_command(flags, folder, args):
    never = [
        f"--{what}=0" for what in ("hellaswag_every", "sample_every", "save_every", "save_minutes")
    ]
    return [
        sys.executable,
        str(ROOT / "train_gpt2.py"), f"--data={args.data.resolve()}", f"--val_tokens={VAL_TOKENS}",
        f"--eval_every={args.every}", *never, f"--log_dir={folder.resolve()}", "--run_name=run",
        *shlex.split(flags)
    ]


def read_row(folder, data):
    """What train_gpt2.py logged -> Result."""
    config = json.loads((folder / "config.json").read_text())
    settings, (trained_on,) = config["train"], config["train"]["data"]
    tokens = val_split(trained_on)["tokens"]
    scalars = read_scalars(folder)
    lines = [line.split() for line in (folder / "log.txt").read_text().splitlines()]
    device = re.search(r"^device  (.*), torch", (folder.parent / "console.txt").read_text(),
                       re.M)[1]
    same = settings["val_tokens"] == VAL_TOKENS and Path(trained_on) == data.resolve()
    return Result("gpt2" if same else "other", config["parameters"]["total"],
                  f"{device}, torch {config['torch']}", bpb=[*scalars[TAG_BPB].values()][-1],
                  whole=settings["val_tokens"] >= tokens - 1,
                  steps=[ms / 1e3 for ms in scalars[TAG_STEP_MS].values()],
                  val=[(int(step), float(loss)) for step, kind, loss in lines if kind == VAL])


def reaches(curve, target):
    """Seconds at which the loss comes down to `target`, linear between two validations; None if it
    never does."""
    for (t0, _, a), (t1, _, b) in zip(curve, curve[1:]):
        if b <= target < a:
            return t0 + (t1 - t0) * (a - target) / (a - b)
    return None


def write_log(path, result):
    head = {key: getattr(result, key) for key in ("kind", "parameters", "device", "bpb", "whole")}
    lines = [
        f"# {json.dumps(head)}",
        *(f"{seconds:.3f} {step} {loss:.6f}" for seconds, step, loss in result.curve())
    ]
    path.write_text("\n".join(lines) + "\n")


def read_logs(out):
    """-> {name: (what a log's first line says, its curve)} of a folder."""
    logs = {}
    for path in sorted(out.glob("*.log")):
        head, *lines = path.read_text().splitlines()
        logs[path.stem] = json.loads(head[2:]), [tuple(map(float, line.split())) for line in lines]
    return logs


def picture(logs, path):
    """Losses per GPT-2 token against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, (head, curve) in logs.items():
        if head["kind"] == "gpt2":
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


def table(logs):
    """Logs as a Markdown table, the fewest bits per byte first."""
    rows = []
    for name, (head, curve) in sorted(logs.items(), key=lambda item: item[1][0]["bpb"]):
        seconds, steps, loss = curve[-1]
        cells = [name, f"{head['parameters']:,}", f"{seconds:.1f}", f"{steps:,.0f}", f"{loss:.4f}",
                 f"{head['bpb']:.4f}{'' if head['whole'] else ' *'}"]
        for rival, target in BARS.values():
            took = reaches(curve, target) if head["kind"] == "gpt2" else None
            rivals = logs[rival][1] if rival in logs else None
            bar = (reaches(rivals, target) or rivals[-1][0]) if rivals else None
            cells.append("-" if took is None else f"{took:.1f}"
                         + (f" (1/{bar / took:.1f})" if bar else ""))
        rows.append(cells)
    bars = [f"{bar}: s to {target:.3f}" for bar, (_, target) in BARS.items()]
    head = ["run", "parameters", "seconds", "steps", "val loss", "R3: bits per byte", *bars]
    return "\n".join([
        *sorted({head["device"] for head, _ in logs.values()}), "",
        *("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)), "",
        f"\\* over the first {VAL_TOKENS:,} tokens of val, the others over all of it. In brackets: the "
        "share of the seconds that build_nanogpt (R1) or train_gpt_simple (R2) takes."
    ])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path,
                        help="folder of GPT-2 token shards that fineweb.py made")
    parser.add_argument("--contestants", help="folder of their sources; without it, rows alone")
    parser.add_argument("--only", nargs="*", choices=PATCHES, default=[*PATCHES],
                        help="which of them run")
    parser.add_argument("--parquet", type=Path,
                        help="folder of train-0000[0-8] and val, for autoresearch")
    parser.add_argument("--row", action="append", default=[],
                        help="flags of train_gpt2.py, or `name: flags`")
    parser.add_argument("--every", type=int, default=25, help="steps between a row's validations")
    parser.add_argument("--out", type=Path, default=Path("race"),
                        help="folder of logs, table and runs")
    parser.add_argument("--picture", type=Path, help="picture of all logs to write")
    parser.add_argument("--dry_run", action="store_true",
                        help="patch the sources and print the commands only")
    args = parser.parse_args()
    if (args.contestants or args.row) and not args.data:
        parser.error("name the shards by --data")
    jobs = dict.fromkeys(args.only if args.contestants else ())
    for row in args.row:
        name, _, flags = row.rpartition(": ")
        jobs[name or re.sub(r"[^\w.]+", "_", flags).strip("_")] = flags
    for name, flags in jobs.items():
        log, folder = args.out / f"{name}.log", args.out / "runs" / name
        if log.exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        theirs = flags is None
        command, env = patch(name, args.contestants, folder) if theirs else (row_command(
            flags, folder, args), {})
        print(f"{time.strftime('%H:%M:%S')} {name}: {shlex.join(command)}", flush=True)
        if args.dry_run:
            continue
        if theirs:
            lay_out(name, args.contestants, folder, args.data, args.parquet)
        run(command, folder, env)
        write_log(
            log,
            read_contestant(name, folder, args.data) if theirs else read_row(
                folder / "run", args.data))
    if logs := read_logs(args.out):
        print(table(logs))
        if args.picture:
            picture(logs, args.picture)


if __name__ == "__main__":
    main()
