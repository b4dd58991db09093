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
DOCUMENTS = [[f"{part} {i}: {text}"
              for i, text in enumerate(sentences(400, seed=part))]
             for part in range(2)]
JSONL = ["train-0.jsonl.zst", "train-1.jsonl"]
PARTS = [f"train-0000{part}-of-00002.parquet" for part in range(2)]


def encode(documents):
    gpt2 = tiktoken.get_encoding("gpt2")
    return [token for text in documents for token in (EOT_ID, *gpt2.encode_ordinary(text))]


def write_parquet(folder, documents=DOCUMENTS):
    """A dataset of two files in several row groups, incompressible enough that a file takes several
    reads, with a column of which `datasets` has no notion."""
    (folder / "data").mkdir(parents=True)
    for name, part in zip(PARTS, documents):
        tags = pa.array([[("a", 1)]] * len(part), pa.map_(pa.string(), pa.int64()))
        table = pa.table({"tags": tags, "text": part})
        pq.write_table(table, folder / "data" / name, row_group_size=100, compression="none")
    return folder


def write_jsonl(folder):
    folder.mkdir()
    for i, part in enumerate(DOCUMENTS):
        score = [0.5, {"a": "of another type"}][i]
        data = "".join(json.dumps({"score": score, "text": text}) + "\n" for text in part).encode()
        data = pa.Codec("zstd").compress(data, asbytes=True) if i == 0 else data
        (folder / JSONL[i]).write_bytes(data)
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


