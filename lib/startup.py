"""Prepares a script's process before torch is imported: every script imports this first.

It only acts if a script of this project is the main program, so tests, notebooks and other scripts
can import one without side effects. It uses the standard library only, which imports fast.

1. OpenMP's threads sleep while they wait for each other. By default they spin, which on busy cores
   takes time from the very thread they wait for: training is 1.2 to 3 times slower, at worst 20
   times (benchmarks/threads_cpu_202611.md). torch's Linux wheels contain GNU's OpenMP, which reads
   GOMP_SPINCOUNT first; LLVM's and Intel's (macOS, conda) read OMP_WAIT_POLICY. The number of
   threads stays: it changes the order of sums, and with it the losses.
2. Ctrl-C during imports ends in one line and exit code 130.
3. A torch that is too old ends in one line, not in an ImportError.
4. Garbage collection is off during imports, where it takes a quarter of torch's import time
   (benchmarks/cold_start_h200_202611.md).

lib/cli.py's `run` ends the second and the last by calling `imported`.
"""

import gc
import os
import re
import signal
import sys
import time

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
OLDEST_TORCH = (2, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

start_times: list[float] = []  # of this script's process, until `take_start`


def is_script() -> bool:
    """Whether the main program is one of this project's scripts."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    return path is not None and os.path.dirname(os.path.abspath(path)) == ROOT


def let_threads_sleep() -> None:
    """Have OpenMP's waiting threads sleep, unless the environment sets how they wait."""
    if not {*WAITING, "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ.update(WAITING)


def leave_quietly(*_) -> None:
    """Handle SIGINT before there is anything to save.

    It raises no exception: some imports swallow those, others print them.
    """
    if os.environ.get("RANK", "0") == "0":  # one line for all of torchrun's processes
        os.write(2, b"\ninterrupted\n")
    os._exit(130)


def interrupt_quietly() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if Ctrl-C is ignored
        signal.signal(signal.SIGINT, leave_quietly)


def check_torch() -> None:
    from importlib import metadata  # torch imports it, too

    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers >= OLDEST_TORCH:
        return
    if os.environ.get("RANK", "0") == "0":
        name = os.path.basename(sys.argv[0])
        oldest = ".".join(map(str, OLDEST_TORCH))
        print(f"{name}: error: torch {version} is too old, {oldest} is needed: "
              "pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)


def elapsed() -> float:
    """Seconds since the start of the script, until `take_start`; 0 for a further run."""
    return time.monotonic() - start_times[-1] if start_times else 0.0


def take_start() -> float:
    """time.monotonic() at the start of the script; now, for a further run in the same process."""
    return start_times.pop() if start_times else time.monotonic()


def imported() -> None:
    """Call after imports: Ctrl-C raises KeyboardInterrupt again, garbage is collected again."""
    gc.enable()
    if signal.getsignal(signal.SIGINT) is leave_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_script():
    start_times.append(time.monotonic())
    let_threads_sleep()
    interrupt_quietly()
    check_torch()
    gc.disable()
