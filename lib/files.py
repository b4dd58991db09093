"""Files as this project reads and writes them: regular, whole, its own. Needs no torch.

Reading: `open_file` opens regular files only, so that a pipe cannot hang a script and /dev/zero cannot fill its memory.
Writing: `replace` leaves a path as it was or whole. `locked` keeps two processes out of one folder.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

from lib.cli import BadInput

TEXT_LIMIT = 2**28  # bytes; a meta.json, tokenizer.json or config.json is far smaller
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Unreadable(BadInput):
    """A file that could not be read, which says nothing about what is in it."""


def open_file(path, remedy):
    """A regular file, opened for reading bytes. Raises Unreadable, whose message ends in `remedy`, for anything else."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # a pipe would wait
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        if os.path.islink(path) and not os.path.exists(path):
            reason = f"a link to {os.readlink(path)}, which does not exist"
        raise Unreadable(f"cannot read {path} ({reason}): {remedy}") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise Unreadable(f"cannot read {path} ({'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}): {remedy}")
    return open(handle, "rb")


def read_text(path, remedy, limit=TEXT_LIMIT):
    """The text of a UTF-8 file of at most `limit` bytes. Raises BadInput, ending in `remedy`, if it is not one."""
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


def read_json(path, remedy):
    """The object a JSON file holds. Raises BadInput, ending in `remedy`, if it cannot be read or is not JSON."""
    try:
        return json.loads(read_text(path, remedy))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged ({error}): {remedy}") from error


def read_rows(path, remedy, check=lambda row: row):
    """A list of what `check` makes of each line of a jsonl file. Raises BadInput naming the line:
    not JSON, or a ValueError of `check`."""
    rows = []
    with open_file(path, remedy) as file:  # split at newlines alone: JSON may hold what str.splitlines splits at
        for line in file:
            try:
                rows.append(check(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {len(rows) + 1}: {error}: {remedy}") from error
    return rows


@contextlib.contextmanager
def naming(path):
    """Let an OSError of writing a file name it, as one of opening it does; one of the console names nothing."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def replace(path, write):
    """Call `write` with a binary file, so that `path` holds either what it held before or all that was written,
    flushed to the disk."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    try:
        with naming(path), open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _rename(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def move(source, path):
    """Give a whole file of the same disk another name, flushed to the disk first."""
    with naming(source), open(source, "r+b") as file:
        os.fsync(file.fileno())
    _rename(source, Path(path))


def _rename(source, path):
    os.replace(source, path)
    if os.name == "posix":  # the new name itself is on the disk once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        with naming(path.parent):
            os.fsync(folder)
        os.close(folder)


def write_json(path, value):
    """Write a JSON file by `replace`."""
    replace(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def make_folder(folder, remedy):
    """Make a folder, with its parents, and see that files can be written there.

    Returns the folders made, the innermost first. Raises BadInput, ending in `remedy`, with none of
    them left.
    """
    made = []
    try:
        for path in (*reversed(Path(folder).parents), Path(folder)):
            with contextlib.suppress(OSError, ValueError):  # there already, or the next line says why not
                path.mkdir()
                made.insert(0, path)
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        remove_empty(made)
        raise BadInput(f"cannot write to {folder} ({getattr(error, 'strerror', None) or error}): {remedy}") from error
    return made


def remove_empty(folders):
    """Remove nested folders, the innermost first, up to one in which something was written."""
    with contextlib.suppress(OSError):  # not empty
        for path in folders:
            path.rmdir()


@contextlib.contextmanager
def new_folder(folder, remedy):
    """`make_folder`. If what follows fails, those made here go again, unless something was written there."""
    made = make_folder(folder, remedy)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def check_room(folder, needed, what, remedy):
    """Raises BadInput if the disk of `folder` has fewer than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(f"{what} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free: {remedy}")


@contextlib.contextmanager
def locked(folder, remedy):
    """Hold the lock of a folder; it goes with the process, however that ends. Raises BadInput, ending in `remedy`,
    if another holds it."""
    handle = None
    try:
        import fcntl  # not on Windows

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BadInput(f"{folder} is in use by another process: {remedy}") from error
    except (ImportError, OSError):
        pass  # no such locks here
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
