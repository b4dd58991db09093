"""Checkpoints are written whole or not at all: python -m pytest tests/lib/test_checkpoint.py"""

import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from helpers import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from runs import same, steps_saved

from lib import checkpoint
from lib.checkpoint import Torn
from lib.cli import BadInput

EXAMPLES = settings(derandomize=True, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(state, bytes) of a small checkpoint."""
    path = tmp_path_factory.mktemp("small") / "ckpt_00001.pt"
    state = {
        "step": 1, "model": {"a": torch.arange(12.0), "b": torch.ones(3, 2, dtype=torch.bfloat16)},
        "tokenizer": "gpt2"
    }
    checkpoint.write(path, state)
    return state, path.read_bytes()


def run_python(code, folder):
    """What a process of its own prints, as limits on a process stay."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --------------------------------------------------------------------------------------------------
# Reading


def refused_or_equal(path, content, state):
    """Whether read() refuses these bytes; otherwise what it reads must be `state`."""
    path.write_bytes(content)
    try:
        loaded = checkpoint.read(path)
    except Torn as error:
        assert str(path) in str(error) and "try an earlier" in str(error)
        return True
    assert same(loaded, state)
    return False


def test_a_checkpoint_is_read_back_and_loads_under_plain_torch(small, tmp_path):
    state, content = small
    assert not refused_or_equal(tmp_path / "ckpt_00001.pt", content, state)
    assert same(torch.load(tmp_path / "ckpt_00001.pt", weights_only=True), state)


@settings(EXAMPLES, max_examples=150)
@given(st.data())
def test_a_flipped_bit_is_found_or_harmless(small, tmp_path, choice):
    state, whole = small
    anywhere = st.integers(0, len(whole) - 1)
    in_directory = st.integers(whole.index(b"PK\1\2"), len(whole) - 1)  # gets half of the flips
    position = choice.draw(st.one_of(anywhere, in_directory))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << choice.draw(st.integers(0, 7))
    refused_or_equal(tmp_path / "ckpt_00001.pt", bytes(flipped), state)


def test_a_flipped_bit_in_a_tensor_or_its_names_is_found_where_torch_would_not(small, tmp_path):
    state, whole = small
    for part in (b"tokenizer", state["model"]["a"].numpy().tobytes()):
        position = whole.index(part) + 2
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            assert refused_or_equal(tmp_path / "ckpt_00001.pt", bytes(flipped), state)
    assert not same(torch.load(tmp_path / "ckpt_00001.pt", weights_only=True), state)


@settings(EXAMPLES, max_examples=60)
@given(st.data())
def test_a_truncated_checkpoint_is_refused(small, tmp_path, choice):
    state, whole = small
    length = choice.draw(st.integers(0, len(whole) - 1))
    assert refused_or_equal(tmp_path / "ckpt_00001.pt", whole[:length], state)


EMPTY_ZIP = b"PK\5\6" + bytes(18)
some_bytes = st.binary(max_size=300)


@settings(EXAMPLES, max_examples=60)
@given(st.one_of(some_bytes, some_bytes.map(lambda content: b"PK\3\4" + content + EMPTY_ZIP)))
@example(EMPTY_ZIP)
def test_random_bytes_are_refused(tmp_path, content):
    assert refused_or_equal(tmp_path / "ckpt_00001.pt", content, None)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    def save_old(state, path):
        torch.save(state, path, _use_new_zipfile_serialization=False)

    def save_pickle(state, path):
        path.write_bytes(pickle.dumps(state))

    path = tmp_path / "ckpt_00001.pt"
    ran = str(tmp_path / "ran")
    for save in (torch.save, save_old, save_pickle):
        save({"step": 1, "model": Evil(ran)}, path)
        with pytest.raises(Torn):
            checkpoint.read(path)
        assert not os.path.exists(ran)
    pickle.loads(path.read_bytes())
    assert os.path.exists(ran)  # plain pickle runs it


def test_archives_of_something_else_are_refused(tmp_path):
    path = tmp_path / "ckpt_00001.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.txt", "hello")
    with pytest.raises(Torn):
        checkpoint.read(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(Torn, match="TypeError: list"):
        checkpoint.read(path)
    for tensor in (torch.zeros(2, dtype=torch.complex64), torch.zeros(2).to_sparse(),
                   torch.zeros(2, device="meta")):
        torch.save({"model": {"weight": tensor}}, path)
        with pytest.raises(Torn, match="a tensor without data, sparse, complex or quantized"):
            checkpoint.read(path)


def test_zip_bombs_are_refused_unread(tmp_path, monkeypatch):
    """torch.save does not compress, so a checkpoint is never larger than its file."""
    monkeypatch.setattr(zipfile.ZipFile, "testzip",
                        lambda archive: pytest.fail("its content was read"))
    path = tmp_path / "ckpt_00001.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
    with pytest.raises(Torn, match="compressed or overlapping records"):
        checkpoint.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
        archive.filelist *= 100  # one content in a hundred records
    with pytest.raises(Torn, match="compressed or overlapping records"):
        checkpoint.read(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path),
                                  lambda path: os.symlink("/dev/zero", path), lambda path: None],
                         ids=["folder", "pipe", "dangling link", "device", "missing"])
