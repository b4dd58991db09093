"""Several folders as one corpus and one stream. Run: python -m pytest tests/lib/test_streams.py"""

import json
import math
import random
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, TINY_FLAGS, read_log, write_data
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt2
from lib import checkpoint
from lib.cli import BadInput
from lib.corpus import Corpus, split_weight
from lib.shards import Shards
from lib.streams import CorpusLike, IteratorStream, Mixture, Rows, StreamLike, TaskLike
from lib.tokenizers import load_tokenizer, train_bpe
from posttrain import Data, PostTraining
from train_gpt2 import ShardLoader

T = 8
FAKE = SimpleNamespace(vocab_size=60_000, eot=0)


def corpus_of(*data, **changes):
    return Corpus(
        SimpleNamespace(**dict(data=tuple(map(str, data)), curriculum=None, curriculum_steps=None,
                               curriculum_mix="cosine", total_batch_size=100 * T, batch_warmup=0)
                        | changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three folders of two train shards each, whose ids tell where they come from: 10,000 to 19,999
    in the first, and so on."""
    root, rng = tmp_path_factory.mktemp("mixture"), np.random.default_rng(0)
    for i, size in enumerate((3000, 1000, 500)):
        folder = root / "abc"[i]
        folder.mkdir()
        for split, index, n in (("val", 0, 50), ("train", 1, size), ("train", 2, size // 2)):
            ids = 10_000 * (i + 1) + 3 * np.arange(n) % 9_000 + index
            ids[rng.integers(0, n, n // 20)] = FAKE.eot
            np.save(folder / f"x_{split}_{index:06d}.npy", ids.astype(np.uint16))
    return [root / name for name in "abc"]


def mixture_of(corpus, seed):
    return Mixture(corpus,
                   [ShardLoader(source.shards.train, FAKE, seed) for source in corpus.sources], T)


def plain(corpus, seed, rows):
    """The first rows of a mixture, one at a time: (rows, T + 1) and their sources, by the
    definition alone."""
    streams, used, out, chosen = [], [0] * len(corpus.sources), [], []
    for source in corpus.sources:  # each source's tokens, far enough
        streams.append(
            ShardLoader(source.shards.train, FAKE, seed).read_batch(rows * T, 0, 0, 0)[0])
    for k in range(rows):
        point = ((k * 0x9E3779B97F4A7C15) % 2**64 >> 11) / 2**53
        shares = corpus.shares(np.array([k * T]))[0]
        i = next(i for i in range(len(shares))
                 if point < shares[:i + 1].sum() or i == len(shares) - 1)
        out.append(streams[i][used[i]:used[i] + T + 1])
        used[i] += T
        chosen.append(i)
    return np.stack(out), np.array(chosen)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.data())
def test_the_stream_against_a_plain_loop_from_any_point_in_any_batches(folders, data):
    seed = data.draw(st.sampled_from([None, 7]))
    words = data.draw(
        st.sampled_from([
            folders, [f"{folder}:{weight}" for folder, weight in zip(folders, (0.2, 3, 0))],
            folders[:1]
        ]))
    stage = {} if len(words) == 3 else dict(
        curriculum=str(folders[2]), curriculum_steps=2, curriculum_mix=data.draw(
            st.sampled_from(["cosine", "step"])))
    corpus, counts = corpus_of(*words, **stage), data.draw(
        st.lists(st.integers(1, 60), min_size=1, max_size=8))
    want, chosen = plain(corpus, seed, sum(counts))
    mixture, states = mixture_of(corpus, seed), []
    got = []
    for count in counts:
        states.append(json.loads(json.dumps(mixture.state_dict())))
        got.append(mixture.next(count * T).reshape(-1, T + 1))
    assert (np.concatenate(got) == want).all()
    assert list(mixture.state_dict()["tokens"]) == [
        int((chosen == i).sum()) * T for i in range(len(corpus.sources))
    ]
    resumed = mixture_of(corpus, seed)
    resumed.load_state_dict(states[-1])
    assert (resumed.next(counts[-1] * T).reshape(-1, T + 1)
            == got[-1]).all() and resumed.state_dict() == mixture.state_dict()
    for name in (source.name for source in corpus.sources):
        assert re.search(rf"\b{name} epoch \d+, from token [\d,]+ of x_train_00000[12].npy",
                         mixture.where(states[-1]))


def test_every_prefix_has_each_sources_share_of_rows(folders):
    corpus = corpus_of(f"{folders[0]}:5", f"{folders[1]}:3", f"{folders[2]}:2")
    chosen = mixture_of(corpus, None)._choose(100_000, 0, 0)
    for i, share in enumerate((0.5, 0.3, 0.2)):
        assert np.abs(np.cumsum(chosen == i) - share * np.arange(1, 100_001)).max() < 5
    assert (mixture_of(corpus, None)._choose(10, 2**62, 0) < 3).all()


def test_without_weights_a_source_has_its_size_and_no_weight_means_never(folders):
    assert corpus_of(*folders).weights.tolist() == pytest.approx(
        [3000 / 4500, 1000 / 4500, 500 / 4500])
    corpus = corpus_of(f"{folders[0]}:1", f"{folders[1]}:0")
    mixture = mixture_of(corpus, None)
    mixture.next(5000 * T)
    assert mixture.state_dict()["tokens"] == (
        5000 * T, 0) and mixture.progress()["data/epoch_a"] == 5000 * T // 4500
    assert corpus.epochs(9000).tolist() == [
        2.0, 0.0
    ] and corpus.tokens["train"] == 4500  # what --epochs counts


def test_a_curriculum_gives_way_as_its_formula_says(folders):
    for mix, want in {
            "cosine": [1.0, 0.5, 0.0, 0.0], "linear": [1.0, 0.5, 0.0, 0.0],
            "step": [1.0, 1.0, 0.0, 0.0]
    }.items():
        corpus = corpus_of(
            *folders[:2],
            curriculum=str(folders[2]),
            curriculum_steps=10,  # 10 x 100 T tokens
            curriculum_mix=mix)
        shares = corpus.shares(np.array([0, 500 * T, 1000 * T, 5000 * T]))
        assert shares[:, 2].tolist() == pytest.approx(want) and shares.sum(
            axis=1).tolist() == pytest.approx([1.0] * 4)
        assert (shares[:, 0] == pytest.approx(3 * shares[:, 1])) and corpus.weights[2] == 0
    ramped = corpus_of(folders[0], curriculum=str(folders[2]), curriculum_steps=10,
                       batch_warmup=200 * T)  # its first 4 steps are half as large
    assert ramped.stage == 800 * T
    quarter = corpus_of(folders[0], curriculum=str(folders[2]),
                        curriculum_steps=10).shares(np.array([250 * T]))[0, 1]
    assert quarter == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    corpus = corpus_of(folders[0], curriculum=str(folders[2]), curriculum_steps=10,
                       curriculum_mix="linear")
    # half of the stage is the curriculum's
    assert corpus.epochs(2000 * T) == pytest.approx([1500 * T / 4500, 500 * T / 750], rel=1e-3)


def test_one_folder_is_what_it_was(folders):
    corpus, shards = corpus_of(folders[0]), Shards(folders[0])
    assert (corpus.identity, corpus.tokens["train"], corpus.tokenizer) == (
        shards.identity, shards.tokens["train"], shards.tokenizer)
    assert corpus.weights.tolist() == [1.0] and corpus.tags("x", [1]) == {} and not corpus.is_mixed
    assert corpus_of(*folders[:2]).identity not in (corpus_of(folders[1],
                                                              folders[0]).identity, corpus.identity)
    assert corpus_of(f"{folders[0]}:1",
                     f"{folders[1]}:9").identity == corpus_of(*folders[:2]).identity


def test_no_source_is_named_as_another_or_as_a_tag_of_its_own(folders, tmp_path):
    others = [
        shutil.copytree(folders[0], tmp_path / name) for name in ("x/a", "bpb", "pretraining")
    ]
    names = [source.name for source in corpus_of(*folders, *others).sources]
    assert names[1:3] == ["b", "c"] and names[0].endswith("_a") and len(
        {*names, "bpb", "pretraining"}) == 8


@pytest.mark.parametrize("word, want", [("a", ("a", None)), ("a:2", ("a", 2.0)),
                                        ("x/y:0.25", ("x/y", 0.25)),
                                        (r"C:\data", (r"C:\data", None))])
def test_a_weight_stands_behind_the_last_colon(word, want):
    assert split_weight(word) == want


def test_what_cannot_be_mixed_is_refused(folders, tokenizer, tmp_path):
    a, b, c = folders
    toy, twin = write_data(tmp_path / "toy", tokenizer), write_data(tmp_path / "twin", tokenizer)
    other = write_data(tmp_path / "other",
                       train_bpe(["the cat sat on a mat and a dog ran by"] * 9, 270))
    corpus_of(toy, twin)  # one tokenizer in two files
    (tmp_path / "void").mkdir()
    for split in ("train", "val"):
        np.save(tmp_path / "void" / f"x_{split}_000000.npy",
                np.zeros(0 if split == "train" else 50, dtype=np.uint16))
    for data, changes, says in [
        ((f"{a}:0", f"{b}:0"), {}, "the weights of --data add up to 0: give at least one above 0"),
        ((f"{a}:1", b), {}, "some of --data have a weight and some have none"),
            *(((f"{folder}:{weight}", b), {}, "a weight is a number from 0 to 1,000,000,000")
              for folder, weight in ((a, "-1"), (a, "much"), (a, "nan"), (a, "1e10"),
                                     ("nowhere", "-1"), ("nowhere", "1e400"))),
        ((a, b, f"{a}/"), {},
         "is named twice by --data: name it once, with the sum of the weights"),
        ((b, a), dict(curriculum=str(a), curriculum_steps=3),
         "a is named by both --data and --curriculum: name another folder for one"),
        ((a,), dict(curriculum="nowhere", curriculum_steps=3), "or name another --curriculum"),
        ((a, "nowhere"), {}, "or name another --data"),
        ((a,), dict(curriculum=str(b)), "--curriculum and --curriculum_steps belong together"),
        ((a,), dict(curriculum_steps=3), "--curriculum and --curriculum_steps belong together"),
        ((a, tmp_path / "void"), {}, "void hold no tokens"),
        ((a, toy), {}, "a holds tokens of gpt2, and toy of .*toy/tokenizer.json"),
        ((toy, other), {},
         "toy holds tokens of .*toy/tokenizer.json, and other of .*other/tokenizer.json")
    ]:
        with pytest.raises(BadInput, match=says):
            corpus_of(*data, **changes)
    run = dict(minutes=None, batch_warmup=0, total_batch_size=1000, curriculum_steps=None)
    cfg = SimpleNamespace(**run)
    corpus_of(f"{a}:1", f"{c}:1").check_length(cfg, 149)  # 99 epochs of its 750 tokens
    with pytest.raises(BadInput, match="c runs dry: the run would pass over its 750 tokens 133 times, more than 100; "
                                       "lower its weight"):
        corpus_of(f"{a}:1", f"{c}:1").check_length(cfg, 200)
    with pytest.raises(BadInput,
                       match="c runs dry: .* 107 times, more than 100; lower --curriculum_steps"):
        corpus_of(a, curriculum=str(c), curriculum_steps=200).check_length(
            SimpleNamespace(**run | dict(curriculum_steps=200)), 200)
    with pytest.raises(BadInput, match="--curriculum_steps 9 is longer than the run of 8 steps"):
        corpus_of(a).check_length(SimpleNamespace(**run | dict(curriculum_steps=9)), 8)


# ----------------------------------------------------------------------------------------------------------------------
# Real runs


@pytest.fixture(scope="module")
def sources(data, tokenizer, tmp_path_factory):
    """The toy data, and another folder of the same tokenizer with other text."""
    folder = write_data(tmp_path_factory.mktemp("more") / "more", tokenizer, shards=1)
    for path in folder.glob("*.npy"):
        np.save(path, np.load(path)[::-1].copy())
    return data, folder


def flags_of(sources, folder, *more):
    return [
        *TINY_FLAGS, "--shuffle", "--micro_batch", "2", "--data", f"{sources[0]}:3",
        f"{sources[1]}:1", "--log_dir",
        str(folder.parent), "--run_name", folder.name, *map(str, more)
    ]


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: {event.step: event.value
              for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_a_mixed_run_is_the_same_for_two_processes_and_after_a_stop(launch, sources, tmp_path,
                                                                    capsys):
    train_gpt2.main(flags_of(sources, tmp_path / "a", "--save_every", "3", "--keep", "0"))
    said, whole = capsys.readouterr().out, read_log(tmp_path / "a")
    assert re.search(r"data    \S+toy: .*; 75.0% of the mixture, 0.\d\d epochs\n"
                     r" *data    \S+more: .*25.0% of the mixture", said)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "ckpt_00006.pt").unlink()
    train_gpt2.main(["--log_dir", str(tmp_path), "--run_name", "b"])
    assert read_log(tmp_path / "b") == whole
    done = launch("train_gpt2.py", *flags_of(sources, tmp_path / "c"), processes=2)
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "c") == pytest.approx(whole, rel=1e-5)
    values = scalars(tmp_path / "b")
    assert values["data/tokens_toy"][5] + values["data/tokens_more"][5] == 6 * 256 and values[
        "data/share_more"][5] == 0.25
    for step in (4, 6):
        assert values["Loss/val"][step] == pytest.approx(
            0.75 * values["Loss/val_toy"][step] + 0.25 * values["Loss/val_more"][step])


def test_a_curriculum_runs_and_its_share_is_logged(sources, tmp_path):
    flags = [*TINY_FLAGS, "--data", str(sources[0]), "--log_dir", str(tmp_path)]
    train_gpt2.main([
        *flags, "--run_name", "a", "--curriculum",
        str(sources[1]), "--curriculum_steps", "4", "--curriculum_mix", "step"
    ])
    values = scalars(tmp_path / "a")
    assert [values["data/tokens_more"][step]
            for step in range(6)] == [256, 512, 768, 1024, 1024, 1024]
    assert [values["data/share_more"][step]
            for step in range(6)] == [1, 1, 1, 0, 0, 0]  # of the row that comes next
    assert values["Loss/val"] == values["Loss/val_toy"]
    with pytest.raises(BadInput, match="--curriculum_steps 7 is longer than the run of 6 steps"):
        train_gpt2.main(
            [*flags, "--run_name", "b", "--curriculum",
             str(sources[1]), "--curriculum_steps", "7"])


def test_a_curriculum_goes_by_the_steps_of_the_run_whatever_changes_on_the_way(sources, tmp_path):
    third = write_data(tmp_path / "third", load_tokenizer(str(sources[0])))
    flags = [
        *TINY_FLAGS, "--log_dir",
        str(tmp_path), "--eval_every", "0", "--save_every", "2", "--keep", "0", "--max_steps", "10"
    ]
    stage = [
        "--curriculum",
        str(sources[1]), "--curriculum_steps", "8", "--curriculum_mix", "linear"
    ]
    train_gpt2.main([*flags, "--run_name", "a", "--data", str(sources[0]), *stage])
    start = ["--resume", str(tmp_path / "a" / "ckpt_00004.pt"), "--log_dir", str(tmp_path)]
    for name, changed in {
            "other": ["--data", str(sources[0]), str(third)],
            "larger": ["--total_batch_size", "512"]
    }.items():
        train_gpt2.main([*start, "--run_name", name, *changed])
        for step in (8, 10):
            (tmp_path / name / f"ckpt_{step:05d}.pt").unlink()
        train_gpt2.main(["--log_dir", str(tmp_path), "--run_name", name])
        assert [scalars(tmp_path / name)["data/share_more"][step] for step in range(4, 10)] == [
            0.375, 0.25, 0.125, 0, 0, 0]  # of the next row
    train_gpt2.main([*flags, "--run_name", "plain", "--data", str(sources[0])])
    with pytest.raises(BadInput,
                       match="is at step 10, and --curriculum_steps 8 count from the first step"):
        train_gpt2.main(
            ["--log_dir",
             str(tmp_path), "--run_name", "plain", "--max_steps", "20", *stage])
    with pytest.raises(BadInput, match="--curriculum and --curriculum_steps belong together"):
        train_gpt2.main(
            ["--log_dir",
             str(tmp_path), "--run_name", "plain", "--max_steps", "20", *stage[:2]])


def test_a_source_that_is_repeated_is_told_by_name(sources, tmp_path, capsys):
    """Six steps are 1,536 tokens: half of them 6.4 passes over 120; of --minutes, when the length
    stands."""
    few = write_data(tmp_path / "few", load_tokenizer(str(sources[0])), shards=1)
    np.save(few / "toy_train_000001.npy", np.load(few / "toy_train_000001.npy")[:120])
    flags = [*TINY_FLAGS, "--log_dir", str(tmp_path), "--eval_every", "0", "--val_tokens", "32"]
    for i, (more, told) in enumerate([
        (["--data", f"{sources[0]}:1", f"{few}:1"], "6.4"),
        (["--data", f"{sources[0]}:9", f"{few}:1"], None),
        (["--data", sources[0], "--curriculum", few, "--curriculum_steps", "5"], "5.3"),
        (["--data", f"{sources[0]}:1", f"{few}:1", "--minutes", "0.05"], r"[\d,.]+")
    ]):
        given = flags if "--minutes" not in more else [
            flag for flag in flags if flag not in ("--max_steps", "6")
        ]
        train_gpt2.main([*given, "--run_name", str(i), *map(str, more)])
        said = capsys.readouterr().out
        assert said.count("warning") == bool(told)
        assert not told or re.search(f"warning: {told} epochs of few, more than 4", said)


def test_a_checkpoint_of_one_folder_named_as_text_goes_on(sources, tmp_path):
    """As versions before mixtures wrote it."""
    flags = [
        *TINY_FLAGS, "--data",
        str(sources[0]), "--log_dir",
        str(tmp_path), "--save_every", "3", "--keep", "0"
    ]
    train_gpt2.main([*flags, "--run_name", "a"])
    whole = read_log(tmp_path / "a")
    (tmp_path / "a" / "ckpt_00006.pt").unlink()
    state = checkpoint.read(tmp_path / "a" / "ckpt_00003.pt")
    assert state["loader"].keys() == {"epoch", "shard", "offset"} and state["data"] == Shards(
        sources[0]).identity
    state["train_config"]["data"] = str(sources[0])
    for name in ("curriculum", "curriculum_steps", "curriculum_mix", "tokens_per_param",
                 "plan", "tok_per_sec", "price_per_hour"):
        del state["train_config"][name]
    checkpoint.write(tmp_path / "a" / "ckpt_00003.pt", state)
    train_gpt2.main(["--log_dir", str(tmp_path), "--run_name", "a"])
    assert read_log(tmp_path / "a") == whole


@pytest.mark.parametrize("change", [
    dict(places=[[0, 0, 0]]),
    dict(places=[[0, 10**6, 0], [0, 0, 0]]),
    dict(rows=-1),
    dict(tokens=["x", 1]),
    dict(places=[[0, 0], [0, 0, 0]])
])
def test_a_tampered_position_is_refused(change, sources, tmp_path):
    train_gpt2.main(flags_of(sources, tmp_path / "a", "--eval_every", "0"))
    path = tmp_path / "a" / "ckpt_00006.pt"
    state = checkpoint.read(path)
    state["loader"].update(change)
    checkpoint.write(path, state)
    with pytest.raises(BadInput, match="ckpt_00006.pt"):
        train_gpt2.main(["--log_dir", str(tmp_path), "--run_name", "a", "--max_steps", "9"])


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
def test_an_iterator_gives_its_tokens_in_batches_of_any_size_and_after_a_resume(batches):
    tokens = np.arange(31)  # shorter than the batches: it begins again
    endless = np.resize(tokens, 100)
    stream = IteratorStream(partial(pieces_of, tokens))
    position = 0
    for n in batches:
        state = json.loads(json.dumps(stream.state_dict()))
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
    for kind in (ShardLoader, Mixture, Rows, IteratorStream):
        assert members(StreamLike) <= set(dir(kind))
    for kind in (train_gpt2.Pretraining, PostTraining):
        assert members(TaskLike) <= set(dir(kind))
    assert members(CorpusLike) <= set(dir(Corpus)) & set(dir(Data))


def members(protocol):
    """The methods of a Protocol."""
    return {name for name in vars(protocol) if not name.startswith("_")}
