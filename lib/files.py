"""Read and write files safely, without importing torch.

`open_file` only opens regular files, so that a pipe cannot hang a script and /dev/zero cannot fill
its memory. `replace` writes atomically. `locked` lets only one process at a time use a folder.
"""

import contextlib
import errno
import glob
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lib.cli import BadInput

TEXT_LIMIT = 2**28  # bytes; a meta.json, tokenizer.json or config.json is far smaller
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Errors of fsync that mean lost data; any other means that the file system (SMB, drvfs, FUSE) does
# not support it.
LOST = (errno.EIO, *DISK_FULL)
HIDDEN = (".", "_")  # first characters of files of editors, notebooks, macOS and unfinished jobs
NAMED = 20           # left-out files of a kind that are named
BOM = b"\xef\xbb\xbf"  # byte order mark, which editors on Windows prepend
# Python rejects integers with thousands of digits, and text fields have no numbers anyway
DECODER = json.JSONDecoder(parse_int=float)
BLANK = re.compile(r"\s*")


class Unreadable(BadInput):
    """A file that could not be read; its content may be fine."""


# --------------------------------------------------------------------------------------------------
# Reading. `remedy` ends the message of the error.


def open_file(path: str | Path, remedy: str) -> IO[bytes]:
    """Open a regular file for reading bytes. Raises Unreadable for anything else."""
    # without O_NONBLOCK, opening a pipe would block
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        if os.path.islink(path) and not os.path.exists(path):
            reason = f"a link to {os.readlink(path)}, which does not exist"
        raise Unreadable(f"cannot read {path} ({reason}): {remedy}") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise Unreadable(f"cannot read {path} ({kind}): {remedy}")
    return open(handle, "rb")


def read_text(path: str | Path, remedy: str, limit: int = TEXT_LIMIT) -> str:
    """The text of a UTF-8 file of at most `limit` bytes. Raises BadInput for any other."""
    with open_file(path, remedy) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise Unreadable(f"cannot read {path} ({error.strerror}): {remedy}") from error
    if len(content) > limit:
        raise BadInput(f"{path} has more than {limit:,} bytes: {remedy}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start:,}): {remedy}") from error


def is_utf16(text: str) -> bool:
    """Whether UTF-16 or UTF-32 without a byte order mark was decoded as UTF-8."""
    return text.count("\0") > len(text) / 50  # at least 4%, in Thai


def read_json(path: str | Path, remedy: str) -> Any:
    """The value in a JSON file. Raises BadInput if it cannot be read or is not JSON."""
    try:
        return json.loads(read_text(path, remedy))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged ({error}): {remedy}") from error


