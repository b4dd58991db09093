"""Files as this project reads and writes them: regular, whole, its own. Needs no torch.

Reading: `open_file` opens regular files only, so that a pipe cannot hang a script and /dev/zero
cannot fill its memory. Writing: `replace` leaves a path as it was or whole. `locked` keeps two
processes out of one folder.
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
from pathlib import Path

from lib.cli import BadInput

TEXT_LIMIT = 2**28  # bytes; a meta.json, tokenizer.json or config.json is far smaller
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# what a failed sync says where data is lost; by any other error, file systems (SMB, drvfs, FUSE)
# say that they do not offer it
LOST = (errno.EIO, *DISK_FULL)
HIDDEN = (".", "_")  # names that begin so are of editors, notebooks, macOS, jobs in progress
NAMED = 20           # files of a kind that are named where they are left out
BOM = b"\xef\xbb\xbf"  # the byte order mark that editors on Windows put in front
# Python refuses to make an integer of thousands of digits, and no number is text
DECODER = json.JSONDecoder(parse_int=float)
BLANK = re.compile(r"\s*")


class Unreadable(BadInput):
    """A file that could not be read, which says nothing about what is in it."""


def open_file(path, remedy):
    """A regular file, opened for reading bytes. Raises Unreadable, whose message ends in `remedy`,
    for anything else."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
                         | getattr(os, "O_BINARY", 0))  # a pipe would wait
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        if os.path.islink(path) and not os.path.exists(path):
            reason = f"a link to {os.readlink(path)}, which does not exist"
        raise Unreadable(f"cannot read {path} ({reason}): {remedy}") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise Unreadable(
            f"cannot read {path} ({'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}): {remedy}"
        )
    return open(handle, "rb")


def read_text(path, remedy, limit=TEXT_LIMIT):
    """The text of a UTF-8 file of at most `limit` bytes. Raises BadInput, ending in `remedy`, if it
    is not one."""
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
    """The object a JSON file holds. Raises BadInput, ending in `remedy`, if it cannot be read or is
    not JSON."""
    try:
        return json.loads(read_text(path, remedy))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged ({error}): {remedy}") from error


