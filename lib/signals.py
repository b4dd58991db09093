"""Stop requests: signals set a flag that the training loop reads; all processes agree on it."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

PATIENCE = 20.0  # seconds
ECHO = 2.0       # seconds
ORDERS = ("SIGTERM", "SIGINT", "SIGHUP")
NOTICES = ("SIGUSR1", "SIGUSR2", "SIGXCPU")  # schedulers' warnings of the end: SLURM, SGE, LSF

early: list[int] = []  # NOTICES that came while no StopSignals was listening


def numbers(names: Iterable[str]) -> set[int]:
    """The numbers of those signals that the system has."""
    return {getattr(signal, name) for name in names if hasattr(signal, name)}


def hold_notices() -> None:
    """Keep NOTICES for StopSignals from now on; by default they end the process."""
    early.clear()
    if threading.current_thread() is not threading.main_thread():
        return
    for number in numbers(NOTICES):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, frame: early.append(number))


class StopSignals:
    """Listens to ORDERS and NOTICES inside `with`: the first one sets `received` to its name.

    Another order, ECHO seconds or more after the first, ends the process at once. Earlier repeats
    are ignored: torchrun forwards signals that the terminal has already sent, and timeout(1)
    signals its child, then its group.

    A thread listens, since Python runs signal handlers in the main thread, which may hang in a
    collective after another process has died. With several processes the main thread has PATIENCE
    seconds after the first signal to read `requested`; after that the process is ended, as torchrun
    kills processes after 30 s.
    """

    def __init__(self, say: Callable[[str], Any], processes: Any,
                 limit: Callable[[], Any] = lambda: False):
        """limit: returns whether this process has another reason to stop."""
        self.say = say
        self.processes = processes
        self.limit = limit
        self.patience = PATIENCE if processes.world_size > 1 else None
        self.received: str | None = None
        self.agreed = False
        self.main_is_alive = threading.Event()
        self.threads: list[threading.Thread] = []
        self.handlers: dict[int, Any] = {}  # those to restore, by signal

    def heard(self) -> None:
        """Stop the PATIENCE timer: the main thread is alive, but may be busy from here on."""
        self.main_is_alive.set()

    @property
    def requested(self) -> bool:
        """Whether this process got a signal, or has reached a limit. Reading it shows that the main
        thread is alive."""
        if self.received is None:
            return bool(self.limit())
        self.heard()
        return True

    def agree(self, requests: float | None = None) -> bool:
        """Whether any process requests a stop, with the same answer on all processes.

        requests: the number of processes that do, if the caller has summed it. Without it, every
        process must call this.
        """
        if not self.agreed:
            if requests is None:
                requests = self.processes.sum([self.requested])[0]
            self.agreed = requests > 0
        if self.agreed:
            self.heard()
        return self.agreed

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._install()
        return self

    def _install(self) -> None:
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        handled = numbers(ORDERS + NOTICES)
        for number in numbers(("SIGHUP", *NOTICES)):
            if signal.getsignal(number) == signal.SIG_IGN:  # nohup: outlive the terminal
                handled.discard(number)
        for number in handled:  # a signal is written to the socket only if it has a handler
            self.handlers[number] = signal.signal(number, lambda *_: None)
        self.before_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self._start(self._listen)
        self.writer.send(bytes(early))

    def __exit__(self, *_) -> None:
        if self.handlers:
            signal.set_wakeup_fd(self.before_fd)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.writer.close()  # ends the listener
        self.heard()
        # Python aborts if a thread drops the last reference to a tensor (through `say`) while it
        # shuts down.
        for thread in self.threads:
            thread.join()
        if self.handlers:
            self.reader.close()

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _listen(self) -> None:
        first_order = None
        while number := self.reader.recv(1):
            if number[0] not in self.handlers:
                continue
            name = signal.Signals(number[0]).name
            if self.received is None:
                self._receive(name)
            if name in NOTICES:
                continue
            if first_order is None:
                # after `say`, so that repeats read after a slow console count as one, too
                first_order = time.monotonic()
            elif time.monotonic() - first_order > ECHO:
                os._exit(128 + number[0])

    def _receive(self, name: str) -> None:
        self.received = name
        if self.patience:
            self._start(self._end_if_stuck)
        line = f"{name}: this step is finished, then the run is saved"
        if name in ORDERS:
            line += f"; another signal after {ECHO:g} s ends it at once"
        self.say(line)

    def _end_if_stuck(self) -> None:
        if not self.main_is_alive.wait(self.patience):
            print(f"{self.received}, but this process did not finish its step within "
                  f"{self.patience:g} s", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