def test_a_path_that_is_not_a_regular_file_is_not_called_torn(make, tmp_path):
    path = tmp_path / "ckpt_00001.pt"
    make(path)
    with pytest.raises(BadInput, match=f"cannot read {path}") as error:
        checkpoint.read(path)
    assert not isinstance(error.value, Torn)


def test_a_file_system_without_mmap_is_read_without_it(small, tmp_path, monkeypatch):
    state, content = small
    (tmp_path / "ckpt_00001.pt").write_bytes(content)
    load = torch.load

    def refuse(path, mmap, **options):
        if mmap:
            raise RuntimeError(f"unable to mmap 9 bytes from file <{path}>: No such device (19)")
        return load(path, mmap=mmap, **options)

    monkeypatch.setattr(torch, "load", refuse)
    assert same(checkpoint.read(tmp_path / "ckpt_00001.pt"), state)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_AS")
def test_out_of_memory_is_not_damage(tmp_path):
    """Training must not continue from an older checkpoint that fits into memory."""
    output = run_python("""
import resource
import torch
from lib import checkpoint
from lib.cli import BadInput

for step in (1, 2):
    checkpoint.write(f"ckpt_0000{step}.pt", {"x": torch.zeros(step * 20_000_000)})
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 120_000_000  # room for the older one
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    print(checkpoint.newest(".", print))
except BadInput as error:
    print(error)
""", tmp_path)
    assert re.fullmatch(r"cannot read ckpt_00002.pt \(.*\): it needs 0.16 GB of memory.*\n", output)


# --------------------------------------------------------------------------------------------------
# Finding


def test_checkpoints_are_found_by_number(tmp_path):
    for name in ("ckpt_00002.pt", "ckpt_99999.pt", "ckpt_100000.pt", "ckpt_00003.pt.aside",
                 "ckpt_00004.pt.tmp", "ckpt_x.pt", "a.pt", f"ckpt_{'9' * 200}.pt"):
        (tmp_path / name).touch()
    assert steps_saved(tmp_path) == [2, 99_999, 100_000]
    assert checkpoint.found(tmp_path)[0] == (100_000, checkpoint.path_of(tmp_path, 100_000))
    assert checkpoint.found(tmp_path / "nowhere") == []


def test_newest_skips_torn_checkpoints(small, tmp_path):
    state, content = small
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append) is None
    for step in (1, 2, 3, 100_000):
        (tmp_path / f"ckpt_{step:05d}.pt").write_bytes(content if step < 3 else content[:-9])
    path, loaded = checkpoint.newest(tmp_path, warnings.append)
    assert path.name == "ckpt_00002.pt" and same(loaded, state)
    assert len(warnings) == 2 and "ckpt_100000.pt" in warnings[0] and "ckpt_00003.pt" in warnings[1]
    assert all(warning.startswith("skipped: ") and "\n" not in warning for warning in warnings)
    for step in (1, 2):
        (tmp_path / f"ckpt_{step:05d}.pt").write_bytes(b"")
    with pytest.raises(BadInput, match="none of the checkpoints"):
        checkpoint.newest(tmp_path, warnings.append)


