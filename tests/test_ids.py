"""Shards of ids that are not text: training, samples and generation, and what refuses them.
Run: python -m pytest tests/test_ids.py"""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY_FLAGS, read_log

import ablate
import chat
import eval_harness
import export_hf
import fineweb
import generate
import hellaswag
import posttrain
import tokenizer as tokenizer_script
import train_gpt2
from lib import checkpoint
from lib.cli import BadInput
from lib.corpus import Corpus
from lib.decoding import SampleConfig, sample
from lib.logger import read_scalars
from lib.pretokenized import described_tokenizer, find_tokenizer
from lib.shard_meta import Meta
from lib.shards import Shards, check_shards, read_validation
from lib.tokenizers import load_tokenizer

FLAGS = [*TINY_FLAGS, "--data", "chess", "--sample_every", "6"]


@pytest.fixture
def chess(tmp_path, monkeypatch):
    """The folder that the code in docs/data.md writes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "data.md").read_text()
    exec(re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1], {})
    return tmp_path / "chess"


def set_meta(folder, **values):
    (folder / "meta.json").write_text(json.dumps(values))


def rename_id(folder, before, after):
    """Replace an id in all shards."""
    for path in folder.glob("*.npy"):
        ids = np.load(path)
        ids[ids == before] = after
        np.save(path, ids)


def is_ids(text, prompt, vocab_size=1500):
    """Whether a sample begins with the prompt, and all words are ids."""
    words = text.split()
    return text.startswith(prompt) and all(0 <= int(word) < vocab_size for word in words)


# --------------------------------------------------------------------------------------------------
# Training and generation


def test_training_from_the_code_of_the_page(chess, capsys):
    train_gpt2.main([*FLAGS, "--run_name", "a", "--save_every", "2", "--keep", "0",
                     "--hellaswag_every", "0"])
    out = capsys.readouterr().out
    samples = [line[2:] for line in out.splitlines() if line.startswith("> ")]
    assert len(samples) == 1
    assert is_ids(samples[0], "1499 ")  # the separator starts a document
    assert "bits per byte" not in out

    model, tokenizer, state = train_gpt2.load_checkpoint("log/a")
    assert state["tokenizer"] == "ids:1500"
    assert state["train_config"]["sample_prompt"] == ""
    assert model.config.vocab_size == 1500
    x, y = map(torch.tensor, read_validation(Shards("chess"), 330, 32, tokenizer))
    model.config = replace(model.config, vocab_size=1536)  # the loss includes the padding
    with torch.no_grad():
        logits = model(x).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, y.flatten()).item()
    scalars = read_scalars("log/a")
    assert math.isclose(scalars["Loss/val"][6], expected, rel_tol=1e-5)
    assert not [tag for tag in scalars if "bpb" in tag or "hellaswag" in tag]


def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(chess):
    flags = [*FLAGS, "--shuffle", "--sample_prompt", "3 5", "--save_every", "3", "--keep", "0"]
    train_gpt2.main([*flags, "--run_name", "whole"])
    train_gpt2.main(["--data", "chess", "--resume", "log/whole/ckpt_00003.pt", "--run_name", "b",
                     "--device", "cpu"])
    whole = read_log(chess.parent / "log" / "whole")
    resumed = read_log(chess.parent / "log" / "b")
    assert resumed == {key: value for key, value in whole.items() if key[0] >= 3}
    state = checkpoint.read("log/b/ckpt_00006.pt")
    assert state["train_config"]["sample_prompt"] == "3 5"  # kept, though not given again


def test_generate_takes_and_prints_ids(chess, capsys):
    train_gpt2.main([*FLAGS, "--run_name", "a"])
    model, tokenizer, _ = train_gpt2.load_checkpoint("log/a")
    capsys.readouterr()
    flags = ["--checkpoint", "log/a", "--device", "cpu", "--max_new_tokens", "5"]
    generate.main([*flags, "--samples", "2", "--prompt", "7  8\n9", ""])
    texts = capsys.readouterr().out.split("\n---\n")[:-1]
    settings = SampleConfig(samples=2, max_new_tokens=5)
    assert texts == sample(model, tokenizer, ["7 8 9", "1499"], settings)
    assert [is_ids(text, "7 8 9 ") for text in texts] == [True, True, False, False]
    generate.main([*flags, "--samples", "1"])  # streamed, from the start of a document
    assert is_ids(capsys.readouterr().out, "1499 ")


def test_another_separator(chess, capsys):
    rename_id(chess, before=0, after=1)
    rename_id(chess, before=1499, after=0)
    set_meta(chess, tokenizer="ids:1500", eot=0)
    train_gpt2.main([*FLAGS, "--run_name", "a", "--shuffle"])
    _, tokenizer, state = train_gpt2.load_checkpoint("log/a")
    assert (state["tokenizer"], tokenizer.eot) == ("ids:1500:0", 0)
    shuffled = train_gpt2.ShardLoader(Shards("chess").train, tokenizer, seed=1)
    tokens, *_ = shuffled.read_batch(81 * 400, 0, 0, 0)
    documents = tokens[:-1].reshape(400, 81)
    assert (documents[:, 0] == 0).all()  # whole documents, in another order
    plain = np.load(chess / "chess_train_000001.npy").reshape(450, 81)
    assert (documents != plain[:400]).any()


def test_init_from_needs_the_same_ids(chess):
    train_gpt2.main([*FLAGS, "--run_name", "a"])
    more = ["--init_from", "log/a", "--data", "chess", "--total_batch_size", "256", "--max_steps",
            "1", "--device", "cpu"]
    train_gpt2.main([*more, "--run_name", "b"])
    set_meta(chess, tokenizer="ids:1501")
    with pytest.raises(BadInput, match="another tokenizer than the checkpoint's, ids:1500"):
        train_gpt2.main([*more, "--run_name", "c"])


def test_ablations_have_no_bits_per_byte(chess):
    train_gpt2.main([*FLAGS, "--run_name", "a"])
    one = ablate.Run("base", 1, [], str(chess.parent / "log" / "a"))
    assert ablate.read_result(one)
    assert ablate.row([one], [one], "", price=None)[2] == "n/a"


def test_the_vocabulary_is_known_before_training(chess):
    cfg = train_gpt2.TrainConfig(data=("chess",))
    assert Corpus(cfg).vocab_size == 1500
    set_meta(chess, tokenizer="ids:1500", vocab_size=1400)
    with pytest.raises(BadInput, match="vocab_size 1,400"):
        train_gpt2.main([*FLAGS, "--run_name", "a"])


# --------------------------------------------------------------------------------------------------
# What is refused


def test_the_tokenizer():
    ids = load_tokenizer("ids:10")
    assert (ids.spec, ids.vocab_size, ids.eot) == ("ids:10", 10, 9)
    assert load_tokenizer("ids:10:9").spec == "ids:10"
    assert load_tokenizer("ids:10:3").eot == 3
    assert ids.encode(" 1 2\n9").tolist() == [1, 2, 9]
    assert ids.decode([1, 2, 9]) == "1 2 9"
    assert not ids.same_ids(load_tokenizer("gpt2"))
    assert not load_tokenizer("gpt2").same_ids(ids)


@pytest.mark.parametrize("spec", ["ids:", "ids:1", "ids:x", "ids:16777217", "ids:10:10", "ids:-3"])
def test_a_vocabulary_that_cannot_be(spec):
    with pytest.raises(BadInput, match="ids"):
        load_tokenizer(spec)


@pytest.mark.parametrize("text", ["hello", "10", "-1", "1,2", "1.5", "9" * 5000])
def test_a_prompt_that_is_not_ids(text):
    with pytest.raises(BadInput, match="not a list of ids"):
        load_tokenizer("ids:10").encode(text)


def test_shards_that_do_not_fit(chess, monkeypatch):
    set_meta(chess, tokenizer="ids:1499")
    with pytest.raises(BadInput, match="raise N of ids:N"):
        train_gpt2.main(FLAGS)
    monkeypatch.setattr("lib.shards.PROBED", 1000)  # a shard this long should have a separator
    rename_id(chess, before=1499, after=1)
    set_meta(chess, tokenizer="ids:1500")
    with pytest.raises(BadInput, match='meta.json, as "eot"'):
        check_shards(Shards("chess"), load_tokenizer("ids:1500"))


def test_training_refuses_evaluations_on_text(chess):
    for flags, name in ((["--hellaswag_every", "5"], "HellaSwag"),
                        (["--eval_tasks", "arc_easy"], "--eval_tasks"),
                        (["--sample_prompt", "hello"], "not a list of ids")):
        with pytest.raises(BadInput, match=name):
            train_gpt2.main([*FLAGS, "--hellaswag_every", "0", *flags])
    assert not (chess.parent / "log").exists() or not list((chess.parent / "log").iterdir())


def test_scripts_that_need_text_refuse(chess):
    (chess.parent / "a.txt").write_text("the cat sat on the mat. " * 100)
    train_gpt2.main([*FLAGS, "--run_name", "a"])
    model = ["--checkpoint", "log/a"]
    for main, flags in (
            (hellaswag.main, [*model, "--device", "cpu"]),
            (eval_harness.main, [*model, "--tasks", "arc_easy", "--device", "cpu"]),
            (posttrain.main, [*model, "--data", "a.txt"]),
            (chat.main, [*model, "-p", "hello", "--device", "cpu"]),
            (export_hf.main, [*model, "--out", "exported"]),
            (fineweb.main, ["--source", "a.txt", "--tokenizer", "ids:1500", "--out", "text"]),
            (tokenizer_script.main, ["compare", "--source", "a.txt", "--tokenizer", "ids:1500"])):
        with pytest.raises(BadInput, match=r"needs text, but ids:1500 is .*: use"):
            main(flags)
    for flags in (["--prompt", "hello"], ["--prompt", "1", "--stop", "2"]):
        with pytest.raises(BadInput):
            generate.main([*model, "--device", "cpu", *flags])


def test_shards_on_the_hub_are_refused(tmp_path):
    dataset = SimpleNamespace(id="some/dataset", beside={})
    with pytest.raises(BadInput, match="fineweb.py needs text"):
        find_tokenizer(SimpleNamespace(tokenizer="ids:1500"), tmp_path, dataset, None)
    with pytest.raises(BadInput, match="needs text"):
        described_tokenizer(Meta("ids:1500"), tmp_path, dataset, "").require_text("fineweb.py")


def test_a_refusal_is_one_line(chess, launch):
    done = launch("fineweb.py", "--source", ROOT / "docs" / "nothing.txt", "--tokenizer",
                  "ids:1500", "--out", "text")
    assert done.returncode == 2
    (chess.parent / "a.txt").write_text("the cat sat on the mat. " * 100)
    done = launch("fineweb.py", "--source", "a.txt", "--tokenizer", "ids:1500", "--out", "text")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "fineweb.py needs text" in done.stderr
