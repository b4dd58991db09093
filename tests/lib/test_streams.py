"""Streams of batches: against plain loops, in real runs, and from any iterator.
Run: python -m pytest tests/lib/test_streams.py"""

import json
import random
import re
import shutil
from functools import partial

import numpy as np
import pytest
from corpora import TOKENIZER, T, corpus_of, write_folders
from helpers import ROOT, TINY_FLAGS, read_log, write_data
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt2
from lib import checkpoint
from lib.cli import BadInput
from lib.corpus import Corpus
from lib.shards import Shards
from lib.streams import (
    CorpusLike,
    FollowingStream,
    IteratorStream,
    Mixture,
    Rows,
    StreamLike,
    TaskLike,
)
from lib.tokenizers import load_tokenizer
from posttrain import Data, PostTraining
from train_gpt2 import ShardLoader


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("streams"))


def loaders_of(corpus, seed):
    return [ShardLoader(source.shards.train, TOKENIZER, seed) for source in corpus.sources]


def mixture_of(corpus, seed):
    return Mixture(corpus, loaders_of(corpus, seed), T)


def plain(corpus, seed, rows):
    """The first rows of a mixture, one at a time: (rows, T + 1) and their sources, from the
    definition alone."""
    tokens = [loader.read_batch(rows * T, 0, 0, 0)[0] for loader in loaders_of(corpus, seed)]
    used = [0] * len(tokens)
    out = []
    chosen = []
    for k in range(rows):
        point = ((k * 0x9E3779B97F4A7C15) % 2**64 >> 11) / 2**53
        shares = corpus.shares(np.array([k * T]))[0]
        i = 0
        while i < len(shares) - 1 and point >= shares[:i + 1].sum():
            i += 1
        out.append(tokens[i][used[i]:used[i] + T + 1])
        used[i] += T
        chosen.append(i)
    return np.stack(out), np.array(chosen)


def as_saved(state):
    return json.loads(json.dumps(state))


@st.composite
def any_corpus(draw, folders):
    """Folders by size, with weights, or one with a curriculum before it."""
    kind = draw(st.sampled_from(["sizes", "weights", "cosine", "step"]))
    if kind == "sizes":
        return corpus_of(*folders)
    if kind == "weights":
        return corpus_of(f"{folders[0]}:0.2", f"{folders[1]}:3", f"{folders[2]}:0")
    return corpus_of(folders[0], curriculum=str(folders[2]), curriculum_steps=2,
                     curriculum_mix=kind)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.data())
def test_a_mixture_is_a_plain_loop_from_any_position_in_batches_of_any_size(folders, data):
    seed = data.draw(st.sampled_from([None, 7]))
    corpus = data.draw(any_corpus(folders))
    counts = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=8))
    want, chosen = plain(corpus, seed, sum(counts))
    mixture = mixture_of(corpus, seed)
    batches = []
    for count in counts:
        state = as_saved(mixture.state_dict())
        batches.append(mixture.next(count * T).reshape(-1, T + 1))
    assert (np.concatenate(batches) == want).all()
    used = [T * int((chosen == i).sum()) for i in range(len(corpus.sources))]
    assert list(mixture.state_dict()["tokens"]) == used

    resumed = mixture_of(corpus, seed)
    resumed.load_state_dict(state)
    assert (resumed.next(counts[-1] * T).reshape(-1, T + 1) == batches[-1]).all()
    assert resumed.state_dict() == mixture.state_dict()
    for source in corpus.sources:
        place = rf"\b{source.name} epoch \d+, from token [\d,]+ of x_train_00000[12].npy"
        assert re.search(place, mixture.where(state))


def test_every_prefix_has_each_sources_share_of_rows(folders):
    corpus = corpus_of(f"{folders[0]}:5", f"{folders[1]}:3", f"{folders[2]}:2")
    mixture = mixture_of(corpus, None)
    chosen = mixture._choose(100_000, 0, 0)
    for i, share in enumerate((0.5, 0.3, 0.2)):
        expected = share * np.arange(1, 100_001)
        assert np.abs(np.cumsum(chosen == i) - expected).max() < 5
    assert (mixture._choose(10, 2**62, 0) < 3).all()


