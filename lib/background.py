"""Work in the background."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def every(seconds: float, act: Callable[[], object]) -> Iterator[None]:
    """Call `act` in a thread each time that `seconds` have passed, until the block ends."""
    ended = threading.Event()

    def run():
        while not ended.wait(seconds):
            act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
