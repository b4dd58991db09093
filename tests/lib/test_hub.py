"""fineweb.py, `datasets` and `huggingface_hub` against a hub on this machine. Run: python -m pytest
tests/lib/test_hub.py"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from helpers import ROOT, sentences, write_bin
from hub import Hub

import fineweb
from lib.cli import BadInput
from lib.shards import Shards, read_shard
from lib.tokenizers import load_tokenizer

EOT_ID = 50256
DOCUMENTS = []  # of two files
for part in range(2):
    texts = sentences(400, seed=part)
    DOCUMENTS.append([f"{part} {i}: {text}" for i, text in enumerate(texts)])
JSONL = ["train-0.jsonl.zst", "train-1.jsonl"]
PARTS = [f"train-0000{part}-of-00002.parquet" for part in range(2)]


def encode(documents):
    gpt2 = tiktoken.get_encoding("gpt2")
    ids = []
    for text in documents:
        ids += [EOT_ID, *gpt2.encode_ordinary(text)]
    return ids


ALL_IDS = encode(DOCUMENTS[0] + DOCUMENTS[1])


def write_parquet(folder, documents=DOCUMENTS):
    """A dataset of two files in several row groups, incompressible enough that a file takes several
    reads, with a column of a type that `datasets` does not know."""
    (folder / "data").mkdir(parents=True)
    for name, part in zip(PARTS, documents):
        tags = pa.array([[("a", 1)]] * len(part), pa.map_(pa.string(), pa.int64()))
        table = pa.table({"tags": tags, "text": part})
        pq.write_table(table, folder / "data" / name, row_group_size=100, compression="none")
    return folder


def write_jsonl(folder):
    """A dataset of two files, one compressed, with a column that changes its type."""
    folder.mkdir()
    for name, part, score in zip(JSONL, DOCUMENTS, (0.5, {"a": "of another type"}), strict=True):
        lines = [json.dumps({"score": score, "text": text}) + "\n" for text in part]
        data = "".join(lines).encode()
        if name.endswith(".zst"):
            data = pa.Codec("zstd").compress(data, asbytes=True)
        (folder / name).write_bytes(data)
    return folder


def ids_in(out):
    paths = sorted(out.glob("*_*_*.*"), key=lambda path: path.name[-10:])
    return np.concatenate([read_shard(path) for path in paths]).tolist()


@pytest.fixture
def script(launch, tmp_path):
    """script(hub, flags...) runs fineweb.py as a client of the hub -> CompletedProcess."""
    def run(hub, *flags, site="", **env):
        return launch("fineweb.py", *flags, env=hub.env(tmp_path, site) | env)
    return run


def check_quiet(done):
    """The process succeeded and printed nothing on stderr."""
    assert (done.returncode, done.stderr) == (0, "")


def one_line(done):
    """The error of a process that failed as it should."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("fineweb.py: error: ") and done.stderr.count("\n") == 1
    return done.stderr


def count_shards(out):
    return len([*out.glob("*.npy"), *out.glob("*.bin")])