def test_a_source_of_weight_0_is_never_read(folders):
    mixture = mixture_of(corpus_of(f"{folders[0]}:1", f"{folders[1]}:0"), None)
    mixture.next(5000 * T)
    assert mixture.state_dict()["tokens"] == (5000 * T, 0)
    assert mixture.progress()["data/epoch_a"] == 5000 * T // 4500


# --------------------------------------------------------------------------------------------------
# Real runs


@pytest.fixture(scope="module")
def sources(data, tokenizer, tmp_path_factory):
    """The toy data, and another folder of the same tokenizer with other text."""
    folder = write_data(tmp_path_factory.mktemp("more") / "more", tokenizer, shards=1)
    for path in folder.glob("*.npy"):
        np.save(path, np.load(path)[::-1].copy())
    return data, folder


def train(folder, *flags):
    """Train in a run folder, or continue it without flags."""
    words = ["--log_dir", folder.parent, "--run_name", folder.name, *flags]
    train_gpt2.main([str(word) for word in words])


def mixed_flags(sources):
    toy, more = sources
    return [*TINY_FLAGS, "--shuffle", "--micro_batch", 2, "--data", f"{toy}:3", f"{more}:1"]


@pytest.fixture(scope="module")
def mixed_run(sources, tmp_path_factory):
    """A run on a mixture, to be copied."""
    folder = tmp_path_factory.mktemp("mixed") / "a"
    train(folder, *mixed_flags(sources), "--save_every", 3, "--keep", 0)
    return folder