def test_pick_takes_weights_only_without_checkpoints(small, tmp_path, capsys):
    state, _ = small
    for step, best in ((1, [0.5, 1]), (2, [0.5, 1]), (3, None)):
        weights = checkpoint.weights_of(state | {"step": step, "best": best})
        checkpoint.write(checkpoint.path_of(tmp_path, step, "weights"), weights)
    checkpoint.write(checkpoint.path_of(tmp_path, 1), state)
    assert checkpoint.pick(tmp_path) == str(checkpoint.path_of(tmp_path, 1))
    checkpoint.path_of(tmp_path, 1).unlink()
    for wanted in (3, 1):
        capsys.readouterr()
        assert checkpoint.pick(tmp_path) == str(checkpoint.path_of(tmp_path, wanted, "weights"))
        assert f"weights_{wanted:05d}.pt, the " in capsys.readouterr().err
        assert checkpoint.leads_to(tmp_path, checkpoint.pick(tmp_path))
        checkpoint.path_of(tmp_path, 3, "weights").unlink(missing_ok=True)


def test_pick_takes_the_best_checkpoint_if_kept_else_the_newest(small, tmp_path, capsys):
    state, content = small
    for step, best in ((1, None), (2, [0.5, 1]), (3, [0.25, 2])):
        checkpoint.write(checkpoint.path_of(tmp_path, step), state | {"step": step, "best": best})
    for wanted, says in ((2, "the best, validation loss 0.2500"), (3, "the newest")):
        assert checkpoint.pick(tmp_path) == str(checkpoint.path_of(tmp_path, wanted))
        assert capsys.readouterr().err == f"{tmp_path}: ckpt_{wanted:05d}.pt, {says}\n"
        assert checkpoint.leads_to(tmp_path, checkpoint.pick(tmp_path))
        capsys.readouterr()
        checkpoint.path_of(tmp_path, 2).unlink(missing_ok=True)  # the best one
    checkpoint.path_of(tmp_path, 3).write_bytes(content[:-9])
    assert checkpoint.pick(tmp_path) == str(checkpoint.path_of(tmp_path, 1))
    assert "skipped: " in capsys.readouterr().err
    path = checkpoint.path_of(tmp_path, 3)
    assert checkpoint.pick(path) == path
    assert capsys.readouterr().err == ""
    assert not checkpoint.leads_to(tmp_path / "other", path)


# --------------------------------------------------------------------------------------------------
# Writing


def test_a_disk_that_fills_up_for_real(tmp_path):
    output = run_python("""
import resource
import torch
from lib import checkpoint
from lib.cli import BadInput

checkpoint.write("ckpt_00001.pt", {"x": torch.arange(9)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.write("ckpt_00001.pt", {"x": torch.zeros(200_000)})
except BadInput as error:
    print(error)
""", tmp_path)
    assert re.fullmatch(r"cannot save ckpt_00001.pt \(\w+Error: .*\): free some disk.*\n", output)
    assert os.listdir(tmp_path) == ["ckpt_00001.pt"]
    assert checkpoint.read(tmp_path / "ckpt_00001.pt")["x"].tolist() == list(range(9))


def test_a_disk_that_is_full_beforehand(tmp_path, monkeypatch):
    path = tmp_path / "ckpt_00001.pt"
    usage = shutil.disk_usage(tmp_path)
    checkpoint.write(path, {"x": torch.arange(9)})
    before = path.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000_000))
    checkpoint.write(tmp_path / "ckpt_00002.pt", {"x": torch.zeros(1000)})  # has room
    with pytest.raises(BadInput, match=r"needs 0.04 GB and .+ has 0.02 GB free"):
        checkpoint.write(path, {"x": torch.zeros(10_000_000)})
    assert path.read_bytes() == before
    assert steps_saved(tmp_path) == [1, 2]
    assert len(os.listdir(tmp_path)) == 2
