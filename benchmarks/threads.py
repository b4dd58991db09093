"""Training speed on a CPU by how OpenMP's threads wait: lib/startup.py's setting against others.

    python benchmarks/threads.py --data docstrings                # on an otherwise idle machine
    python benchmarks/threads.py --data docstrings --busy 2       # next to two busy processes

Each run is `train_gpt2.py --preset tiny` for --seconds of steps. All settings run in turn, --rounds
times. The result of a run is the median of its steps; the result of a setting is the median of its
runs.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "libgomp's own (spin 3 ms)": {"GOMP_SPINCOUNT": "300000"},
    "lib/startup.py's (10 us)": {},
    "OMP_WAIT_POLICY=PASSIVE (none)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
STEP = re.compile(r"step (\d+) \|.*\| ([\d,]+) tok/s")


def run(setting, args, folder):
    """Median tokens per second of a run's steps."""
    command = [
        sys.executable, ROOT / "train_gpt2.py", "--preset=tiny", f"--data={args.data}",
        "--max_steps=2000", "--log_every=1", "--eval_every=0", "--sample_every=0", "--save_every=0",
        "--save_minutes=0", f"--log_dir={folder}", f"--run_name={time.time_ns()}",
    ]
    env = dict(os.environ)
    for name in os.environ:
        if name.startswith(("OMP_", "GOMP_")):
            del env[name]
    process = subprocess.Popen(command, env=env | setting, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    try:
        return statistics.median(rates_of(process.stdout, args.seconds))
    finally:
        process.kill()
        process.wait()


def rates_of(console, seconds):
    """Tokens per second of each step after the second, for `seconds`, and at least two steps."""
    rates = []
    end = None
    for line in console:
        match = STEP.match(line)
        if not match:
            continue
        end = end or time.monotonic() + seconds
        if int(match[1]) >= 2:
            rates.append(float(match[2].replace(",", "")))
        if time.monotonic() > end and len(rates) >= 2:
            break
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    args = parser.parse_args()
    loop = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(loop) for _ in range(args.busy)]
    found = {name: [] for name in SETTINGS}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(args.rounds):
                for name, setting in SETTINGS.items():
                    found[name].append(run(setting, args, folder))
                    print(f"{name}: {found[name][-1]:,.0f} tok/s, load {os.getloadavg()[0]:.1f}",
                          flush=True)
    finally:
        for process in spinning:
            process.kill()
    for name, rates in found.items():
        each = ", ".join(f"{rate:,.0f}" for rate in rates)
        print(f"| {name} | {statistics.median(rates):,.0f} | {each} |")


if __name__ == "__main__":
    main()
