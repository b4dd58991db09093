"""lib/model_card.py: python -m pytest tests/lib/test_model_card.py"""

import json
import shlex

import pytest
import yaml
from helpers import tiny, tiny_checkpoint

import eval_harness
import export_hf
from lib import checkpoint
from lib.chat_template import JINJA
from lib.model_card import describe_data, in_llamacpp, in_transformers, model_card
from train_gpt2 import GPT, load_checkpoint

SPEEDRUN = dict(mlp="relu2", norm="rmsnorm", pos="rope", token_shift=True, softcap=15.0,
                bigram=37)


def code_of(card):
    """The Python blocks of a card."""
    return [block.partition("\n")[2] for block in card.split("```")[1::2]]


def rows_of(card):
    """{first cell: second cell} of all tables."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def test_a_card_says_what_a_run_was(whole):
    """Shape, text, tokens, loss, cost, evaluations."""
    folder = whole("gpt2")
    path = checkpoint.pick(str(folder))
    model, tokenizer, state = load_checkpoint(path)
    card = model_card(model, tokenizer, state, path, in_transformers(model.config, False),
                      [("arc_easy", "acc", "0.2500")])
    rows = rows_of(card)
    assert rows["class"] == "GPT2LMHeadModel"
    assert rows["parameters"].startswith(f"{sum(p.numel() for p in model.parameters()):,}")
    assert f"{model.config.n_layer} layers" in rows["shape"]
    step = state["step"]
    assert f"in {step:,} steps" in rows["tokens"]
    [loss] = [line.split()[2] for line in (folder / "log.txt").read_text().splitlines()
              if line.startswith(f"{step} val ")]
    assert rows["validation loss"] == f"{float(loss):.4f} nats per token"
    assert "minutes" in rows["cost"]
    assert "| arc_easy | acc | 0.2500 |" in card
    assert f"# {folder.name}" in card


def test_the_metadata_is_yaml_and_the_code_compiles(tokenizer):
    for toggles in (SPEEDRUN, {}):
        config = tiny(vocab_size=tokenizer.vocab_size, **toggles)
        for state in ({}, {"chat_template": JINJA}):
            loading = in_transformers(config, bool(state))
            card = model_card(GPT(config), tokenizer, state, "gpt2", loading)
            metadata = yaml.safe_load(card.split("---")[1])
            assert metadata["library_name"] == "transformers"
            assert ("trust_remote_code=True" in card) == bool(toggles)
            assert ("apply_chat_template" in card) == bool(state)
            assert ("SFTTrainer" in card) == bool(toggles)
            assert ("table of bigrams" in card) == bool(toggles)
            for code in code_of(card):
                compile(code, "card", "exec")
            assert "train_gpt2.py" not in card  # what was not trained here does not claim so


def test_the_card_of_a_gguf_file(tokenizer):
    loading = in_llamacpp("qwen3", "chat", True)
    card = model_card(GPT(tiny()), tokenizer, {"chat_template": JINJA}, "gpt2", loading)
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["gguf"]
    assert rows_of(card)["architecture in llama.cpp"] == "qwen3"
    assert "llama-cli -m chat.gguf --jinja" in card
    assert "transformers" not in card


def test_the_code_of_a_card_runs(tokenizer, tmp_path, capsys):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, **SPEEDRUN | dict(block_size=128))
    export_hf.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")])
    out = shlex.quote(str(tmp_path / "out"))
    assert capsys.readouterr().out.endswith(f"upload it: hf upload out {out}\n")
    card = (tmp_path / "out" / "README.md").read_text()
    first = code_of(card)[0]
    exec(first.replace("FOLDER", str(tmp_path / "out")), {})
    assert "Once upon a time" in capsys.readouterr().out


def test_evaluations_next_to_a_checkpoint_are_in_its_card(tokenizer, tmp_path):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer)
    metric = {"acc,none": 0.25, "acc_norm,none": 0.5, "alias": "piqa"}
    results = {"results": {"piqa": metric}, "n-samples": {}, "higher_is_better": {}}
    (tmp_path / "eval_00001_limit9.json").write_text(
        json.dumps(results | {"config": {"limit": 9}}))
    (tmp_path / "eval_00002.json").write_text("another step's")
    export_hf.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| piqa | acc_norm, first 9 items | 0.5000 |" in card
    assert eval_harness.is_results(results)
    (tmp_path / "eval_00001.json").write_text("[]")
    with pytest.raises(export_hf.BadInput, match="eval_00001.json"):
        export_hf.main(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "more")])
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("word, settings, says", [
    ("edu", {"source": "some/dataset"}, "edu, from some/dataset"),
    ("edu:2", {"source": ["x/a.parquet", "b.jsonl"]}, "edu (weight 2), from a.parquet, b.jsonl"),
    ("edu", None, "edu"),
    ("edu", "damaged", "edu"),
    ("chats.jsonl", None, "chats.jsonl"),
])
def test_the_text_of_a_run_is_named(word, settings, says, tmp_path):
    """By folder and source, without the path on the machine."""
    (tmp_path / "edu").mkdir()
    if settings:
        (tmp_path / "edu" / "meta.json").write_text(json.dumps({"settings": settings}))
    assert describe_data(str(tmp_path / word)) == says


