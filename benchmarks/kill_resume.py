"""Kill a training run, resume it, and compare it with an uninterrupted one; measure the cost of
saving in the background.

    python benchmarks/kill_resume.py --out kill --kill 33 --term 55 -- --data DIR --max_steps 80 ...

Flags after -- go to train_gpt2.py. `plain` runs uninterrupted. `killed` runs three times: SIGKILL
once its log.txt has step --kill, the same command again, SIGTERM at step --term, the same command
again. Prints the largest differences of train and val losses, and how long steps took while a
checkpoint was written. --again adds a second uninterrupted run, to show differences without a kill.
Without --kill there is only `plain`.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP = re.compile(r"step (\d+) \| loss .* \| ([\d.]+) ms \|")
SAVED = re.compile(r"saved .*ckpt_(\d+)\.pt, ([\d.]+) GB in ([\d.]+) s; "
                   r"training waited (\d+) ms")


def start(out, run, flags):
    command = [sys.executable, os.path.relpath(ROOT / "train_gpt2.py"), *flags,
               "--log_dir", str(out), "--run_name", run]
    with open(out / f"{run}.console", "a") as console:
        return subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT,
                                env=os.environ | {"PYTHONUNBUFFERED": "1"})


def run_to_end(out, run, flags):
    assert start(out, run, flags).wait() == 0, f"see {out / run}.console"


def last_step(out, run):
    """The last step in log.txt, or -1."""
    log = out / run / "log.txt"
    if not log.exists():
        return -1
    steps = [int(line.split()[0]) for line in log.read_text().splitlines() if " train " in line]
    return max(steps, default=-1)


def stop_at(process, out, run, step, signum):
    """Send a signal after a step, and wait for the process to end."""
    while last_step(out, run) < step:
        if process.poll() is not None:
            sys.exit(f"{run} ended by itself: see {out / run}.console")
        time.sleep(0.05)
    process.send_signal(signum)
    code = process.wait()
    print(f"{signal.Signals(signum).name} after step {last_step(out, run)}, exit code {code}")


def losses(out, run):
    """log.txt -> {(step, kind): value}."""
    lines = [line.split() for line in (out / run / "log.txt").read_text().splitlines()]
    values = {(step, kind): float(value) for step, kind, value in lines}
    assert len(values) == len(lines), "a step was logged twice"
    return values


def compare(out, run):
    """Print how far the losses of a run are from those of `plain`."""
    plain = losses(out, "plain")
    other = losses(out, run)
    assert plain.keys() == other.keys()
    for kind in ("train", "val"):
        gaps = {}
        for (step, k), value in other.items():
            if k == kind:
                gaps[int(step)] = abs(value - plain[step, k])
        worst = max(gaps, key=gaps.get)
        print(f"{run} against plain, {kind}: {len(gaps)} values, largest difference "
              f"{gaps[worst]:.6f} (step {worst}), median {statistics.median(gaps.values()):.6f}")


def saving(out, run):
    """Print the milliseconds of steps during which a checkpoint was written, and of the others,
    from the console."""
    ms = {}       # by step
    busy = set()  # steps while a checkpoint was written
    waits = []
    written = []
    step = None
    for line in (out / f"{run}.console").read_text().splitlines():
        if match := STEP.match(line):
            step = int(match[1])
            ms[step] = float(match[2])
        elif match := SAVED.match(line):
            written.append(float(match[3]))
            waits.append(int(match[4]))
            busy |= set(range(int(match[1]), step + 1))
    during = [ms[step] for step in busy if step in ms]
    first = min(ms)  # it compiles
    others = [ms[step] for step in ms if step not in busy and step > first]
    print(f"{run}: {len(waits)} checkpoints, written in {min(written)} to {max(written)} s; "
          f"training waited {waits} ms for them; steps while one was written: median "
          f"{statistics.median(during):.0f}, slowest {max(during):.0f} ms ({len(during)} steps), "
          f"other steps: median {statistics.median(others):.0f}, slowest {max(others):.0f} ms "
          f"({len(others)} steps)")


def main():
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags = sys.argv[end + 1:]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kill", type=int)
    parser.add_argument("--term", type=int)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args(sys.argv[1:end])
    args.out.mkdir(parents=True, exist_ok=True)
    run_to_end(args.out, "plain", flags)
    if args.again:
        run_to_end(args.out, "again", flags)
    saving(args.out, "plain")
    if args.again:
        compare(args.out, "again")
    if args.kill:
        process = start(args.out, "killed", flags)
        stop_at(process, args.out, "killed", args.kill, signal.SIGKILL)
        process = start(args.out, "killed", flags)
        stop_at(process, args.out, "killed", args.term, signal.SIGTERM)
        run_to_end(args.out, "killed", flags)
        compare(args.out, "killed")


if __name__ == "__main__":
    main()
