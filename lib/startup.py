"""What a script's process needs before torch is imported, so each script imports this first.

It acts only where a script of this project is the main program: a test, a notebook or another
script that imports one changes nothing. Python's standard library alone, so that it is there at
once.

1. While OpenMP's threads wait for each other, they spin; on busy cores they take the time of the
   very thread they wait for, and training is 1.2 to 3 times slower, at worst 20 times. They sleep
   instead after a short spin (benchmarks/threads_cpu_202611.md). torch's wheels for Linux hold
   GNU's OpenMP, which reads GOMP_SPINCOUNT before OMP_WAIT_POLICY; LLVM's and Intel's (macOS,
   conda) read OMP_WAIT_POLICY. The number of threads stays as it is: it changes the order of sums,
   and with it the losses.
2. Ctrl-C while Python still imports ends in one line and exit code 130.
3. No garbage collection while Python still imports: it looks through all objects again and again, a
   quarter of the time that torch takes (benchmarks/cold_start_h200_202611.md).

lib/cli.py's `run` ends the last two by `imported`.
"""

import gc
import os
import signal
import sys

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def is_script():
    """Whether the main program of this process is one of this project's scripts."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    return path is not None and os.path.dirname(os.path.abspath(path)) == ROOT


def let_threads_sleep():
    """Have OpenMP's waiting threads sleep, unless the environment says how they wait."""
    if not {*WAITING, "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ.update(WAITING)


def leave_quietly(*_):
    """SIGINT before there is anything to save. Not an exception: imports swallow some, and print
    others."""
    if os.environ.get("RANK", "0") == "0":  # the one process that speaks for all of torchrun's
        os.write(2, b"\ninterrupted\n")
    os._exit(130)


def interrupt_quietly():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored
        signal.signal(signal.SIGINT, leave_quietly)


def imported():
    """From here on, Ctrl-C raises KeyboardInterrupt, and garbage is collected."""
    gc.enable()
    if signal.getsignal(signal.SIGINT) is leave_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_script():
    let_threads_sleep()
    interrupt_quietly()
    gc.disable()
