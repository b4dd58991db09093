"""--follow: training while fineweb.py is still writing the shards.
Run: python -m pytest tests/lib/test_follow.py"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, TINY_FLAGS, Rank, run_together, sentences, write_lines
from hub import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import lines, run_script, running, steps_saved, train, wait_for

import fineweb
import train_gpt2
from lib import checkpoint, follow, streams
from lib.budget import steps_of
from lib.cli import BadInput
from lib.corpus import Corpus
from lib.follow import GrowingShards
from lib.run_folder import RunFolder
from lib.shard_meta import WRITING
from lib.shards import Shards, save_shard
from lib.streams import FollowingStream
from lib.tokenizers import load_tokenizer
from train_gpt2 import ShardLoader, TrainConfig

SEED = 5
ALONE = SimpleNamespace(world_size=1, sum=lambda values: [float(value) for value in values])


# --------------------------------------------------------------------------------------------------
# A folder that grows


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    """A folder of nine train shards that fineweb.py made, of 1,600 tokens, the last of fewer; its
    source is beside it."""
    folder = tmp_path_factory.mktemp("finished")
    tokenizer.save(folder / "tokenizer.json")
    write_lines(folder / "a.jsonl", [{"text": text} for text in sentences(900)])
    fineweb.main(make_flags(folder / "a.jsonl", folder / "out"))
    assert len(Shards(folder / "out").train) == 9
    return folder / "out"


SIZES = ["--shard_size", 1600, "--val_tokens", 500]


def make_flags(source, out, *flags, tokenizer=None):
    tokenizer = tokenizer or source.parent / "tokenizer.json"
    words = ["--source", source, "--out", out, "--tokenizer", tokenizer, *SIZES,
             "--max_tokens", 14_000, *flags]
    return [str(word) for word in words]


class Growing:
    """A copy of a finished folder, to which shards are added as fineweb.py would."""

    def __init__(self, finished, folder, train=1):
        self.finished = finished
        self.folder = folder
        self.meta = json.loads((finished / "meta.json").read_text())
        self.promised = self.meta["promised"]
        folder.mkdir()
        self.train = 0
        self.written = 0
        shutil.copy(finished / "tokenizer.json", folder)
        self.write(train)

    def write(self, train, complete=False):
        records = self.meta["shards"][:train + 1]
        for record in records[self.written:]:
            save_shard(self.folder / record["name"], np.load(self.finished / record["name"]))
        self.written = max(self.written, len(records))
        tokens = sum(record["tokens"] for record in records[1:])
        splits = self.meta["splits"]
        splits = splits | {"train": splits["train"] | {"shards": train, "tokens": tokens}}
        resume = None if complete else {"source": None, "drop": 0}
        meta = self.meta | {"shards": records, "splits": splits, "complete": complete,
                            "resume": resume, "promised": self.promised}
        partial = self.folder / "meta.tmp"
        partial.write_text(json.dumps(meta))
        os.replace(partial, self.folder / "meta.json")
        self.train = train

    def grow(self):
        """Add one shard, or after the last the mark that there are no more -> False, as `stopped`
        would return."""
        if self.train == 9:
            self.write(9, complete=True)
        else:
            self.write(self.train + 1)
        return False


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """No waiting in this process."""
    monkeypatch.setattr(streams, "POLL", 0)
    monkeypatch.setattr(follow, "POLL", 0)


def open_stream(folder, processes=ALONE, seed=SEED):
    shards = GrowingShards(folder)
    loader = ShardLoader(shards.train, load_tokenizer(shards.tokenizer), seed, growing=shards)
    return FollowingStream(loader, shards, processes)


def read(stream, n, stopped=lambda: False, said=None):
    """The next n tokens, after `wait`."""
    error = stream.wait(n, stopped, (said if said is not None else []).append)
    if error:
        raise error
    return stream.next(n)


def never():
    raise AssertionError("waits for shards")


def first_tokens(folder, n):
    stream = open_stream(folder)
    return read(stream, n, never)


def as_saved(state):
    return json.loads(json.dumps(state))


def test_the_first_epoch_reads_the_shards_in_order_and_later_ones_are_as_ever(
        finished, tokenizer):
    shards = Shards(finished)
    size = shards.tokens["train"]
    tokens = first_tokens(finished, 3 * size)
    documents = []
    for i, path in enumerate(shards.train):
        ids = np.load(path)
        starts = sorted({0, *np.flatnonzero(ids == tokenizer.eot).tolist()})
        parts = np.split(ids, starts[1:])
        order = np.random.default_rng((SEED, 0, i)).permutation(len(parts))
        documents += [parts[d] for d in order]
    assert (tokens[:size] == np.concatenate(documents)).all()
    plain = ShardLoader(shards.train, tokenizer, SEED)
    assert (tokens[size:] == plain.next(3 * size)[size:]).all()
    assert not (tokens[:size] == plain.read_batch(size, 0, 0, 0)[0][:size]).all()


@settings(deadline=None, max_examples=12, derandomize=True)
@given(data=st.data())
def test_a_growing_folder_gives_the_tokens_of_a_finished_one_from_any_position(
        data, finished, tmp_path_factory):
    counts = data.draw(st.lists(st.integers(1, 4000), min_size=4, max_size=12))
    counts.append(16_000)  # into the second epoch
    want = first_tokens(finished, sum(counts))
    growing = Growing(finished, tmp_path_factory.mktemp("growing") / "out")
    stream = open_stream(growing.folder)
    done = 0
    for count in counts:
        if data.draw(st.booleans()):  # resume
            state = as_saved(stream.state_dict())
            stream = open_stream(growing.folder)
            stream.where(state)
            stream.load_state_dict(state)
            assert stream.state_dict() == state
        assert (read(stream, count, growing.grow) == want[done:done + count + 1]).all()
        done += count
    assert stream.shards.is_finished


@pytest.mark.parametrize("is_shared", [True, False])
def test_two_processes_read_the_same_wherever_and_whenever_shards_arrive(
        is_shared, finished, tmp_path):
    counts = [900, 2000, 50, 5000, 3000, 9000]
    want = first_tokens(finished, sum(counts))
    folders = [Growing(finished, tmp_path / "a"), Growing(finished, tmp_path / "b", 3)]

    def work(processes):
        own = folders[0 if is_shared else processes.rank]
        stream = open_stream(own.folder, processes)
        batches = []
        for count in counts:
            grows = processes.main or not is_shared
            batches.append(read(stream, count, own.grow if grows else lambda: False)[:-1])
        return np.concatenate(batches)

    for tokens in run_together(2, work):
        assert (tokens == want[:-1]).all()


def test_processes_with_different_shards_are_refused(finished, tmp_path):
    other = tmp_path / "other"
    text = [{"text": text} for text in (*sentences(150), *sentences(800, 7))]
    write_lines(tmp_path / "b.jsonl", text)
    own = finished.parent / "tokenizer.json"
    fineweb.main(make_flags(tmp_path / "b.jsonl", other, tokenizer=own))
    folders = [finished, other]
    assert GrowingShards(finished).identity == GrowingShards(other).identity  # of the first shard

    def work(processes: Rank):
        stream = open_stream(folders[processes.rank], processes)
        read(stream, 1000)
        return read(stream, 9000)

    for error in run_together(2, work):
        assert isinstance(error, BadInput) and "not the same for every process" in str(error)


def test_waiting_is_said_and_a_request_to_stop_ends_it(finished, tmp_path):
    growing = Growing(finished, tmp_path / "out")
    stream = open_stream(growing.folder)
    read(stream, 1000, never)
    before = stream.state_dict()
    said = []
    assert stream.wait(1000, lambda: True, said.append) is None and said == []
    answers = iter([False, False, True])
    assert stream.wait(1000, lambda: next(answers), said.append) is None
    assert said == [f"waiting for train shard 2 of {growing.folder}/"]
    assert stream.state_dict() == before
    read(stream, 1000, growing.grow, said)
    assert len(said) == 3 and said[-1].startswith("waited ")


def test_a_listed_shard_that_is_not_there_yet_has_not_arrived(finished, tmp_path):
    growing = Growing(finished, tmp_path / "out", 3)
    path = growing.folder / "out_train_000003.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    shards = GrowingShards(growing.folder)
    assert len(shards.train) == 2
    path.write_bytes(whole)
    shards.refresh()
    assert len(shards.train) == 3 and shards.tokens["train"] == 4800


# --------------------------------------------------------------------------------------------------
# What cannot go on


def test_a_dead_writer_is_one_line_that_says_how_to_go_on(finished, tmp_path, monkeypatch):
    growing = Growing(finished, tmp_path / "out", 2)
    stream = open_stream(growing.folder)
    assert stream.wait(3000, never, print) is None
    monkeypatch.setattr(follow, "SILENCE", -1)
    error = stream.wait(5000, never, print)
    assert "--finish to train on the 2 shards" in str(error)
    assert f"--max_tokens 14000 --out {shlex.quote(str(growing.folder))}`" in str(error)


def test_a_heartbeat_is_a_sign_of_life(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: now[0])
    watch = follow.Watch(tmp_path)
    assert not watch.is_silent()
    for seconds in range(50, 400, 50):
        now[0] = seconds
        (tmp_path / WRITING).touch()
        os.utime(tmp_path / WRITING, ns=(seconds, seconds))  # of a clock that is decades behind
        assert not watch.is_silent()
    now[0] += follow.SILENCE
    assert not watch.is_silent()
    now[0] += 1
    assert watch.is_silent()


def test_a_folder_to_which_nothing_writes_is_refused_at_the_start(tmp_path, monkeypatch, finished):
    monkeypatch.setattr(follow, "SILENCE", -1)
    with pytest.raises(BadInput, match="no shards to start with.*start fineweb.py"):
        GrowingShards(tmp_path / "absent")
    growing = Growing(finished, tmp_path / "out", 0)  # has its val shard
    with pytest.raises(BadInput, match="no shards to start with"):
        GrowingShards(growing.folder)
    growing.grow()
    assert len(GrowingShards(growing.folder).train) == 1
    with pytest.raises(BadInput, match="is not finished"):  # without --follow
        Shards(growing.folder)


def test_it_starts_once_a_train_shard_has_arrived(tmp_path, monkeypatch, finished, capsys):
    growing = Growing(finished, tmp_path / "out", 0)
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: growing.grow())
    assert len(GrowingShards(growing.folder).train) == 1
    assert f"waiting for the first shards of {growing.folder}/" in capsys.readouterr().err


def test_a_resume_waits_for_the_shards_it_had_read_and_refuses_others(finished, tmp_path):
    growing = Growing(finished, tmp_path / "out", 5)
    stream = open_stream(growing.folder)
    read(stream, 7000, never)
    state = as_saved(stream.state_dict())
    want = stream.next(500)
    again = Growing(finished, tmp_path / "again")  # on another machine
    stream = open_stream(again.folder)
    stream.where(state)
    stream.load_state_dict(state)
    said = []
    assert stream.wait(500, lambda: True, said.append) is None
    assert stream.state_dict() == state
    assert (read(stream, 500, again.grow, said) == want).all()
    assert said[0] == f"waiting for train shard 5 of {again.folder}/"

    other = Growing(finished, tmp_path / "other", 5)
    other.meta["shards"][3]["crc32"] += 1
    other.write(5)
    stream = open_stream(other.folder)
    with pytest.raises(BadInput, match="no longer contains the text"):
        stream.where(state)


# --------------------------------------------------------------------------------------------------
# Lengths, other flags


def test_the_length_is_what_the_source_promises(finished, tmp_path):
    growing = Growing(finished, tmp_path / "out", 2)
    cfg = TrainConfig(data=(str(growing.folder),), follow=True, total_batch_size=1000)
    corpus = Corpus(cfg)
    assert corpus.tokens["train"] == 13_500 == Shards(finished).tokens["train"]
    assert steps_of(cfg, corpus.tokens["train"], None) == 13
    growing.promised = None
    growing.write(3)
    corpus = Corpus(cfg)
    assert corpus.most_repeated(10**9)[0] == 0
    with pytest.raises(BadInput, match="give --max_steps or --minutes"):
        steps_of(cfg, corpus.tokens["train"], None)
    cfg = TrainConfig(data=cfg.data, follow=True, max_steps=7)
    assert steps_of(cfg, corpus.tokens["train"], None) == 7


@pytest.mark.parametrize("flags, promised", [
    (["--max_tokens", 5000], 4500),
    (["--max_tokens", 10**6], None),  # more than there is
    ([], None),
])
def test_what_a_local_source_promises(flags, promised, finished, tmp_path):
    source = finished.parent / "a.jsonl"
    words = ["--source", source, "--out", tmp_path / "out", *SIZES, *flags]
    fineweb.main([str(word) for word in words])
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["promised"] == promised
    if promised:
        assert Shards(tmp_path / "out").tokens["train"] == promised


def test_a_mixture_and_a_curriculum_are_refused(finished):
    for changes in (dict(data=(str(finished), "other")),
                    dict(data=(str(finished),), curriculum="other", curriculum_steps=3)):
        with pytest.raises(BadInput, match="--follow reads a single folder"):
            Corpus(TrainConfig(follow=True, **changes))


def test_finish_declares_a_folder_complete(finished, tmp_path):
    source = finished.parent / "a.jsonl"
    growing = Growing(finished, tmp_path / "out", 3)
    fineweb.main(make_flags(source, growing.folder, "--finish"))
    shards = Shards(growing.folder)
    assert len(shards.train) == 3 and not (growing.folder / WRITING).exists()
    fineweb.main(make_flags(source, growing.folder))  # nothing to do
    assert len(Shards(growing.folder).train) == 3
    early = Growing(finished, tmp_path / "early", 0)
    with pytest.raises(BadInput, match="has no train shards yet"):
        fineweb.main(make_flags(source, early.folder, "--finish"))
    shutil.copy(finished / "out_train_000001.npy", early.folder)
    early.write(2)
    (early.folder / "out_train_000002.npy").unlink()
    with pytest.raises(BadInput, match="out_train_000002.npy is missing or damaged"):
        fineweb.main(make_flags(source, early.folder, "--finish"))


# --------------------------------------------------------------------------------------------------
# Real runs


RUN = ["--follow", "--epochs", 1.5, "--save_every", 5, "--eval_every", 20]


def without_length(flags):
    i = flags.index("--max_steps")
    return flags[:i] + flags[i + 2:]


def run_flags(data, folder):
    place = ["--data", data, "--log_dir", folder.parent, "--run_name", folder.name]
    shape = [*without_length(TINY_FLAGS), "--shuffle", "--micro_batch", 2, "--keep", 0]
    return [str(word) for word in (*shape, *RUN, *place)]


@pytest.fixture(scope="module")
def whole_run(finished, tmp_path_factory):
    """A run with --follow on the finished folder."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    train_gpt2.main(run_flags(finished, folder))
    return folder


