"""Several nodes: processes of several torchruns agree on an attempt, and on where a run continues.

Each torchrun counts its own restarts, so the counts may differ. `meet` does not need them: each
process calls rank 0 under a name of its own, and rank 0 answers with a new attempt. All use the
store that the torchruns share. Every wait ends after LIMIT, or once another process fails.
"""

import functools
import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lib.cli import BadInput, RankError, launched, on_failure

T = TypeVar("T")

LIMIT = 600.0  # seconds; processes start, and rank 0 reads a checkpoint
POLL = 0.1     # seconds
REMEDY = ("open all ports between the nodes, and name the network device that joins them, "
          "NCCL_SOCKET_IFNAME=eth0 for GPUs, GLOO_SOCKET_IFNAME=eth0 for CPUs")
FAILED = "failed"
CURRENT = "current attempt"


def several() -> bool:
    """Whether this process belongs to several nodes."""
    env = launched()
    return env is not None and env["world_size"] > env["local_world_size"]


def place() -> str:
    """Where the processes meet."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


# --------------------------------------------------------------------------------------------------
# Meeting


def connect() -> Any:
    """torchrun's store, which outlives restarts. Raises RuntimeError, ValueError or OSError."""
    socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # torch would retry for half an hour
    limit: dict[str, Any] = {"timeout": timedelta(seconds=LIMIT)} if several() else {}
    store = next(dist.rendezvous("env://", **limit))[0]
    while isinstance(store, dist.PrefixStore):  # its prefix would be the restart count
        store = store.underlying_store
    return store


@functools.cache
def meet() -> Any:
    """A store that only this attempt's processes use. Raises RankError if not all arrive."""
    env = launched()
    assert env
    try:
        store = connect()
        attempt = _invite(store, env["world_size"]) if env["rank"] == 0 else _call(store, env)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:100]
        raise RankError(f"this node cannot reach rank 0 at {place()} ({reason}): open all "
                        "ports between the nodes, and give each torchrun --local_addr with an "
                        "address of its node that the others reach") from error
    shared = dist.PrefixStore(attempt, store)
    on_failure.append(functools.partial(_tell, shared))
    return shared


def _invite(store: Any, world_size: int) -> str:
    """Rank 0: answer every call until all ranks have confirmed -> the attempt."""
    attempt = f"attempt {uuid.uuid4().hex}"
    if store.check([CURRENT]):
        _end(store, store.get(CURRENT).decode(), 0)
    store.set(CURRENT, attempt)
    missing = set(range(1, world_size))
    end = time.monotonic() + LIMIT
    while missing:
        for rank in sorted(missing):
            if store.check([f"call {rank}"]):  # it may be a dead process's, until the next one
                caller = store.get(f"call {rank}").decode()
                store.set(f"answer {caller}", attempt)
            if store.check([f"{attempt}/{rank}"]):
                missing.discard(rank)
        if time.monotonic() > end:
            raise RankError(f"{len(missing)} of {world_size} processes (the first: rank "
                            f"{min(missing)}) did not start within {LIMIT:g} s: see the errors on "
                            "their nodes, and start the same command on every node")
        time.sleep(POLL)
    return attempt


def _call(store: Any, env: dict[str, int]) -> str:
    """The other ranks: call rank 0 until it answers -> the attempt."""
    rank = env["rank"]
    if store.check([CURRENT]):
        before = store.get(CURRENT).decode()
        if store.check([f"{before}/{rank}"]):  # another process of this rank was part of it
            _end(store, before, rank)
    caller = uuid.uuid4().hex
    store.set(f"call {rank}", caller)
    attempt = _wait(store, f"answer {caller}", "did not answer").decode()
    store.set(f"{attempt}/{rank}", b"")
    return attempt


def _end(store: Any, attempt: str, rank: int) -> None:
    """End the processes of an earlier attempt that are still waiting."""
    line = f"rank {rank} was started again: start this node's torchrun again, too"
    dist.PrefixStore(attempt, store).set(FAILED, line)


def _tell(shared: Any, line: str) -> None:
    """End the other waiting processes with this process's error."""
    try:
        if not shared.check([FAILED]):
            shared.set(FAILED, f"on {socket.gethostname()}: {line}")
    except RuntimeError:  # the store's node is gone
        pass


def _wait(store: Any, key: str, what: str) -> bytes:
    """The value of `key` once another process has set it. Raises BadInput if it does not."""
    try:
        return _poll(store, key, what)
    except RuntimeError as error:
        raise RankError(f"the torchrun of rank 0, at {place()}, has ended: see its errors, and "
                        "start the same command on every node") from error


def _poll(store: Any, key: str, what: str) -> bytes:
    end = time.monotonic() + LIMIT
    while not store.check([key]):
        if store.check([FAILED]):
            raise BadInput(store.get(FAILED).decode())
        if time.monotonic() > end:
            raise RankError(f"rank 0, at {place()}, {what} within {LIMIT:g} s: see the errors on "
                            "its node, and start the same command on every node")
        time.sleep(POLL)
    return store.get(key)


def ready() -> Any:
    """The store of `meet`, once every process is ready to join the process group."""
    env = launched()
    assert env
    shared = meet()
    shared.set(f"ready {env['rank']}", b"")
    if env["rank"] == 0:
        for rank in range(env["world_size"]):
            _wait(shared, f"ready {rank}", f"waited for rank {rank}, which was not ready")
        shared.set("all ready", b"")
    _wait(shared, "all ready", "did not begin")
    return shared


# --------------------------------------------------------------------------------------------------
# Sharing


def from_rank_0(key: str, make: Callable[[], T], outline: Callable[[T], T]) -> T:
    """Rank 0's `make()`; the other ranks get its `outline`, pickled. Raises BadInput if rank 0
    fails."""
    env = launched()
    assert env
    shared = meet()
    if env["rank"] > 0:
        return pickle.loads(_wait(shared, key, f"did not send its {key}"))
    value = make()
    shared.set(key, pickle.dumps(outline(value)))
    return value
