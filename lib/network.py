"""Check that a server answers before a library waits for it without a time limit."""

import contextlib
import threading

PATIENCE = 10.0  # seconds; only a network that drops packets takes as long


def is_reachable(url: str) -> bool:
    """Whether a server answers within PATIENCE seconds, with any status."""
    import requests  # slow to import, and not before a download

    answered = threading.Event()

    def ask():
        with contextlib.suppress(requests.RequestException, OSError):
            requests.head(url, timeout=PATIENCE)
            answered.set()

    # a thread, as resolving a host name has no time limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answered.is_set()
