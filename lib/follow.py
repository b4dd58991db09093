"""--follow: a folder of token shards that fineweb.py is still writing.

A shard has arrived once meta.json lists it and its file is whole. Shards arrive in the order of
their names, so those that have arrived are the first ones of the finished folder.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from lib.cli import BadInput, note
from lib.shard_meta import SPLITS, WRITING, read_meta, split_of
from lib.shards import Shards, digest, find_shards, listed_shards, read_header

POLL = 1.0      # seconds between looks at the folder while waiting
SILENCE = 60.0  # seconds without a sign of fineweb.py after which it counts as dead


class Watch:
    """Detects that fineweb.py no longer writes to a folder.

    Its signs of life are changes of its heartbeat file and of meta.json. File times are compared
    only with each other, as they may come from another machine's clock.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.signs: list | None = None
        self.changed = 0.0

    def is_silent(self) -> bool:
        """Whether there was no sign for SILENCE seconds, all of them since the first call."""
        signs = [stamp_of(self.folder / name) for name in (WRITING, "meta.json")]
        now = time.monotonic()
        if signs != self.signs:
            self.signs = signs
            self.changed = now
        return now - self.changed > SILENCE


def stamp_of(path: Path) -> tuple | None:
    """A value that changes when a file is written, replaced or touched; None without the file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class GrowingShards(Shards):
    """A folder of shards, finished or not. `refresh` extends `train`, `tokens` and `keys`.

    is_finished: whether all shards have arrived. identity: of the first train shard, as the others
    may not have arrived yet; lib/streams.py's FollowingStream compares those that were read.

    The constructor waits for the val split and a train shard. Raises BadInput like Shards, and if
    fineweb.py no longer writes to the folder.
    """

    def __init__(self, folder: str | Path, needed: Sequence[str] = SPLITS,
                 named_by: str = "--data"):
        wait_for_first(Path(folder), named_by)
        super().__init__(folder, needed, named_by, unfinished=True)
        self.identity = digest(("follow", self.keys[:1]))
        self.former_identity = self.identity
        self.stamp: tuple | None = None  # of the meta.json whose shards have all arrived

    @property
    def epoch_tokens(self) -> int | None:
        if self.is_finished:
            return self.tokens["train"]
        promised = self.meta.promised if self.meta else None
        return max(promised, self.tokens["train"]) if promised else None

    def has(self, epoch: int, shard: int) -> bool:
        """Whether number `shard` of an epoch has arrived; later epochs need all shards."""
        return self.is_finished or (epoch == 0 and shard < len(self.train))

    def needed(self, epoch: int, shard: int, tokens: int) -> int | None:
        """The number of train shards that must have arrived to read `tokens` tokens from the start
        of number `shard` of an epoch; one more than there are if the tokens reach into the next
        epoch. None if they have not arrived.
        """
        if epoch == 0:
            for count, path in enumerate(self.train[shard:], shard + 1):
                tokens -= self.headers[path].tokens
                if tokens <= 0:
                    return count
        return len(self.train) + 1 if self.is_finished else None

    def fingerprint(self, count: int) -> int:
        """A 60-bit hash of `count` and of the text of the first `count` train shards."""
        return int(digest((count, self.keys[:count]))[:15], 16)

    def refresh(self) -> None:
        """Add the shards that have arrived since. Raises BadInput if meta.json is damaged, or no
        longer lists the shards that were there."""
        if self.is_finished:
            return
        stamp = stamp_of(self.folder / "meta.json")
        if stamp is None or stamp == self.stamp:
            return
        meta = read_meta(self.folder)
        if meta is None:  # just removed
            return
        records = [record for record in meta.records if split_of(record.name) == "train"]
        paths = [self.folder / record.name for record in records]
        keys = [(record.tokens, record.crc32) for record in records]
        known = len(self.train)
        in_order = paths == sorted(paths)
        if (paths[:known], keys[:known]) != (self.train, self.keys) or not in_order:
            raise BadInput(f"{self.folder}/ no longer contains the shards that were read: restore "
                           "them, or start another --run_name")
        arrived = listed_shards(self.folder, meta)["train"]
        self._add(arrived[known:], keys[known:])
        self.meta = meta
        if len(arrived) == len(records):
            self.stamp = stamp
            self.is_finished = meta.complete

    def _add(self, paths: list[Path], keys: list[tuple]) -> None:
        self.headers |= {path: read_header(path) for path in paths}
        self._check_dtypes()
        self._check_splits(paths)
        self.keys += keys[:len(paths)]
        self.train += paths  # in place: the loader has this list
        self.tokens["train"] = self._count(self.train)

    def died(self) -> str:
        """The error for a folder that fineweb.py no longer writes to."""
        count = len(self.train)
        return (f"{self.folder}/ is not finished, and fineweb.py has not written to it for "
                f"{SILENCE:g} s: run {self.command()} again to continue it, or add --finish to "
                f"train on the {count} shards that are there; then repeat this command")


def wait_for_first(folder: Path, named_by: str) -> None:
    """Wait until `GrowingShards` can start. Raises BadInput if fineweb.py does not write to the
    folder."""
    watch = Watch(folder)
    started = time.monotonic()
    is_said = False
    while not can_start(folder):
        if watch.is_silent():
            raise BadInput(f"{folder}/ has no shards to start with, and fineweb.py has not written "
                           f"to it for {SILENCE:g} s: start fineweb.py, or name another "
                           f"{named_by}")
        if not is_said:
            note(f"waiting for the first shards of {folder}/")
            is_said = True
        time.sleep(POLL)
    if is_said:
        note(f"waited {time.monotonic() - started:.0f} s for the first shards of {folder}/")


def can_start(folder: Path) -> bool:
    """Whether the val split and a train shard have arrived, or cannot; `Shards` then says why."""
    meta = read_meta(folder)
    if meta is None:
        is_other = folder.exists() and not folder.is_dir()
        return is_other or any(find_shards(folder)[0].values())
    if meta.complete:
        return True
    # the val split comes first
    return bool(listed_shards(folder, meta)["train"])
