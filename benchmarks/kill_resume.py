"""Kill a training run, let it come back, and compare it with an undisturbed one; what saving in the
background costs.

    python benchmarks/kill_resume.py --out kill --kill 33 --term 55 -- --data DIR --max_steps 80 --save_every 20 ...

Everything behind -- goes to train_gpt2.py. Runs `plain` undisturbed and `killed` three times:
SIGKILL once its log.txt holds step --kill, the same command again, SIGTERM at step --term, the same
command again. Prints the largest differences of train and val losses, and how long steps took while
a checkpoint was written. With --again a second undisturbed run shows what differs without any kill;
without --kill there is only `plain`.
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


def start(out, run, flags):
    command = [
        sys.executable,
        os.path.relpath(ROOT / "train_gpt2.py"), *flags, "--log_dir",
        str(out), "--run_name", run
    ]
    with open(out / f"{run}.console", "a") as console:
        return subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT,
                                env=os.environ | {"PYTHONUNBUFFERED": "1"})


def steps_logged(out, run):
    log = out / run / "log.txt"
    return [int(line.split()[0])
            for line in log.read_text().splitlines()
            if " train " in line] if log.exists() else []


def stop_at(process, out, run, step, signum):
    while max(steps_logged(out, run), default=-1) < step:
        if process.poll() is not None:
            sys.exit(f"{run} ended by itself: see {out / run}.console")
        time.sleep(0.05)
    process.send_signal(signum)
    print(
        f"{signal.Signals(signum).name} after step {max(steps_logged(out, run))}, exit code {process.wait()}"
    )


def losses(out, run):
    return {
        tuple(line.split()[:2]): float(line.split()[2])
        for line in (out / run / "log.txt").read_text().splitlines()
    }


def compare(out, run):
    plain, other = losses(out, "plain"), losses(out, run)
    assert plain.keys() == other.keys() and len(other) == len(
        (out / run / "log.txt").read_text().splitlines())
    for kind in ("train", "val"):
        gaps = {
            int(step): abs(value - plain[step, k])
            for (step, k), value in other.items()
            if k == kind
        }
        worst = max(gaps, key=gaps.get)
        print(f"{run} against plain, {kind}: {len(gaps)} values, largest difference {gaps[worst]:.6f} (step {worst}), "
              f"median {statistics.median(gaps.values()):.6f}")


def saving(out, run):
    """Milliseconds of steps during which a checkpoint was being written, and of the others, from
    the console."""
    busy, waits, written, previous = set(), [], [], None
    lines = (out / f"{run}.console").read_text().splitlines()
    seconds = {int(m[1]): float(m[2]) for m in map(STEP.match, lines) if m}
    for line in lines:
        if m := STEP.match(line):
            previous = int(m[1])
        elif m := re.match(
                r"saved .*ckpt_(\d+)\.pt, ([\d.]+) GB in ([\d.]+) s; training waited (\d+) ms",
                line):
            waits.append(int(m[4]))
            written.append(float(m[3]))
            busy |= set(range(int(m[1]), previous + 1))
    during = [seconds[step] for step in busy if step in seconds]
    others = [ms for step, ms in seconds.items()
              if step not in busy and step > min(seconds)]  # the first compiles
    print(f"{run}: {len(waits)} checkpoints, written in {min(written)} to {max(written)} s; "
          f"training waited {waits} ms for them; steps while one was written: median {statistics.median(during):.0f}, "
          f"slowest {max(during):.0f} ms ({len(during)} steps), "
          f"other steps: median {statistics.median(others):.0f}, slowest {max(others):.0f} ms ({len(others)} steps)")


def main():
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kill", type=int)
    parser.add_argument("--term", type=int)
    parser.add_argument("--again", action="store_true")
    args, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1:]
    args.out.mkdir(parents=True, exist_ok=True)
    for run in ("plain", "again") if args.again else ("plain",):
        assert start(args.out, run, flags).wait() == 0, f"see {args.out / run}.console"
    saving(args.out, "plain")
    if args.again:
        compare(args.out, "again")
    if args.kill:
        stop_at(start(args.out, "killed", flags), args.out, "killed", args.kill, signal.SIGKILL)
        stop_at(start(args.out, "killed", flags), args.out, "killed", args.term, signal.SIGTERM)
        assert start(args.out, "killed", flags).wait() == 0
        compare(args.out, "killed")


if __name__ == "__main__":
    main()
