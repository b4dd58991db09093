"""Failures of the machine (memory, compiler, disk) as one-line errors."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from lib import checkpoint
from lib.cli import RankError, is_broken
from lib.files import DISK_FULL, LOST

# modules of torch.compile's errors; importing the classes themselves takes a second
COMPILER_ERRORS = ("torch._dynamo.exc", "torch._inductor.exc")


@contextlib.contextmanager
def explain_failures(cfg: Any, micro_batch: int | None = None) -> Iterator[None]:
    """Raise failures of the machine as RankErrors that name the flag to change.

    cfg: a TrainConfig. micro_batch: sequences per forward pass, once known.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise RankError(f"out of GPU memory with --micro_batch {micro_batch or cfg.micro_batch}: "
                        "give a smaller one") from error
    except (RuntimeError, MemoryError) as error:
        if checkpoint.is_memory(error):
            raise RankError("out of memory: free some, raise `ulimit -v`, or give a smaller "
                            "--micro_batch") from error
        if type(error).__module__ in COMPILER_ERRORS:
            raise RankError(f"torch.compile failed ({str(error).splitlines()[0]}): "
                            "fix the compiler, or give --no-compile") from error
        raise
    except OSError as error:
        if error.errno not in LOST or is_broken(sys.stdout):  # it may be the console's disk
            raise
        if error.errno in DISK_FULL:
            raise RankError(f"the disk of {cfg.log_dir} is full: free some space and run the same "
                            "command again to continue from the newest checkpoint") from error
        raise RankError(f"the disk of {error.filename or cfg.log_dir} fails ({error.strerror}): "
                        "check it and run the same command again to continue from the newest "
                        "checkpoint") from error