def test_a_run_on_a_growing_folder_ends_and_resumes_as_one_on_a_finished_folder(
        finished, whole_run, tmp_path, monkeypatch, capsys):
    growing = Growing(finished, tmp_path / "out", 2)
    folder = tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(follow, "SILENCE", -1)
        with pytest.raises(BadInput, match="has not written to it"):
            train_gpt2.main(run_flags(growing.folder, folder))
    assert steps_saved(folder)[-1] == 12  # 3,200 tokens
    agree = train_gpt2.StopSignals.agree

    def agree_and_grow(self, requests=None):
        if requests is None:
            growing.grow()
        return agree(self, requests)

    monkeypatch.setattr(train_gpt2.StopSignals, "agree", agree_and_grow)
    growing.promised = 20_000  # an estimate: a run keeps its length
    growing.write(2)
    train_gpt2.main(run_flags(growing.folder, folder))
    assert "waiting for train shard 3" in capsys.readouterr().out
    assert lines(folder) == lines(whole_run)
    assert steps_saved(folder)[-1] == int(1.5 * 13_500 / 256)
    ends = [checkpoint.read(checkpoint.found(run)[0][1]) for run in (folder, whole_run)]
    assert ends[0]["loader"] == ends[1]["loader"] and ends[0]["data"] == ends[1]["data"]
    with pytest.raises(BadInput, match="--follow True -> False"):
        train_gpt2.main([*run_flags(growing.folder, folder), "--no-follow"])