def kill_at(hub, tmp_path, name, *flags):
    """Run fineweb.py until it has two shards and waits for the file `name`, and kill it."""
    env = os.environ | hub.env(tmp_path) | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    process = subprocess.Popen([sys.executable, ROOT / "fineweb.py", *map(str, flags)],
                               cwd=tmp_path, env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while not hub.downloads(name) or count_shards(tmp_path / "out") < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


# --------------------------------------------------------------------------------------------------
# Text, streamed by `datasets`


FAULTS = [dict(after=900, how="close"), dict(after=0, how="short"), dict(after=2000, how="close"),
          dict(after=500, how="reset"), dict(after=0, how=503), dict(after=0, how="close"),
          dict(after=800, how="short"), dict(after=0, how=429), dict(after=700, how="stall")]


@pytest.mark.parametrize("write, faults", [(write_parquet, []), (write_parquet, FAULTS),
                                           (write_jsonl, FAULTS)],
                         ids=["undisturbed", "disturbed parquet", "disturbed jsonl"])
def test_streamed_text_has_the_ids_of_the_files_despite_network_errors(
        write, faults, tmp_path, script):
    folder = write(tmp_path / "repo")
    with Hub({"some/corpus": folder}) as hub:
        for name in PARTS if write is write_parquet else JSONL:
            for fault in faults:
                hub.break_off(name, **fault)
        check_quiet(script(hub, "--source", "some/corpus", "--out", "out", "--shard_size", 1000))
        assert not any(fault["times"] for fault in hub.faults)
    assert ids_in(tmp_path / "out") == ALL_IDS


def test_streamed_and_local_files_give_the_same_shards(tmp_path, script):
    folder = write_parquet(tmp_path / "repo")
    with Hub({"some/corpus": folder}) as hub:
        check_quiet(script(hub, "--source", "some/corpus", "--out", "out", "--shard_size", 1000))
    local = tmp_path / "local" / "out"
    local.parent.mkdir()
    fineweb.main(["--source", str(folder), "--out", str(local), "--shard_size", "1000"])
    names = sorted(path.name for path in local.glob("*.npy"))
    assert len(names) > 10
    assert names == sorted(path.name for path in (tmp_path / "out").glob("*.npy"))
    for name in names:
        assert (local / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_killed_run_continues_in_the_middle_of_a_file_of_the_commit_it_began_with(
        tmp_path, script):
    flags = ["--source", "some/corpus", "--out", "out", "--shard_size", 500, "--workers", 1]
    with Hub({"some/corpus": write_parquet(tmp_path / "repo")}) as hub:
        hub.break_off(PARTS[1], after=20_000, times=9, how="stall")
        kill_at(hub, tmp_path, PARTS[1], *flags)
        before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.npy")}
        hub.faults.clear()
        hub.push("some/corpus", write_parquet(tmp_path / "newer", [["another text"] * 400] * 2))
        done = script(hub, *flags)
    check_quiet(done)
    assert "continuing after" in done.stdout
    assert all(path.read_bytes() == data for path, data in before.items())
    assert ids_in(tmp_path / "out") == ALL_IDS


@pytest.mark.parametrize("how", [404, "close"])
def test_an_unreachable_hub_is_one_line_and_the_same_command_continues(how, tmp_path, script):
    flags = ["--source", "some/corpus", "--out", "out", "--shard_size", 500, "--workers", 1]
    with Hub({"some/corpus": write_parquet(tmp_path / "repo")}) as hub:
        hub.break_off(PARTS[1], after=100, times=10**6, how=how)
        assert "cannot read some/corpus" in one_line(script(hub, *flags))
        whole = encode(DOCUMENTS[0])
        assert ids_in(tmp_path / "out") == whole[:len(whole) // 500 * 500]
        hub.faults.clear()
        check_quiet(script(hub, *flags))
    assert ids_in(tmp_path / "out") == ALL_IDS


# --------------------------------------------------------------------------------------------------
# Shards that others have made


def shard_ids(number, tokens=6000):
    ids = np.random.default_rng(number).integers(0, EOT_ID, tokens, dtype=np.uint16)
    ids[::100] = EOT_ID
    return ids


def write_foreign(folder, form="bin", train=3):
    """Shards as modded-nanogpt and llm.c (.bin) or build-nanogpt (.npy) write them."""
    folder.mkdir(parents=True)
    for number in range(train + 1):
        split = "train" if number else "val"
        path = folder / f"web_{split}_{number:06d}.{form}"
        if form == "npy":
            np.save(path, shard_ids(number))
        else:
            write_bin(path, shard_ids(number), 20240520, 1)
    return folder


def check_copied(out, folder, documents):
    """`out` holds the folder's shards, byte for byte, and a meta.json that counts them -> its
    Shards."""
    names = sorted(path.name for path in out.glob("*_*_*.*"))
    assert names
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert not list(out.glob(".download")) and not list(out.glob("*.tmp"))
    shards = Shards(out)
    ids = ids_in(out)
    assert shards.meta.complete and sum(shards.tokens.values()) == len(ids)
    assert shards.meta.promised == shards.tokens["train"]
    sizes = load_tokenizer(shards.tokenizer).token_bytes()
    assert sum(split.bytes for split in shards.meta.splits.values()) == int(sizes[ids].sum())
    assert shards.meta.documents == documents
    return shards


def test_every_corpus_has_a_licence_and_a_size():
    for row in fineweb.CORPORA:
        assert row.licence and (row.tokens or row.disk)
        if not row.text_column:  # shards hold 2 bytes per token
            assert row.disk == pytest.approx(2 * row.tokens, rel=1e-3)


def test_the_description_of_shards_is_printed_before_the_download(tmp_path, script):
    with Hub({"kjj0/fineweb10B-gpt2": write_foreign(tmp_path / "repo", train=1)}) as hub:
        done = script(hub, "--pretokenized", "fineweb-10BT")
    check_quiet(done)
    assert done.stdout.startswith(
        "kjj0/fineweb10B-gpt2, default: about 10.36B tokens, 20.71 GB of shards with gpt2; "
        "about 20.71 GB on the hub; licence MIT; ")


@pytest.mark.parametrize("form", ["bin", "npy"])
def test_ready_made_shards_are_downloaded_completely_and_once(form, tmp_path, script):
    folder = write_foreign(tmp_path / "repo", form)
    out = tmp_path / "out"
    flags = ["--pretokenized", "some/shards", "--out", "out"]

    def downloads():
        return [hub.downloads(f"{i:06d}.{form}") for i in range(4)]

    with Hub({"some/shards": folder}) as hub:
        hub.break_off(f"web_val_000000.{form}", after=3000, times=2, how="close")
        hub.break_off(f"web_train_000001.{form}", after=3000, times=2, how="reset")
        hub.break_off(f"web_train_000002.{form}", after=3000, times=1, how="garble")
        for more, train in ((["--shards", 1], 1), (["--max_tokens", 17_000], 2), ([], 3)):
            check_quiet(script(hub, *flags, *more))
            shards = check_copied(out, folder, 60 * (train + 1))
            assert (shards.tokenizer, len(shards.train)) == ("gpt2", train)
        assert not any(fault["times"] for fault in hub.faults)
        assert downloads() == [3, 3, 2, 1]
        assert shards.meta.settings["pretokenized"] == "some/shards"
        assert shards.meta.command == "python fineweb.py --pretokenized some/shards"

        missing, damaged, _ = shards.train
        missing.unlink()
        damaged.write_bytes(damaged.read_bytes()[:-2])
        check_quiet(script(hub, *flags))
        check_copied(out, folder, 240)
        assert downloads() == [3, 4, 3, 1]
    done = script(hub, *flags)  # nothing left to do: no network is needed
    assert done.returncode == 0
    assert "out/ is complete: val 6,000 tokens of 60 documents" in done.stdout


@pytest.fixture
def own_shards(tmp_path, tokenizer):
    """A repository with two folders of this project's shards, v1 and v2."""
    tokenizer.save(tmp_path / "tokenizer.json")
    write_parquet(tmp_path / "text")
    repo = tmp_path / "repo"
    fineweb.main(["--source", str(tmp_path / "text"), "--out", str(repo / "v1"),
                  "--shard_size", "9000", "--tokenizer", str(tmp_path / "tokenizer.json")])
    shutil.copytree(repo / "v1", repo / "v2")
    return repo


def test_shards_of_this_project_bring_their_tokenizer(own_shards, tmp_path, script, tokenizer):
    with Hub({"some/shards": own_shards}) as hub:
        check_quiet(script(hub, "--pretokenized", "some/shards:v1", "--out", "out"))
    shards = check_copied(tmp_path / "out", own_shards / "v1", 800)
    theirs = json.loads((own_shards / "v1" / "meta.json").read_text())
    assert load_tokenizer(shards.tokenizer).spec == tokenizer.spec
    assert shards.meta.vocab_size == theirs["vocab_size"]
    for split, counts in shards.meta.splits.items():
        assert vars(counts) == theirs["splits"][split]


def test_shards_of_this_project_that_do_not_fit_are_refused(own_shards, script):
    meta = own_shards / "v2" / "meta.json"
    theirs = json.loads(meta.read_text())
    with Hub({"some/shards": own_shards}) as hub:
        def refused(pattern, *flags):
            return one_line(script(hub, "--pretokenized", f"some/shards{pattern}", *flags))

        line = refused("")
        assert "v1/v1_train_000001.npy and v2/v1_train_000001.npy: choose one folder" in line
        assert "leave --tokenizer out" in refused(":v1", "--out", "x", "--tokenizer", "gpt2")
        meta.write_text(json.dumps(theirs | {"tokenizer": "../../v1/tokenizer.json"}))
        line = refused(":v2/*", "--out", "x")
        assert "names the tokenizer ../../v1/tokenizer.json" in line
        ids = np.zeros(theirs["shards"][1]["tokens"], np.uint16)
        np.save(own_shards / "v1" / "v1_train_000001.npy", ids)
        line = refused(":v1", "--out", "y")
        assert "v1_train_000001.npy of some/shards is not the shard that meta.json lists" in line


def test_a_killed_download_continues(tmp_path, script):
    folder = write_foreign(tmp_path / "repo")
    flags = ["--pretokenized", "some/shards", "--out", "out"]
    with Hub({"some/shards": folder}) as hub:
        hub.break_off("web_train_000002.bin", after=3000, times=9, how="stall")
        kill_at(hub, tmp_path, "web_train_000002.bin", *flags)
        hub.faults.clear()
        with pytest.raises(BadInput, match="out/ is not finished: run `python fineweb.py "
                                           "--pretokenized some/shards --out"):
            Shards(tmp_path / "out")
        hub.push("some/shards", write_foreign(tmp_path / "newer", train=1))
        check_quiet(script(hub, *flags))
        check_copied(tmp_path / "out", folder, 240)
        assert [hub.downloads(f"{i:06d}.bin") for i in range(4)] == [1, 1, 2, 1]


FULL_DISK = "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 8, 1)\n"
REFUSED = [  # --pretokenized, part of the error message
    ("some/shards:web/web_*[02].bin", "web/web_train_000002.bin of some/shards arrives damaged"),
    ("some/shards:web/web_*[013].bin", "web/web_train_000003.bin of some/shards (Remote"),
    ("some/shards:web/torn*", "some/shards at web/torn* has no val shards"),
    ("some/shards:nowhere", "has no train shards"),
    ("some/shards:web/[wb]*_00000[01].bin", "contains the id 60000"),
    ("some/shards:web/[wo]*_00000[01].bin", "a million tokens without gpt2's end of text"),
    ("some/shards:web/[wt]*_00000[01].bin", "torn_train_000001.bin is damaged, or not a shard"),
    ("some/shards/none", "--pretokenized some/shards/none: name one of fineweb-10BT, "),
    ("some/shards_none", "the hub has no dataset some/shards_none, or it is private"),
]


@pytest.fixture(scope="module")
def bad_shards(tmp_path_factory):
    """A repository with shards that cannot be used among good ones."""
    repo = tmp_path_factory.mktemp("repo")
    web = write_foreign(repo / "web")
    beyond = np.append(shard_ids(9, 10**6), np.uint16(60_000))
    write_bin(web / "beyond_train_000001.bin", beyond, 20240520, 1)
    write_bin(web / "other_train_000001.bin", np.full(10**6, 7, dtype=np.uint16), 20240520, 1)
    (web / "torn_train_000001.bin").write_bytes(b"not a shard")
    return repo


def bad_hub(repo):
    hub = Hub({"some/shards": repo})
    hub.break_off("web_train_000002.bin", after=100, times=10**6, how="garble")
    hub.break_off("web_train_000003.bin", after=100, times=10**6, how="close")
    return hub


@pytest.mark.parametrize("wanted, says", REFUSED)
def test_shards_that_cannot_be_used_are_one_line(wanted, says, bad_shards, tmp_path, script):
    with bad_hub(bad_shards) as hub:
        assert says in one_line(script(hub, "--pretokenized", wanted, "--out", "out"))
    assert not list(tmp_path.glob("out/[bot]*"))  # what is not right gets no name
    if "013" in wanted:  # what came before the error stays
        kept = (tmp_path / "out" / "web_train_000001.bin").read_bytes()
        assert kept == (bad_shards / "web" / "web_train_000001.bin").read_bytes()


def test_a_disk_without_room_is_one_line(bad_shards, script):
    with bad_hub(bad_shards) as hub:
        flags = ["--pretokenized", "some/shards:web/web*[01].bin", "--out", "out"]
        line = one_line(script(hub, *flags, site=FULL_DISK))
    assert "downloading 2 shards needs 0.00 GB and out" in line


def test_a_hub_that_does_not_answer_is_one_line(bad_shards, script):
    with bad_hub(bad_shards) as hub:
        line = one_line(script(hub, "--pretokenized", "some/shards", "--out", "out",
                               HF_ENDPOINT="http://127.0.0.1:9"))
    assert "cannot reach the dataset some/shards (ConnectionError: http://127.0.0.1:9" in line


@pytest.mark.parametrize("flags, says", [
    (["--pretokenized", "a/b", "--source", "x"], "leave out --source"),
    (["--shards", "2"], "--shards"),
    (["--pretokenized", "a/b", "--shards", "2", "--max_tokens", "9"], "--shards and --max_tokens"),
    (["--pretokenized", "a/b", "--tokenizer", "bpe:400"], "--tokenizer")])
def test_flags_that_contradict_pretokenized(flags, says):
    with pytest.raises(BadInput, match=says):
        fineweb.read_flags(flags)


def test_pretokenized_presets():
    job = fineweb.read_flags(["--pretokenized", "fineweb-10BT"])
    assert job.cfg.pretokenized == "kjj0/fineweb10B-gpt2"
    assert str(job.out) == "fineweb10B-gpt2"


@pytest.mark.parametrize("write, others", [(write_parquet, "tags"), (write_jsonl, "score")])
def test_a_column_that_a_dataset_lacks_is_named_before_the_first_token(
        write, others, tmp_path, script):
    with Hub({"some/corpus": write(tmp_path / "repo")}) as hub:
        line = one_line(script(hub, "--source", "some/corpus", "--text_column", "body",
                               "--out", "out"))
    assert re.search(rf"some/corpus: \S+ has no column body: name one of {others}, text by "
                     "--text_column", line)
    assert not (tmp_path / "out").exists()