def read_rows(path, remedy, check=lambda row: row):
    """A list of what `check` makes of each line of a jsonl file. Raises BadInput naming the line:
    not JSON, or a ValueError of `check`."""
    rows = []
    with open_file(
            path,
            remedy) as file:  # split at newlines alone: JSON may hold what str.splitlines splits at
        for line in file:
            try:
                rows.append(check(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}, line {len(rows) + 1}: {error}: {remedy}") from error
    return rows


def json_rows(file):
    """The rows of an open JSON file -> stream of (place for people, row).

    They follow each other, each on lines of its own, or stand in an array. A line that is not JSON
    yields a ValueError as its row; raises one where rows over several lines are not JSON.
    """
    lines = enumerate((line.removeprefix(BOM) for line in file), 1)
    lines = ((f"line {number}", line) for number, line in lines if line.strip())
    place, line = next(lines, ("", b""))
    if line.lstrip().startswith(b"[") or line.strip() == b"{":
        values = decode_json(line + file.read())
        lists = (value if isinstance(value, list) else [value] for value in values)
        for number, row in enumerate(itertools.chain.from_iterable(lists), 1):
            yield f"row {number}", row
        return
    for where, data in itertools.chain([(place, line)], lines):
        try:
            rows = decode_json(data)
        except ValueError as error:
            rows = [error]
        for row in rows:  # none in an empty file
            yield where, row


def decode_json(data):
    """The JSON values in UTF-8 bytes, one after another. Raises ValueError."""
    values = []
    try:
        text = data.decode()
        at = BLANK.match(text).end()
        while at < len(text):
            value, at = DECODER.raw_decode(text, at)
            values.append(value)
            at = BLANK.match(text, at).end()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON ({str(error)[:80]})") from error
    return values


def find_files(folder, wanted):
    """Files below a folder -> (sorted paths of those whose name `wanted` accepts, lines about
    others).

    Whatever has a hidden name, or lies in a folder that has one, is left out. Links are followed; a
    file or folder that several lead to is taken once. Raises Unreadable where a folder cannot be
    listed.
    """
    found = []
    others = {}
    seen = {os.path.realpath(folder)}

    def is_new(path):
        real = os.path.realpath(path)
        if real in seen:
            name = os.path.relpath(path, folder)
            others.setdefault("read already, by another link", []).append(name)
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


def left_out(folder, kinds):
    """Lines about files that are not read. kinds: {what kind: their names}."""
    lines = []
    for kind, names in kinds.items():
        names = [name if name.isprintable() else ascii(name) for name in names]  # a line each
        more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        lines.append(f"left out of {folder} ({kind}): {', '.join(names[:NAMED])}{more}")
    return lines


@contextlib.contextmanager
def naming(path):
    """Let an OSError of writing a file name it, as one of opening it does; one of the console names
    nothing."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def replace(path, write):
    """Call `write` with a binary file, so that `path` holds either what it held before or all that
    was written, flushed to the disk. Several processes may replace one path at once: the last wins.

    Until it is whole, the content is in <name>.<8 hex digits>.tmp. A killed process leaves that
    file behind; the next `replace` of the same path removes it.
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
                file.close()  # only closed files are renamed there; elsewhere that would unlock it
            _rename(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def leftovers(folder, name):
    """The temporary files of `replace` in `folder`, of files whose names match the glob `name`."""
    earlier = folder.glob(f"{name}.tmp")  # as earlier versions named them
    return [*earlier, *folder.glob(f"{name}.{'[0-9a-f]' * 8}.tmp")]


def _open_partial(path):
    """-> (path, open file) of a new temporary file beside `path`, locked while it is open."""
    while True:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        file = open(partial, "xb")  # noqa: SIM115 (closed by the caller)
        if _lock(file) is not False and os.fstat(file.fileno()).st_nlink:
            return partial, file
        file.close()  # another process removed it before it was locked


def _remove_unlocked(partial):
    """Remove a temporary file whose writer was killed: its lock is free.
    Where files cannot be locked, nothing tells it from one that is being written, and it stays."""
    with contextlib.suppress(OSError), open(partial, "r+b") as file:
        if _lock(file):
            partial.unlink()


def _lock(file, wait=False):
    """Lock an open file, or a folder's descriptor, until it is closed -> whether that worked.

    False if another process holds the lock and `wait` is not set; None where the system or the
    file system has no such locks.
    """
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def move(source, path):
    """Give a whole file of the same disk another name, flushed to the disk first."""
    with naming(source), open(source, "r+b") as file:
        sync(file.fileno())
    _rename(source, Path(path))


def _rename(source, path):
    os.replace(source, path)
    if os.name == "posix":
        with naming(path.parent), _refusable():
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name itself is on the disk once its folder is
            finally:
                os.close(folder)


def sync(handle):
    """Flush an open file to the disk, where its file system can. Raises OSError (EIO)."""
    with _refusable():
        os.fsync(handle)


@contextlib.contextmanager
def _refusable():
    """What a file system may refuse, for it only makes data last. Raises OSError where data is
    lost."""
    try:
        yield
    except OSError as error:
        if error.errno in LOST:
            raise


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
            with contextlib.suppress(OSError,
                                     ValueError):  # there already, or the next line says why not
                path.mkdir()
                made.insert(0, path)
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        remove_empty(made)
        raise BadInput(
            f"cannot write to {folder} ({getattr(error, 'strerror', None) or error}): {remedy}"
        ) from error
    return made


def remove_empty(folders):
    """Remove nested folders, the innermost first, up to one in which something was written."""
    with contextlib.suppress(OSError):  # not empty
        for path in folders:
            path.rmdir()


@contextlib.contextmanager
def new_folder(folder, remedy):
    """`make_folder`. If what follows fails, those made here go again, unless something was written
    there."""
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
        raise BadInput(
            f"{what} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free: {remedy}"
        )


@contextlib.contextmanager
def locked(folder, remedy, wait=None):
    """Hold the lock of a folder; it goes with the process, however that ends.
    Where folders cannot be locked, do without.

    wait: a function, called before waiting for another process that holds it. Without one, raises
    BadInput, ending in `remedy`, if there is such a process.
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
