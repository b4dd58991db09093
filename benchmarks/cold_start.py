r"""From the command to its end: seconds beside training, with nothing cached and a second time.

    python benchmarks/cold_start.py --data DIR --out results.txt \
        --row "60.4M: --preset speedrun --minutes 0.3" \
        --row "16.0M: --preset speedrun --minutes 0.06 --n_layer 4 --n_head 2 --n_embd 256"
    python benchmarks/cold_start.py --command "build-nanogpt: python train_gpt2.py" --log "step +0"

A row is a name and flags of train_gpt2.py. It runs twice: with empty caches of the compiler, then
with what the first run left. Phases end with lines that the script prints, timed as they arrive:

    set-up    from the command to the run's description: imports, data, model, micro-batch
    compile   until "compiled"; without --compile 0
    first     until the first validation or step is printed: the first loss
    training  the sum of all steps, as TensorBoard has it
    rest      the last evaluation and checkpoint, and leaving Python

A --command is another program, as it stands: its whole time and that until a line matches --log.
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

PHASES = {"set-up": r"^device  ", "compile": r"^compiled ", "first": r"^step \d+ \| (val )?loss"}


def timed(command, env, patterns):
    """Run to the end -> (whole seconds, {name: seconds until a line matched its pattern}, output).
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen, lines = {}, []
    for line in process.stdout:
        lines.append(line)
        for name, pattern in patterns.items():
            if name not in seen and re.search(pattern, line):
                seen[name] = time.perf_counter() - began
    if process.wait():
        sys.exit(f"{shlex.join(command)} failed:\n{''.join(lines[-20:])}")
    return time.perf_counter() - began, seen, "".join(lines)


def row(flags, data, cache, folder):
    """One run of train_gpt2.py -> {phase: seconds}, and tok/s of the second half's median step."""
    never = [f"--{what}=0" for what in ("hellaswag_every", "sample_every", "save_minutes")]
    command = [
        sys.executable,
        str(ROOT / "train_gpt2.py"), f"--data={data}", "--eval_every=1000000",
        "--val_tokens=1310720", f"--log_dir={folder}", "--run_name=run", *never, *shlex.split(flags)
    ]
    env = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    whole, seen, _ = timed(command, env, PHASES)
    scalars = read_scalars(Path(folder) / "run")
    steps = list(scalars["perf/step_ms"].values())
    speeds = sorted(list(scalars["perf/tok_per_sec"].values())[len(steps) // 2:])
    compiled = seen.get("compile", seen["set-up"])
    result = {"whole": whole, "set-up": seen["set-up"], "compile": compiled - seen["set-up"],
              "first loss at": seen["first"], "training": sum(steps) / 1e3}
    result["beside training"] = whole - result["training"]
    result["tok/s"] = speeds[len(speeds) // 2]
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--row", action="append", default=[], help="name: flags of train_gpt2.py")
    parser.add_argument("--command", action="append", default=[],
                        help="name: a command, run as it is")
    parser.add_argument("--log", default=r"step +\d+",
                        help="the line with a --command's first loss")
    parser.add_argument("--again", action=argparse.BooleanOptionalAction, default=True,
                        help="run each row a second time, with what the first left in the cache")
    args = parser.parse_args()
    names = ["whole", "set-up", "compile", "first loss at", "training", "beside training", "tok/s"]
    print(f"{'seconds':24}" + "".join(f"{name:>17}" for name in names), flush=True)
    for text in args.row:
        name, _, flags = text.partition(":")
        with tempfile.TemporaryDirectory() as cache:
            for start in ("cold", "again")[:1 + args.again]:
                with tempfile.TemporaryDirectory() as folder:
                    result = row(flags, args.data.resolve(), Path(cache), folder)
                cells = "".join(f"{result[n]:17,.{0 if n == 'tok/s' else 1}f}" for n in names)
                print(f"{name + ', ' + start:24}{cells}", flush=True)
    for text in args.command:
        name, _, command = text.partition(":")
        with tempfile.TemporaryDirectory() as cache:
            env = {"TORCHINDUCTOR_CACHE_DIR": cache}
            whole, seen, _ = timed(shlex.split(command), env, {"first": args.log})
        print(f"{name:24}{whole:17.1f}{'':34}{seen.get('first', float('nan')):17.1f}", flush=True)


if __name__ == "__main__":
    main()
