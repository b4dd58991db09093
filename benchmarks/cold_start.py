r"""Wall time of a run from start to exit, and its share outside training steps: with a cold
compiler cache, and again with a warm one.

    python benchmarks/cold_start.py --data DIR --out results.txt \
        --row "60.4M: --preset speedrun --minutes 0.3" \
        --row "16.0M: --preset speedrun --minutes 0.06 --n_layer 4 --n_head 2 --n_embd 256"
    python benchmarks/cold_start.py --command "build-nanogpt: python train_gpt2.py" --log "step +0"

A row is a name and flags of train_gpt2.py. It runs twice: with empty compiler caches, then with
those of the first run. Phases are timed by the lines that the script prints:

    set-up    from the start to the run's description: imports, data, model, micro-batch
    compile   until "compiled"; 0 without --compile
    first     until the first validation or step is printed: the first loss
    training  the sum of all steps, from TensorBoard
    rest      the last evaluation and checkpoint, and exiting Python

A --command is another program: its total time is measured, and the time until a line matches --log.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lib.logger import read_scalars  # noqa: E402

COLUMNS = ["whole", "set-up", "compile", "first loss at", "training", "beside training", "tok/s"]
PHASES = {"set-up": r"^device  ", "compile": r"^compiled ", "first": r"^step \d+ \| (val )?loss"}


def timed(command, env, patterns):
    """Run to the end -> (total seconds, {name: seconds until a line matched its pattern})."""
    started = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = {}
    lines = []
    for line in process.stdout:
        lines.append(line)
        for name, pattern in patterns.items():
            if name not in seen and re.search(pattern, line):
                seen[name] = time.perf_counter() - started
    if process.wait():
        sys.exit(f"{shlex.join(command)} failed:\n{''.join(lines[-20:])}")
    return time.perf_counter() - started, seen


def row(flags, data, cache, folder):
    """One run of train_gpt2.py -> {phase: seconds}, and the median tok/s of the second half."""
    command = [
        sys.executable, str(ROOT / "train_gpt2.py"), f"--data={data}", "--eval_every=1000000",
        "--val_tokens=1310720", "--hellaswag_every=0", "--sample_every=0", "--save_minutes=0",
        f"--log_dir={folder}", "--run_name=run", *shlex.split(flags),
    ]
    env = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    total, seen = timed(command, env, PHASES)
    scalars = read_scalars(Path(folder) / "run")
    training = sum(scalars["perf/step_ms"].values()) / 1e3
    speeds = list(scalars["perf/tok_per_sec"].values())
    second_half = sorted(speeds[len(speeds) // 2:])
    compiled = seen.get("compile", seen["set-up"])
    return {
        "whole": total,
        "set-up": seen["set-up"],
        "compile": compiled - seen["set-up"],
        "first loss at": seen["first"],
        "training": training,
        "beside training": total - training,
        "tok/s": second_half[len(second_half) // 2],
    }


def cells(result):
    """The results of a row as text."""
    text = ""
    for name in COLUMNS:
        digits = 0 if name == "tok/s" else 1
        text += f"{result[name]:17,.{digits}f}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--row", action="append", default=[], help="name: flags of train_gpt2.py")
    parser.add_argument("--command", action="append", default=[], help="name: a command to run")
    parser.add_argument("--log", default=r"step +\d+",
                        help="the line with a --command's first loss")
    parser.add_argument("--again", action=argparse.BooleanOptionalAction, default=True,
                        help="run each row a second time, with the caches of the first")
    args = parser.parse_args()
    print(f"{'seconds':24}" + "".join(f"{name:>17}" for name in COLUMNS), flush=True)
    for text in args.row:
        name, _, flags = text.partition(":")
        with tempfile.TemporaryDirectory() as cache:
            for start in ("cold", "again") if args.again else ("cold",):
                with tempfile.TemporaryDirectory() as folder:
                    result = row(flags, args.data.resolve(), Path(cache), folder)
                print(f"{name + ', ' + start:24}{cells(result)}", flush=True)
    for text in args.command:
        name, _, command = text.partition(":")
        with tempfile.TemporaryDirectory() as cache:
            env = {"TORCHINDUCTOR_CACHE_DIR": cache}
            total, seen = timed(shlex.split(command), env, {"first": args.log})
        first = seen.get("first", float("nan"))
        print(f"{name:24}{total:17.1f}{'':34}{first:17.1f}", flush=True)


if __name__ == "__main__":
    main()