def read_rows(path: str | Path, remedy: str,
              check: Callable[[Any], Any] = lambda row: row) -> list:
    """[check(row)] for each row of a jsonl file.

    Raises BadInput, which names the line, if it is not JSON or `check` raises a ValueError.
    """
    rows = []
    with open_file(path, remedy) as file:
        for line in file:  # not str.splitlines, which splits inside JSON strings
            try:
                rows.append(check(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {len(rows) + 1}: {error}: {remedy}") from error
    return rows


def json_rows(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield (its place as text, for messages; row) for each row of an open JSON file.

    The file is JSON lines, an array of rows, or rows of several lines one after another. A line
    that is not JSON yields a ValueError as its row. Raises ValueError where rows of several lines
    are not JSON.
    """
    lines = _numbered_lines(file)
    first = next(lines, None)
    if first is None:
        return
    line = first[1]
    if line.lstrip().startswith(b"[") or line.strip() == b"{":
        for number, row in enumerate(_flattened(decode_json(line + file.read())), 1):
            yield f"row {number}", row
        return
    for where, line in itertools.chain([first], lines):
        try:
            rows = decode_json(line)
        except ValueError as error:
            rows = [error]
        for row in rows:
            yield where, row


def _numbered_lines(file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """("line <number>", line) for each line that is not blank."""
    for number, line in enumerate(file, 1):
        line = line.removeprefix(BOM)
        if line.strip():
            yield f"line {number}", line


def _flattened(values: list) -> Iterator[Any]:
    """The values, with lists replaced by their elements."""
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value


def decode_json(data: bytes) -> list:
    """The JSON values in UTF-8 bytes, one after another. Raises ValueError."""
    values = []
    try:
        text = data.decode()
        at = _skip_blanks(text, 0)
        while at < len(text):
            value, at = DECODER.raw_decode(text, at)
            values.append(value)
            at = _skip_blanks(text, at)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({str(error)[:80]})") from error
    return values


def _skip_blanks(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    assert match  # the pattern also matches nothing
    return match.end()


def find_files(folder: str, wanted: Callable[[str], Any]) -> tuple[list[str], list[str]]:
    """Find files below a folder -> (sorted paths whose names `wanted` accepts, lines about others).

    Hidden files, and files in hidden folders, are left out. Links are followed; a file or folder
    reached by several is taken once. Raises Unreadable if a folder cannot be listed.
    """
    found = []
    others: dict[str, list[str]] = {}
    seen = {os.path.realpath(folder)}

    def is_new(path):
        real = os.path.realpath(path)
        if real in seen:
            name = os.path.relpath(path, folder)
            others.setdefault("already read through another link", []).append(name)
            return False
        seen.add(real)
        return True

    def stop(error):
        raise Unreadable(f"cannot read {error.filename} ({error.strerror}): "
                         "make it readable, or leave it out")

    for here, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        folders[:] = [name for name in sorted(folders) if is_new(os.path.join(here, name))]
        for name in sorted(files):
            path = os.path.join(here, name)
            relative = os.path.relpath(path, folder)
            if any(part.startswith(HIDDEN) for part in Path(relative).parts):
                others.setdefault("hidden or temporary", []).append(relative)
            elif not wanted(name):
                ending = Path(name).suffix.lower() or "no ending"
                others.setdefault(ending, []).append(relative)
            elif is_new(path):
                found.append(path)
    return sorted(found), left_out(folder, others)


def left_out(folder: str, kinds: dict[str, list[str]]) -> list[str]:
    """A line about each kind of files that are not read. kinds: {kind: names}."""
    lines = []
    for kind, names in kinds.items():
        shown = [name if name.isprintable() else ascii(name) for name in names[:NAMED]]
        more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        lines.append(f"left out of {folder} ({kind}): {', '.join(shown)}{more}")
    return lines


# --------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Set the file name of an OSError; Python itself only does so when opening a file.

    An OSError without one is then the console's.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def replace(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file atomically: `path` has its old content or all of the new, flushed to the disk.

    write: called with an open binary file. If several processes replace one path at once, the last
    wins. Unfinished content is in <name>.<8 hex digits>.tmp; a killed process leaves that file
    behind, and the next `replace` of the same path removes it.
    """
    path = Path(path)
    for leftover in leftovers(path.parent, glob.escape(path.name)):
        _remove_unlocked(leftover)
    partial, file = _open_partial(path)
    try:
        with naming(path), file:
            write(file)
            file.flush()
            sync(file.fileno())
            if os.name == "nt":
                file.close()  # Windows renames closed files only; elsewhere, closing unlocks it
            _rename(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def leftovers(folder: Path, name: str) -> list[Path]:
    """The temporary files of `replace` in `folder` for files whose names match the glob `name`."""
    earlier = folder.glob(f"{name}.tmp")  # named by earlier versions
    return [*earlier, *folder.glob(f"{name}.{'[0-9a-f]' * 8}.tmp")]


def _open_partial(path: Path) -> tuple[Path, IO[bytes]]:
    """Create a temporary file next to `path`, locked while it is open -> (its path, the file)."""
    while True:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        file = open(partial, "xb")  # noqa: SIM115 (closed by the caller)
        if _lock(file) is not False and os.fstat(file.fileno()).st_nlink:
            return partial, file
        file.close()  # another process removed it before it was locked


def _remove_unlocked(partial: Path) -> None:
    """Remove a temporary file whose writer was killed, so its lock is free.

    Without file locks it stays, as it might still be in use.
    """
    with contextlib.suppress(OSError), open(partial, "r+b") as file:
        if _lock(file):
            partial.unlink()


def _lock(file: IO[bytes] | int, wait: bool = False) -> bool | None:
    """Lock an open file, or a folder's descriptor, until it is closed.

    Returns True on success, False if another process holds the lock and `wait` is not set, None if
    the system or file system has no locks.
    """
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def move(source: str | Path, path: str | Path) -> None:
    """Rename a complete file on the same disk, flushed to the disk first."""
    with naming(source), open(source, "r+b") as file:
        sync(file.fileno())
    _rename(source, Path(path))


def _rename(source: str | Path, path: Path) -> None:
    os.replace(source, path)
    if os.name == "posix":
        with naming(path.parent), _optional():
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name is part of the folder
            finally:
                os.close(folder)


def sync(handle: int) -> None:
    """Flush an open file to the disk if its file system can. Raises OSError if data is lost."""
    with _optional():
        os.fsync(handle)


@contextlib.contextmanager
def _optional() -> Iterator[None]:
    """A flush that the file system may not support. Raises OSError only if data is lost."""
    try:
        yield
    except OSError as error:
        if error.errno in LOST:
            raise


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically."""
    replace(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def check_appendable(path: Path, remedy: str) -> None:
    """Raises BadInput, ending in `remedy`, unless an existing file can be opened for appending.

    It cannot if it is a folder, a pipe or immutable.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)))
        if not path.is_file():
            raise OSError(0, "not a regular file")
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error.strerror}): {remedy}") from error