def test_a_checkpoint_is_reported_and_copied_while_a_run_waits(finished, tmp_path, monkeypatch):
    polled = []
    monkeypatch.setattr(RunFolder, "poll", lambda self, wait=False: polled.append(wait))

    def wait(self, n, stopped, say):
        before = len(polled)
        assert not stopped()
        assert len(polled) == before + 1
        return BadInput("seen")

    monkeypatch.setattr(FollowingStream, "wait", wait)
    with pytest.raises(BadInput, match="seen"):
        train_gpt2.main(run_flags(finished, tmp_path / "a"))


def write_hub(folder, source):
    """A dataset of two files: the documents of a jsonl file."""
    folder.mkdir()
    rows = source.read_text().splitlines(keepends=True)
    (folder / "train-0.jsonl").write_text("".join(rows[:600]))
    (folder / "train-1.jsonl").write_text("".join(rows[600:]))
    return folder


def test_fineweb_and_training_as_processes_on_a_slow_hub_killed_and_resumed(
        finished, whole_run, tmp_path):
    repo = write_hub(tmp_path / "repo", finished.parent / "a.jsonl")
    folder = tmp_path / "a"
    flags = run_flags(tmp_path / "out", folder)
    with Hub({"some/corpus": repo}) as hub:
        hub.break_off("train-0.jsonl", after=900)  # and then as it should be
        hub.break_off("train-1.jsonl", after=900, how="hold", times=10**6)
        env = os.environ | hub.env(tmp_path) | {"HF_HUB_DOWNLOAD_TIMEOUT": "600"}
        own = finished.parent / "tokenizer.json"
        making = make_flags("some/corpus", "out", "--workers", 1, tokenizer=own)
        words = [sys.executable, ROOT / "fineweb.py", *making]
        with subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL) as writer:
            with running(flags, tmp_path / "first.txt") as first:
                wait_for(lambda: "waiting for train" in (tmp_path / "first.txt").read_text(), first)
                first.send_signal(signal.SIGKILL)
            assert writer.poll() is None
            hub.release()
            done = run_script("train_gpt2.py", *flags, cwd=tmp_path, processes=2)
            assert done.returncode == 0, done.stderr
            assert writer.wait() == 0
    # two processes add in another order
    ours = [line.split() for line in lines(folder)]
    theirs = [line.split() for line in lines(whole_run)]
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
    losses = [float(line[2]) for line in ours]
    assert losses == pytest.approx([float(line[2]) for line in theirs], rel=1e-3)
    ends = [checkpoint.read(checkpoint.found(run)[0][1]) for run in (folder, whole_run)]
    assert ends[0]["loader"] == ends[1]["loader"]
    assert not (tmp_path / "out" / WRITING).exists()


def test_without_the_flag_a_checkpoint_has_no_new_entry(data, tmp_path):
    folder = train(data, tmp_path / "a", "--max_steps", "8")
    state = checkpoint.read(checkpoint.found(folder)[0][1])
    assert state["loader"].keys() == {"epoch", "shard", "offset"}
    with pytest.raises(BadInput, match="--follow False -> True"):
        train(data, folder, "--follow", "--max_steps", "9")