def scalars(folder):
    """{tag: {step: value}} of a run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def test_a_mixed_run_shows_its_sources_and_resumes_to_the_same_losses(mixed_run, tmp_path, capsys):
    whole = read_log(mixed_run)
    folder = shutil.copytree(mixed_run, tmp_path / "b")
    (folder / "ckpt_00006.pt").unlink()
    train(folder)
    assert read_log(folder) == whole
    values = scalars(folder)
    assert values["data/tokens_toy"][5] + values["data/tokens_more"][5] == 6 * 256
    assert values["data/share_more"][5] == 0.25
    for step in (4, 6):
        mean = 0.75 * values["Loss/val_toy"][step] + 0.25 * values["Loss/val_more"][step]
        assert values["Loss/val"][step] == pytest.approx(mean)
    printed = capsys.readouterr().out
    assert re.search(r"data    .+toy: .*; 75.0% of the mixture, 0.\d\d epochs\n"
                     r" *data    .+more: .*25.0% of the mixture", printed)


def test_a_mixed_run_is_the_same_on_two_processes(mixed_run, sources, launch, tmp_path):
    done = launch("train_gpt2.py", *mixed_flags(sources), "--log_dir", tmp_path,
                  "--run_name", "c", processes=2)
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "c") == pytest.approx(read_log(mixed_run), rel=1e-5)


def test_a_curriculum_runs_and_its_share_is_logged(sources, tmp_path):
    toy, more = sources
    flags = [*TINY_FLAGS, "--data", toy, "--curriculum", more]
    train(tmp_path / "a", *flags, "--curriculum_steps", 4, "--curriculum_mix", "step")
    values = scalars(tmp_path / "a")
    tokens = [values["data/tokens_more"][step] for step in range(6)]
    assert tokens == [256, 512, 768, 1024, 1024, 1024]
    shares = [values["data/share_more"][step] for step in range(6)]
    assert shares == [1, 1, 1, 0, 0, 0]  # of the next row
    assert values["Loss/val"] == values["Loss/val_toy"]
    with pytest.raises(BadInput, match="--curriculum_steps 7"):
        train(tmp_path / "b", *flags, "--curriculum_steps", 7)


@pytest.fixture(scope="module")
def curriculum_run(sources, tmp_path_factory):
    """A run of 10 steps, 8 of them with a curriculum."""
    toy, more = sources
    folder = tmp_path_factory.mktemp("curriculum") / "a"
    train(folder, *TINY_FLAGS, "--eval_every", 0, "--save_every", 2, "--keep", 0,
          "--max_steps", 10, "--data", toy, "--curriculum", more, "--curriculum_steps", 8,
          "--curriculum_mix", "linear")
    return folder


@pytest.mark.parametrize("change", ["other data", "larger batches"])
def test_a_curriculum_counts_the_steps_of_the_run_after_any_change(
        change, curriculum_run, sources, tokenizer, tmp_path):
    changed = ["--total_batch_size", 512]
    if change == "other data":
        changed = ["--data", sources[0], write_data(tmp_path / "third", tokenizer)]
    folder = tmp_path / "b"
    train(folder, "--resume", curriculum_run / "ckpt_00004.pt", *changed)
    for step in (8, 10):
        (folder / f"ckpt_{step:05d}.pt").unlink()
    train(folder)
    shares = scalars(folder)["data/share_more"]
    assert [shares[step] for step in range(4, 10)] == [0.375, 0.25, 0.125, 0, 0, 0]


def test_a_curriculum_cannot_begin_after_its_end(sources, tmp_path):
    toy, more = sources
    folder = tmp_path / "plain"
    train(folder, *TINY_FLAGS, "--eval_every", 0, "--data", toy)
    with pytest.raises(BadInput, match="is at step 6, but --curriculum_steps 5"):
        train(folder, "--max_steps", 20, "--curriculum", more, "--curriculum_steps", 5)
    with pytest.raises(BadInput, match="--curriculum and --curriculum_steps"):
        train(folder, "--max_steps", 20, "--curriculum", more)


@pytest.mark.parametrize("flags, epochs", [  # six steps are 1,536 tokens; few has 120
    (["--max_steps", 6, "--data", "{toy}:1", "{few}:1"], "6.4"),
    (["--max_steps", 6, "--data", "{toy}:9", "{few}:1"], None),
    (["--max_steps", 6, "--data", "{toy}", "--curriculum", "{few}", "--curriculum_steps", 5],
     "5.3"),
    (["--minutes", 0.02, "--data", "{toy}:1", "{few}:99"], r"[\d,.]+"),  # once the length is known
], ids=["half", "a tenth", "curriculum", "minutes"])
def test_a_source_that_is_repeated_is_warned_about(flags, epochs, sources, tmp_path, capsys):
    few = write_data(tmp_path / "few", load_tokenizer(str(sources[0])), shards=1)
    shard = few / "toy_train_000001.npy"
    np.save(shard, np.load(shard)[:120])
    words = [str(word).format(toy=sources[0], few=few) for word in flags]
    at = TINY_FLAGS.index("--max_steps")
    tiny = TINY_FLAGS[:at] + TINY_FLAGS[at + 2:]
    train(tmp_path / "a", *tiny, "--eval_every", 0, "--val_tokens", 32, *words)
    printed = capsys.readouterr().out
    assert printed.count("warning") == (epochs is not None)
    if epochs:
        assert re.search(f"warning: {epochs} epochs of few, more than 4", printed)


def test_a_checkpoint_from_before_mixtures_is_continued(sources, tmp_path):
    folder = tmp_path / "a"
    train(folder, *TINY_FLAGS, "--data", sources[0], "--save_every", 3, "--keep", 0)
    whole = read_log(folder)
    (folder / "ckpt_00006.pt").unlink()
    state = checkpoint.read(folder / "ckpt_00003.pt")
    assert state["loader"].keys() == {"epoch", "shard", "offset"}
    assert state["data"] == Shards(sources[0]).identity
    state["train_config"]["data"] = str(sources[0])
    for name in ("curriculum", "curriculum_steps", "curriculum_mix", "tokens_per_param",
                 "plan", "tok_per_sec", "price_per_hour"):
        del state["train_config"][name]
    checkpoint.write(folder / "ckpt_00003.pt", state)
    train(folder)
    assert read_log(folder) == whole


@pytest.mark.parametrize("change", [
    dict(places=[[0, 0, 0]]), dict(places=[[0, 10**6, 0], [0, 0, 0]]), dict(rows=-1),
    dict(tokens=["x", 1]), dict(places=[[0, 0], [0, 0, 0]])])
def test_a_tampered_position_is_refused(change, mixed_run, tmp_path):
    folder = shutil.copytree(mixed_run, tmp_path / "a")
    path = folder / "ckpt_00006.pt"
    state = checkpoint.read(path)
    state["loader"].update(change)
    checkpoint.write(path, state)
    with pytest.raises(BadInput, match="ckpt_00006.pt"):
        train(folder, "--max_steps", 9)


# --------------------------------------------------------------------------------------------------
# Any iterator


def pieces_of(tokens, seed=0):
    """The tokens in pieces of random lengths."""
    rng = random.Random(seed)
    start = 0
    while start < len(tokens):
        end = start + rng.randint(1, 7)
        yield tokens[start:end].tolist()
        start = end


@pytest.mark.parametrize("batches", [[40], [8, 8, 8, 8, 8], [3, 20, 1, 16]])
def test_an_iterator_yields_its_tokens_in_batches_of_any_size_and_after_a_resume(batches):
    tokens = np.arange(31)  # shorter than the batches: it begins again
    endless = np.resize(tokens, 100)
    stream = IteratorStream(partial(pieces_of, tokens))
    position = 0
    for n in batches:
        state = as_saved(stream.state_dict())
        batch = stream.next(n)
        assert batch.tolist() == endless[position:position + n + 1].tolist()
        position += n
    resumed = IteratorStream(partial(pieces_of, tokens))
    resumed.load_state_dict(state)
    assert resumed.next(batches[-1]).tolist() == batch.tolist()
    assert resumed.where(state) == f"tokens {position - batches[-1]}"
    resumed.load_state_dict({"tokens": 0})  # back
    assert resumed.next(5).tolist() == [0, 1, 2, 3, 4, 5]


def test_an_empty_iterator_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        IteratorStream(list).next(1)


def run_page(folder, flags, monkeypatch):
    """Run the script on docs/streams.md, saved in a folder."""
    page = (ROOT / "docs" / "streams.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.setattr("sys.argv", [str(folder / "mine.py"), *map(str, flags)])
    exec(compile(block, "mine.py", "exec"), {"__name__": "__main__"})


def test_the_page_on_streams_trains_on_its_iterator_and_resumes(data, tmp_path, monkeypatch):
    log = ["--log_dir", tmp_path, "--run_name", "a"]
    flags = [*TINY_FLAGS, "--data", data, *log, "--save_every", 3, "--keep", 0]
    run_page(tmp_path, flags, monkeypatch)
    whole = read_log(tmp_path / "a")
    assert whole[5, "train"] < whole[0, "train"]
    (tmp_path / "a" / "ckpt_00006.pt").unlink()
    run_page(tmp_path, log, monkeypatch)
    assert read_log(tmp_path / "a") == whole
    assert checkpoint.read(tmp_path / "a" / "ckpt_00006.pt")["loader"] == {"tokens": 6 * 256}


def test_the_classes_here_have_the_interface_that_training_uses():
    for kind in (ShardLoader, FollowingStream, Mixture, Rows, IteratorStream):
        assert members(StreamLike) <= set(dir(kind))
    for kind in (train_gpt2.Pretraining, PostTraining):
        assert members(TaskLike) <= set(dir(kind))
    assert members(CorpusLike) <= set(dir(Corpus)) & set(dir(Data))


def members(protocol):
    """The methods of a Protocol."""
    return {name for name in vars(protocol) if not name.startswith("_")}
