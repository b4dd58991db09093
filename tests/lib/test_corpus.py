"""Several folders as one corpus. Run: python -m pytest tests/lib/test_corpus.py"""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from corpora import T, corpus_of, write_folders
from helpers import write_data

from lib.cli import BadInput
from lib.corpus import split_weight
from lib.shards import Shards
from lib.tokenizers import train_bpe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("corpus"))


def test_without_weights_a_source_counts_by_its_size(folders):
    weights = corpus_of(*folders).weights
    assert weights.tolist() == pytest.approx([3000 / 4500, 1000 / 4500, 500 / 4500])


def test_epochs_count_only_sources_with_a_weight(folders):
    corpus = corpus_of(f"{folders[0]}:1", f"{folders[1]}:0")
    assert corpus.epochs(9000).tolist() == [2.0, 0.0]
    assert corpus.tokens["train"] == 4500


@pytest.mark.parametrize("mix, half_way", [("cosine", 0.5), ("linear", 0.5), ("step", 1.0)])
def test_a_curriculum_decays_by_its_formula(mix, half_way, folders):
    corpus = corpus_of(*folders[:2], curriculum=str(folders[2]), curriculum_steps=10,
                       curriculum_mix=mix)  # 10 steps of 100 T tokens
    shares = corpus.shares(np.array([0, 500 * T, 1000 * T, 5000 * T]))
    assert shares[:, 2].tolist() == pytest.approx([1.0, half_way, 0.0, 0.0])
    assert shares.sum(axis=1).tolist() == pytest.approx([1.0] * 4)
    assert shares[:, 0] == pytest.approx(3 * shares[:, 1])
    assert corpus.weights[2] == 0


def test_a_curriculum_counts_steps_of_the_batch_warmup(folders):
    corpus = corpus_of(folders[0], curriculum=str(folders[2]), curriculum_steps=10,
                       batch_warmup=200 * T)  # the first 4 steps are half as large
    assert corpus.stage == 800 * T


def test_the_cosine_of_a_curriculum_and_its_epochs(folders):
    stage = dict(curriculum=str(folders[2]), curriculum_steps=10)
    quarter = corpus_of(folders[0], **stage).shares(np.array([250 * T]))[0, 1]
    assert quarter == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    linear = corpus_of(folders[0], **stage, curriculum_mix="linear")
    # half of the 1,000 T tokens of the stage are the curriculum's
    assert linear.epochs(2000 * T) == pytest.approx([1500 * T / 4500, 500 * T / 750], rel=1e-3)


def test_a_single_folder_is_not_a_mixture(folders):
    corpus = corpus_of(folders[0])
    shards = Shards(folders[0])
    assert (corpus.identity, corpus.tokenizer) == (shards.identity, shards.tokenizer)
    assert corpus.tokens["train"] == shards.tokens["train"]
    assert corpus.weights.tolist() == [1.0]
    assert corpus.tags("x", [1]) == {} and not corpus.is_mixed


def test_the_identity_depends_on_the_folders_and_not_on_weights(folders):
    a, b, _ = folders
    both = corpus_of(a, b).identity
    assert both not in (corpus_of(b, a).identity, corpus_of(a).identity)
    assert corpus_of(f"{a}:1", f"{b}:9").identity == both


def test_names_of_sources_are_distinct_and_not_those_of_tags(folders, tmp_path):
    copies = ["x/a", "bpb", "pretraining"]
    others = [shutil.copytree(folders[0], tmp_path / name) for name in copies]
    names = [source.name for source in corpus_of(*folders, *others).sources]
    assert names[1:3] == ["b", "c"] and names[0].endswith("_a")
    assert len({*names, "bpb", "pretraining"}) == 8


@pytest.mark.parametrize("word, want", [
    ("a", ("a", None)), ("a:2", ("a", 2.0)), ("x/y:0.25", ("x/y", 0.25)),
    (r"C:\data", (r"C:\data", None))])
def test_a_weight_follows_the_last_colon(word, want):
    assert split_weight(word) == want


@pytest.fixture
def others(folders, tokenizer, tmp_path):
    """{name: folder} of folders that do not mix with a, b and c."""
    void = tmp_path / "void"
    void.mkdir()
    for split, size in (("train", 0), ("val", 50)):
        np.save(void / f"x_{split}_000000.npy", np.zeros(size, dtype=np.uint16))
    other = train_bpe(["the cat sat on a mat and a dog ran by"] * 9, 270)
    return {
        "a": folders[0], "b": folders[1], "void": void,
        "toy": write_data(tmp_path / "toy", tokenizer),
        "twin": write_data(tmp_path / "twin", tokenizer),
        "other": write_data(tmp_path / "other", other),
    }


@pytest.mark.parametrize("data, curriculum, steps, says", [
    ("{a}:0 {b}:0", None, None, "the weights of --data add up to 0"),
    ("{a}:1 {b}", None, None, "some of --data have a weight"),
    ("{a}:-1 {b}", None, None, "a weight is a number from 0"),
    ("{a}:much {b}", None, None, "a weight is a number from 0"),
    ("{a}:nan {b}", None, None, "a weight is a number from 0"),
    ("{a}:1e10 {b}", None, None, "a weight is a number from 0"),
    ("nowhere:-1 {b}", None, None, "a weight is a number from 0"),
    ("nowhere:1e400 {b}", None, None, "a weight is a number from 0"),
    ("{a} {b} {a}/", None, None, "twice by --data"),
    ("{b} {a}", "{a}", 3, "/a is named by both --data and --curriculum"),
    ("{a}", "nowhere", 3, "another --curriculum"),
    ("{a} nowhere", None, None, "another --data"),
    ("{a}", "{b}", None, "--curriculum and --curriculum_steps"),
    ("{a}", None, 3, "--curriculum and --curriculum_steps"),
    ("{a} {void}", None, None, "void contain no tokens"),
    ("{a} {toy}", None, None, "a has tokens of gpt2, and toy of .*toy/tokenizer.json"),
    ("{toy} {other}", None, None, "toy has tokens of .*, and other of .*other/tokenizer.json"),
])
def test_folders_that_cannot_be_mixed_are_refused(data, curriculum, steps, says, others):
    if curriculum:
        curriculum = curriculum.format(**others)
    words = [word.format(**others) for word in data.split()]
    with pytest.raises(BadInput, match=says):
        corpus_of(*words, curriculum=curriculum, curriculum_steps=steps)


def test_one_tokenizer_may_be_in_two_files(others):
    assert corpus_of(others["toy"], others["twin"]).is_mixed


def settings(curriculum_steps=None):
    """Those of a run of 1,000 tokens per step."""
    return SimpleNamespace(minutes=None, batch_warmup=0, total_batch_size=1000,
                           curriculum_steps=curriculum_steps)


def test_a_source_repeated_too_often_is_refused(folders):
    a, _, c = folders
    mixture = corpus_of(f"{a}:1", f"{c}:1")
    mixture.check_length(settings(), 149)  # 99 epochs of its 750 tokens
    with pytest.raises(BadInput, match="^c runs dry: .* 133 times.* lower its weight"):
        mixture.check_length(settings(), 200)
    curriculum = corpus_of(a, curriculum=str(c), curriculum_steps=200)
    with pytest.raises(BadInput, match="^c runs dry: .* 107 times.* lower --curriculum_steps"):
        curriculum.check_length(settings(curriculum_steps=200), 200)


def test_a_curriculum_longer_than_the_run_is_refused(folders):
    with pytest.raises(BadInput, match="--curriculum_steps 9"):
        corpus_of(folders[0]).check_length(settings(curriculum_steps=9), 8)
