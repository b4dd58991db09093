"""Files read and written safely, also by killed processes: python -m pytest tests/lib/test_files.py
"""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from lib import files
from lib.cli import BadInput
from lib.files import (
    Unreadable,
    find_files,
    leftovers,
    locked,
    make_folder,
    new_folder,
    open_file,
    read_json,
    read_rows,
    replace,
    write_json,
)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    refused = {
        tmp_path / "pipe": "not a regular file",
        tmp_path: "a folder",
        "/dev/zero": "not a regular file",
        tmp_path / "link": "a link to nowhere, which does not exist",
        tmp_path / "absent": "No such file",
        f"{tmp_path}/\0": "null byte",
    }
    for path, reason in refused.items():
        with pytest.raises(Unreadable, match=f"{reason}.*: do this"):
            open_file(path, "do this")
    (tmp_path / "good").symlink_to("text")
    (tmp_path / "text").write_bytes(b"a\xc3\xa9")
    assert open_file(tmp_path / "good", "").read() == b"a\xc3\xa9"
    assert files.read_text(tmp_path / "good", "") == "a\u00e9"
    with pytest.raises(BadInput, match="more than 2 bytes: do this"):
        files.read_text(tmp_path / "text", "do this", limit=2)


def test_a_folder_is_searched_and_left_out_files_are_named(tmp_path):
    """Links are followed, each file taken once."""
    folder = tmp_path / "in"
    far = tmp_path / "far"
    for name in ("_job/a.txt", "sub/.b.txt", "sub/b.txt", "sub/.c/deep/c.txt", "sub/c.TXT",
                 "notes.md", "LICENSE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    far.mkdir()
    (far / "d.txt").touch()
    (folder / "linked").symlink_to(far)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "twice").symlink_to(far)
    (folder / "z.txt").symlink_to(far / "d.txt")
    found, lines = find_files(folder, lambda name: name.lower().endswith(".txt"))
    assert [os.path.relpath(path, folder) for path in found] == ["sub/b.txt", "sub/c.TXT", "z.txt"]
    assert lines == [
        f"left out of {folder} (already read through another link): twice, linked/d.txt, sub/loop",
        f"left out of {folder} (no ending): LICENSE",
        f"left out of {folder} (.md): notes.md",
        f"left out of {folder} (hidden or temporary): _job/a.txt, sub/.b.txt, sub/.c/deep/c.txt",
    ]
    for i in range(30):
        (far / f"{i:02d}.log").touch()
    assert find_files(far, lambda name: False)[1][0].endswith("18.log, 19.log and 10 more")
    for name in ("a\nb.Bz2", "c.bz2", os.fsdecode(b"\xe9.bz2")):  # any name can be printed
        (folder / name).touch()
    lines = find_files(folder, lambda name: name.endswith(".txt"))[1]
    assert f"left out of {folder} (.bz2): 'a\\nb.Bz2', c.bz2, '\\udce9.bz2'" in lines


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 300_000, b"9" * 5000],
                         ids=["empty", "torn", "latin-1", "nested", "digits"])