def check_room(folder: str | Path, needed: int, what: str, remedy: str) -> None:
    """Raises BadInput if the disk of `folder` has fewer than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(f"{what} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB "
                       f"free: {remedy}")


# --------------------------------------------------------------------------------------------------
# Folders


def make_folder(folder: str | Path, remedy: str) -> list[Path]:
    """Create a folder with its parents and check that files can be written there.

    Returns the created folders, innermost first. On failure, removes them and raises BadInput,
    ending in `remedy`.
    """
    made: list[Path] = []
    try:
        for path in (*reversed(Path(folder).parents), Path(folder)):
            with contextlib.suppress(OSError, ValueError):  # exists, or the next line raises
                path.mkdir()
                made.insert(0, path)
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        remove_empty(made)
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot write to {folder} ({reason}): {remedy}") from error
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove nested folders, innermost first, up to the first that is not empty."""
    with contextlib.suppress(OSError):  # not empty
        for path in folders:
            path.rmdir()


@contextlib.contextmanager
def new_folder(folder: str | Path, remedy: str) -> Iterator[None]:
    """`make_folder` for the block; if the block fails, removes created folders that are empty."""
    made = make_folder(folder, remedy)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


@contextlib.contextmanager
def locked(folder: str | Path, remedy: str,
           wait: Callable[[], Any] | None = None) -> Iterator[None]:
    """Hold the lock of a folder; it is released however the process ends.

    A no-op where folders cannot be locked. If another process holds the lock, calls `wait` and
    waits; without `wait`, raises BadInput, ending in `remedy`.
    """
    handle = None
    with contextlib.suppress(OSError):  # Windows does not open folders
        handle = os.open(folder, os.O_RDONLY)
    try:
        if handle is not None and _lock(handle) is False:
            if wait is None:
                raise BadInput(f"{folder} is in use by another process: {remedy}")
            wait()
            _lock(handle, wait=True)
        yield
    finally:
        if handle is not None:
            os.close(handle)
