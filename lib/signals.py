"""Requests to stop: signals become a flag that the training loop reads, agreed on by all processes.
"""

import os
import signal
import socket
import sys
import threading
import time

PATIENCE = 20.0  # seconds
ECHO = 2.0       # seconds
ORDERS = ("SIGTERM", "SIGINT", "SIGHUP")
NOTICES = ("SIGUSR1", "SIGUSR2", "SIGXCPU")  # from schedulers, ahead of the end: SLURM, SGE, LSF


def numbers(names):
    """The signals of these names that the system has."""
    return {getattr(signal, name) for name in names if hasattr(signal, name)}


early = []  # NOTICES that came before StopSignals, or after it


def hold_notices():
    """From here on, NOTICES wait for StopSignals, where they would end the process."""
    early.clear()
    if threading.current_thread() is threading.main_thread():
        for number in numbers(NOTICES):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, lambda number, frame: early.append(number))


class StopSignals:
    """ORDERS and NOTICES, while `with` lasts: the first sets `received` to its name.
    An order that comes ECHO seconds or more after the first order ends the process.

    A thread listens, since Python runs signal handlers in the main thread alone, which may hang in
    a collective after another process has died. With other processes (`world_size` above 1) the
    main thread has PATIENCE seconds after the first signal to ask for `requested`, or the process
    is ended: torchrun kills what has not ended after 30 s. Repeats before ECHO seconds count as
    one: torchrun passes on what the terminal has already sent, timeout(1) signals its child, then
    its group.
    """

    def __init__(self, say, processes):
        self.say, self.processes = say, processes
        self.patience = PATIENCE if processes.world_size > 1 else None
        self.received, self.agreed, self.taken, self.threads = None, False, threading.Event(), []

    def heard(self):
        """The main thread is alive; what it does from here on may take its time."""
        self.taken.set()

    @property
    def requested(self):
        """Whether a signal came to this process. Asking shows that the main thread is alive."""
        if self.received is not None:
            self.heard()
        return self.received is not None

    def agree(self, requests=None):
        """Whether a signal came to any process: the same answer everywhere.

        requests: how many processes have one, where the caller has summed that; without it, every
        process must ask.
        """
        if not self.agreed:
            self.agreed = (self.processes.sum([self.requested])[0]
                           if requests is None else requests) > 0
        if self.agreed:
            self.heard()
        return self.agreed

    def __enter__(self):
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            self.before = dict.fromkeys(numbers(ORDERS + NOTICES))
            for number in numbers(("SIGHUP", *NOTICES)):
                if signal.getsignal(number) == signal.SIG_IGN:
                    del self.before[number]  # nohup: the run is meant to outlive its terminal
            for number in self.before:  # a handler must exist for the number to be written to the socket
                self.before[number] = signal.signal(number, lambda *_: None)
            self.before_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
            self._start(self._listen)
            self.writer.send(bytes(early))
        return self

    def __exit__(self, *_):
        if self.before is not None:
            signal.set_wakeup_fd(self.before_fd)
            for number, handler in self.before.items():
                signal.signal(number, handler)
            self.writer.close()  # ends the listener
        self.taken.set()
        # the last one to hold a tensor (through `say`) must not drop it while Python shuts down:
        # that aborts
        for thread in self.threads:
            thread.join()
        if self.before is not None:
            self.reader.close()

    def _start(self, target):
        self.threads.append(threading.Thread(target=target, daemon=True))
        self.threads[-1].start()

    def _listen(self):
        first_order = None
        while number := self.reader.recv(1):
            if number[0] not in self.before:
                continue
            name = signal.Signals(number[0]).name
            if self.received is None:
                self.received = name
                if self.patience:
                    self._start(self._impatient)
                line = f"{name}: this step is finished, then the run is saved"
                if name in ORDERS:
                    line += f"; another signal, from {ECHO:g} s on, ends it at once"
                self.say(line)
            if name in NOTICES:
                continue
            if first_order is None:
                first_order = time.monotonic()  # a slow console holds up what came meanwhile, too
            elif time.monotonic() - first_order > ECHO:
                os._exit(128 + number[0])

    def _impatient(self):
        if not self.taken.wait(self.patience):
            print(
                f"{self.received}, and this process did not come to the end of its step within {self.patience:g} s",
                file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