def test_files_that_are_not_json_are_refused(data, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(BadInput, match="a.json.*: do this$"):
        read_json(tmp_path / "a.json", "do this")
    good = b'{"a": "x\xe2\x80\xa8y"}'  # U+2028 does not end a line
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + data + b"\n")
    with pytest.raises(BadInput, match="a.jsonl, line 2: .*: do this$"):
        read_rows(tmp_path / "a.jsonl", "do this")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def fails(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(path, fails)
    assert read_json(path, "") == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    code = """
import os, sys
from lib.files import replace

def killed(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)

replace(sys.argv[1], killed)
"""
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert read_json(path, "") == {"a": 1}
    write_json(path, {"a": 2})  # removes what the killed process left
    assert read_json(path, "") == {"a": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_path_do_not_break_each_other(tmp_path):
    path = tmp_path / "a.json"

    def slow(file):
        file.write(b"[1")
        file.flush()
        for value in (2, 3):  # others begin and end meanwhile
            write_json(path, value)
            assert read_json(path, "") == value
        file.write(b"]")

    replace(path, slow)
    assert read_json(path, "") == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "a.json.0123abcd.tmp").write_text("perhaps another process is writing this")
    write_json(tmp_path / "a.json", 1)
    assert read_json(tmp_path / "a.json", "") == 1
    assert len(leftovers(tmp_path, "*.json")) == 1
    with locked(tmp_path, ""), locked(tmp_path, "", wait=lambda: None):
        pass


@pytest.mark.parametrize("code, fails", [
    (errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EACCES, False), (errno.EROFS, False),
    (errno.ENOTTY, False), (errno.EIO, True), (errno.ENOSPC, True)])
def test_a_file_system_without_fsync(code, fails, tmp_path, monkeypatch):
    """SMB, drvfs and some FUSE refuse it, mostly for folders; an error of the disk is raised."""
    def refuse(handle):
        raise OSError(code, os.strerror(code))

    def open_files(path, *args):
        return refuse(path) if os.path.isdir(path) else kept(path, *args)

    kept = os.open
    monkeypatch.setattr(os, "fsync", refuse)
    if not fails:
        monkeypatch.setattr(os, "open", open_files)
    with pytest.raises(OSError) if fails else contextlib.nullcontext():
        write_json(tmp_path / "a.json", {"a": 1})
        files.move(tmp_path / "a.json", tmp_path / "b.json")
    assert [path.name for path in tmp_path.iterdir()] == ([] if fails else ["b.json"])


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    code = """
import sys, time
from lib.files import locked

with locked(sys.argv[1], ""):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT,
                          stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BadInput, match="in use .*: do this"), locked(tmp_path, "do this"):
            pass
        holder.kill()
    for _ in range(2):
        with locked(tmp_path, ""):
            assert not list(tmp_path.iterdir())


def test_a_lock_may_be_waited_for(tmp_path):
    first = locked(tmp_path, "")
    waits = []
    first.__enter__()

    def give_up():
        waits.append("said")
        first.__exit__(None, None, None)

    refused = pytest.raises(BadInput, match="in use")
    with locked(tmp_path, "", wait=give_up), refused, locked(tmp_path, ""):
        pass
    assert waits == ["said"]


@pytest.mark.parametrize("error", [BadInput, KeyboardInterrupt])
def test_a_new_folder_is_removed_with_its_parents_if_it_stays_empty(error, tmp_path):
    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "old", tmp_path / "old" / "a" / "b"):
        with pytest.raises(error), new_folder(folder, ""):
            assert folder.is_dir()
            raise error
        assert list((tmp_path / "old").iterdir()) == []
    with pytest.raises(error), new_folder(tmp_path / "new" / "a", ""):
        (tmp_path / "new" / "file").touch()
        raise error
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    with new_folder(tmp_path / "fine" / "a", ""):
        pass
    assert (tmp_path / "fine" / "a").is_dir()


def test_a_folder_that_another_process_makes_meanwhile_stays(tmp_path, monkeypatch):
    """It is still empty while that process trains a tokenizer."""
    mkdir = Path.mkdir
    with contextlib.ExitStack() as other:
        def after_the_other(path, *args, **how):
            if not path.exists():
                os.mkdir(path)
                other.enter_context(locked(path, ""))
            mkdir(path, *args, **how)

        monkeypatch.setattr(Path, "mkdir", after_the_other)
        folder = tmp_path / "a"
        refused = pytest.raises(BadInput, match="in use")
        with refused, new_folder(folder, ""), locked(folder, ""):
            pass
        assert folder.is_dir()


def test_folders_that_cannot_be_written_and_full_disks(tmp_path):
    make_folder(tmp_path / "a" / "b", "")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none", f"{tmp_path}/\0"):
        with pytest.raises(BadInput, match="cannot write to .*: do this"):
            make_folder(folder, "do this")
    files.check_room(tmp_path, 1, "this", "")
    with pytest.raises(BadInput, match="this needs 1000000000.00 GB and .* free: do this"):
        files.check_room(tmp_path, 10**18, "this", "do this")