def one_line(done):
    """The error of a process that failed as it should."""
    assert done.returncode == 2 and done.stderr.startswith(
        "fineweb.py: error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def kill_at(hub, tmp_path, name, *flags):
    """Run fineweb.py until it has two shards and waits for the file `name`, and kill it."""
    env = os.environ | hub.env(tmp_path) | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    process = subprocess.Popen([sys.executable, ROOT / "fineweb.py", *map(str, flags)],
                               cwd=tmp_path, env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not hub.downloads(name) or len([*tmp_path.glob("out/*.npy"), *tmp_path.glob("out/*.bin")
                                          ]) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


# ----------------------------------------------------------------------------------------------------------------------
# Text, streamed by `datasets`


FAULTS = [dict(after=900, how="close"), dict(after=0, how="short"), dict(after=2000, how="close"),
          dict(after=500, how="reset"), dict(after=0, how=503), dict(after=0, how="close"),
          dict(after=800, how="short"), dict(after=0, how=429), dict(after=700, how="stall")]


@pytest.mark.parametrize("write, faults", [(write_parquet, []), (write_parquet, FAULTS),
                                           (write_jsonl, FAULTS)],
                         ids=["undisturbed", "disturbed parquet", "disturbed jsonl"])
def test_streamed_text_gives_the_ids_of_the_files_whatever_the_network_does(
        write, faults, tmp_path, script):
    folder, broken = write(tmp_path / "repo"), PARTS if write is write_parquet else JSONL
    with Hub({"some/corpus": folder}) as hub:
        for name in broken:
            for fault in faults:
                hub.break_off(name, **fault)
        done = script(hub, "--source", "some/corpus", "--out", "out", "--shard_size", 1000)
        assert (done.returncode, done.stderr) == (0, "") and not any(fault["times"]
                                                                     for fault in hub.faults)
    assert ids_in(tmp_path / "out") == encode(DOCUMENTS[0] + DOCUMENTS[1])
    if not faults:  # the files themselves give the same shards
        fineweb.main(
            ["--source",
             str(folder), "--out",
             str(tmp_path / "local"), "--shard_size", "1000"])
        local = {
            path.name.replace("local", "out"): path.read_bytes()
            for path in (tmp_path / "local").glob("*.npy")
        }
        assert local == {path.name: path.read_bytes()
                         for path in (tmp_path / "out").glob("*.npy")} and len(local) > 10


def test_a_killed_run_goes_on_in_the_middle_of_a_file_of_the_commit_it_began_with(tmp_path, script):
    flags = ["--source", "some/corpus", "--out", "out", "--shard_size", 500, "--workers", 1]
    with Hub({"some/corpus": write_parquet(tmp_path / "repo")}) as hub:
        hub.break_off(PARTS[1], after=20_000, times=9, how="stall")
        kill_at(hub, tmp_path, PARTS[1], *flags)
        before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.npy")}
        hub.faults.clear()
        hub.push("some/corpus", write_parquet(tmp_path / "newer", [["another text"] * 400] * 2))
        done = script(hub, *flags)
        assert (done.returncode, done.stderr) == (0, "") and "continuing after" in done.stdout
        assert all(path.read_bytes() == data for path, data in before.items())
        assert ids_in(tmp_path / "out") == encode(DOCUMENTS[0] + DOCUMENTS[1])


@pytest.mark.parametrize("how", [404, "close"])
def test_a_hub_that_stays_away_is_one_line_and_the_same_command_continues(how, tmp_path, script):
    flags = ["--source", "some/corpus", "--out", "out", "--shard_size", 500, "--workers", 1]
    with Hub({"some/corpus": write_parquet(tmp_path / "repo")}) as hub:
        hub.break_off(PARTS[1], after=100, times=10**6, how=how)
        assert "cannot read some/corpus" in one_line(script(hub, *flags))
        whole = encode(DOCUMENTS[0])
        assert ids_in(tmp_path / "out") == whole[:len(whole) // 500 * 500]
        hub.faults.clear()
        assert script(hub, *flags).returncode == 0
        assert ids_in(tmp_path / "out") == encode(DOCUMENTS[0] + DOCUMENTS[1])


# ----------------------------------------------------------------------------------------------------------------------
# Shards that others have made


def shard_ids(number, tokens=6000):
    ids = np.random.default_rng(number).integers(0, EOT_ID, tokens, dtype=np.uint16)
    ids[::100] = EOT_ID
    return ids


def write_foreign(folder, form="bin", train=3):
    """Shards as modded-nanogpt and llm.c (.bin) or build-nanogpt (.npy) write them."""
    folder.mkdir(parents=True)
    for number in range(train + 1):
        path = folder / f"web_{'train' if number else 'val'}_{number:06d}.{form}"
        np.save(path, shard_ids(number)) if form == "npy" else write_bin(
            path, shard_ids(number), 20240520, 1)
    return folder


def check_copied(out, folder, documents):
    """`out` holds the folder's shards, byte for byte, and a meta.json that counts them, which
    training takes."""
    names = sorted(path.name for path in out.glob("*_*_*.*"))
    assert names and all(
        (out / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert not list(out.glob(".download")) and not list(out.glob("*.tmp"))
    shards, ids = Shards(out), ids_in(out)
    assert shards.meta.complete and sum(shards.tokens.values()) == len(ids)
    sizes = load_tokenizer(shards.tokenizer).token_bytes()
    assert sum(split.bytes for split in shards.meta.splits.values()) == int(sizes[ids].sum())
    assert sum(split.documents for split in shards.meta.splits.values()) == documents
    return shards


def test_corpora_say_their_licence_and_size(tmp_path, script):
    for row in fineweb.CORPORA:
        assert row.licence and (row.tokens or row.disk)
        if not row.text_column:  # shards hold 2 bytes per token
            assert row.disk == pytest.approx(2 * row.tokens, rel=1e-3)
    with Hub({"kjj0/fineweb10B-gpt2": write_foreign(tmp_path / "repo", train=1)}) as hub:
        done = script(hub, "--pretokenized", "fineweb-10BT")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(
        "kjj0/fineweb10B-gpt2, default: about 10.36B tokens, 20.71 GB of shards with gpt2; "
        "about 20.71 GB on the hub; licence MIT; ")
    assert str(fineweb.TEXTS["wikipedia"]) == ("wikimedia/wikipedia, 20231101.en: tokens not known; about 11.63 GB on the hub; "
                                             "licence CC BY-SA 3.0, GFDL")


@pytest.mark.parametrize("form", ["bin", "npy"])
def test_shards_of_others_arrive_whole_and_only_once(form, tmp_path, script):
    folder, out = write_foreign(tmp_path / "repo", form), tmp_path / "out"
    with Hub({"some/shards": folder}) as hub:
        hub.break_off(f"web_val_000000.{form}", after=3000, times=2, how="close")
        hub.break_off(f"web_train_000001.{form}", after=3000, times=2, how="reset")
        hub.break_off(f"web_train_000002.{form}", after=3000, times=1, how="garble")
        flags = ["--pretokenized", "some/shards", "--out", "out"]
        for more, count in ((["--shards",
                              1], 2), (["--max_tokens",
                                        17_000], 3), ([], 4)):  # val and 1, 2, 3 train shards
            done = script(hub, *flags, *more)
            assert (done.returncode, done.stderr) == (0, "")
            shards = check_copied(out, folder, 60 * count)
            assert (shards.tokenizer, len(shards.train)) == ("gpt2", count - 1)
        assert not any(fault["times"] for fault in hub.faults)
        assert [hub.downloads(f"{i:06d}.{form}") for i in range(4)] == [3, 3, 2, 1]
        assert shards.meta.settings["pretokenized"] == "some/shards"
        assert shards.meta.command == "python fineweb.py --pretokenized some/shards"

        for path in shards.train[:2]:  # missing, damaged
            path.unlink() if path == shards.train[0] else path.write_bytes(path.read_bytes()[:-2])
        assert script(hub, *flags).returncode == 0
        check_copied(out, folder, 240)
        assert [hub.downloads(f"{i:06d}.{form}") for i in range(4)] == [3, 4, 3, 1]
    done = script(hub, *flags)  # nothing left to do: no network is needed
    assert done.returncode == 0 and "out/ is complete: val 6,000 tokens of 60 documents" in done.stdout


def test_shards_of_this_project_bring_their_tokenizer(tmp_path, script, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    write_parquet(tmp_path / "text")
    fineweb.main([
        "--source",
        str(tmp_path / "text"), "--out",
        str(tmp_path / "repo" / "v1"), "--shard_size", "9000", "--tokenizer",
        str(tmp_path / "tokenizer.json")
    ])
    shutil.copytree(tmp_path / "repo" / "v1", tmp_path / "repo" / "v2")
    with Hub({"some/shards": tmp_path / "repo"}) as hub:
        line = one_line(script(hub, "--pretokenized", "some/shards"))
        assert "holds v1/v1_train_000001.npy and v2/v1_train_000001.npy: choose one folder, as in some/shards:v1" in line
        done = script(hub, "--pretokenized", "some/shards:v1", "--out", "out")
        assert (done.returncode, done.stderr) == (0, "")
        shards = check_copied(tmp_path / "out", tmp_path / "repo" / "v1", 800)
        theirs = json.loads((tmp_path / "repo" / "v1" / "meta.json").read_text())
        assert (load_tokenizer(shards.tokenizer).spec,
                shards.meta.vocab_size) == (tokenizer.spec, theirs["vocab_size"])
        assert {split: vars(counts)
                for split, counts in shards.meta.splits.items()} == theirs["splits"]

        line = one_line(
            script(hub, "--pretokenized", "some/shards:v1", "--out", "x", "--tokenizer", "gpt2"))
        assert "its tokenizer is tokenizer.json, not gpt2: leave --tokenizer out" in line
        (tmp_path / "repo" / "v2" / "meta.json").write_text(
            json.dumps(theirs | {"tokenizer": "../../v1/tokenizer.json"}))
        assert "names the tokenizer ../../v1/tokenizer.json, which is not beside it" in one_line(
            script(hub, "--pretokenized", "some/shards:v2/*", "--out", "x"))
        np.save(tmp_path / "repo" / "v1" / "v1_train_000001.npy",
                np.zeros(theirs["shards"][1]["tokens"], np.uint16))
        assert "v1_train_000001.npy of some/shards is not the shard that meta.json lists" in one_line(
            script(hub, "--pretokenized", "some/shards:v1", "--out", "y"))


def test_a_killed_download_goes_on(tmp_path, script):
    folder, flags = write_foreign(tmp_path
                                  / "repo"), ["--pretokenized", "some/shards", "--out", "out"]
    with Hub({"some/shards": folder}) as hub:
        hub.break_off("web_train_000002.bin", after=3000, times=9, how="stall")
        kill_at(hub, tmp_path, "web_train_000002.bin", *flags)
        hub.faults.clear()
        with pytest.raises(
                BadInput, match=
                "out/ is not finished: give `python fineweb.py --pretokenized some/shards --out"):
            Shards(tmp_path / "out")
        hub.push("some/shards", write_foreign(tmp_path / "newer", train=1))
        done = script(hub, *flags)
        assert (done.returncode, done.stderr) == (0, "")
        check_copied(tmp_path / "out", folder, 240)
        assert [hub.downloads(f"{i:06d}.bin") for i in range(4)] == [1, 1, 2, 1]


def test_what_cannot_be_downloaded_is_one_line(tmp_path, script):
    web = write_foreign(tmp_path / "repo" / "web")
    write_bin(web / "beyond_train_000001.bin", np.append(shard_ids(9, 10**6), np.uint16(60_000)),
              20240520, 1)
    write_bin(web / "other_train_000001.bin", np.full(10**6, 7, dtype=np.uint16), 20240520, 1)
    (web / "torn_train_000001.bin").write_bytes(b"not a shard")
    full = "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 8, 1)\n"
    with Hub({"some/shards": tmp_path / "repo"}) as hub:
        hub.break_off("web_train_000002.bin", after=100, times=10**6, how="garble")
        hub.break_off("web_train_000003.bin", after=100, times=10**6, how="close")
        for i, (wanted, says, more) in enumerate((
            (":web/web_*[02].bin", "web/web_train_000002.bin of some/shards arrives damaged (", {}),
            (":web/web_*[013].bin",
             "cannot read the dataset web/web_train_000003.bin of some/shards (RemoteProtocolError: ",
             {}), (":web/torn*", "the dataset some/shards at web/torn* holds no val shards", {}),
            (":nowhere",
             "holds no train shards, files that end in _train_<index>.npy or .bin (it holds web/",
             {}),
            (":web/[wb]*_00000[01].bin",
             "holds the id 60000, but its tokenizer ends at 50256: name the tokenizer of some/shards",
             {}), (":web/[wo]*_00000[01].bin",
                   "begins with a million tokens without gpt2's end of text", {}),
            (":web/[wt]*_00000[01].bin", "torn_train_000001.bin is damaged, or not a shard (",
             {}), (":web/web*[01].bin", "downloading 2 shards needs 0.00 GB and out", {
                 "site": full
             }), ("/none", "--pretokenized some/shards/none: name one of fineweb-10BT, ",
                  {}), ("_none", "the hub has no dataset some/shards_none, or it is private", {}),
            ("",
             "cannot reach the dataset some/shards (ConnectionError: http://127.0.0.1:9 does not answer)",
             {"HF_ENDPOINT": "http://127.0.0.1:9"}))):
            line = one_line(
                script(hub, "--pretokenized", f"some/shards{wanted}", "--out", f"out{i}", **more))
            assert says in line, (wanted, line)
        # it came before the error
        stays = [(folder / "web_train_000001.bin").read_bytes()
                 for folder in (tmp_path / "out1", web)]
        assert stays[0] == stays[1]
        assert not list(tmp_path.glob("out*/[bot]*"))  # what is not right gets no name


def test_flags_that_contradict_pretokenized():
    for flags, says in ((["--pretokenized", "a/b", "--source",
                          "x"], "leave out --source"), (["--shards",
                                                         "2"], "--shards counts the shards"),
                        (["--pretokenized", "a/b", "--shards", "2", "--max_tokens", "9"],
                         "give one of them"), (["--pretokenized", "a/b", "--tokenizer",
                                                "bpe:400"], "have a tokenizer already")):
        with pytest.raises(BadInput, match=says):
            fineweb.resolve(flags)
    job = fineweb.resolve(["--pretokenized", "fineweb-10BT"])
    assert (job.cfg.pretokenized, str(job.out)) == ("kjj0/fineweb10B-gpt2", "fineweb10B-gpt2")


def test_a_column_that_a_dataset_lacks_is_named_before_the_first_token(tmp_path, script):
    for name, write in (("parquet", write_parquet), ("jsonl", write_jsonl)):
        with Hub({"some/corpus": write(tmp_path / name)}) as hub:
            line = one_line(
                script(hub, "--source", "some/corpus", "--text_column", "body", "--out",
                       name + "_out"))
        assert re.search(
            r"some/corpus: \S+ has no column body: name one of (tags|score), text by --text_column",
            line)
        assert not (tmp_path / f"{name}_out").exists()
