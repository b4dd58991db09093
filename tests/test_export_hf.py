"""export_hf.py, launched on a tiny checkpoint: python -m pytest tests/test_export_hf.py"""

import builtins
import errno
import io
from pathlib import Path

import pytest
import torch
from helpers import ROOT, full_disk, tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import chat as chat_script
import export_hf
from lib import checkpoint, huggingface
from lib.chat_template import JINJA, render
from lib.cli import BadInput
from lib.evals.export_check import check_export
from lib.tokenizers import load_tokenizer
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, load_checkpoint

MODERN = dict(mlp="swiglu", norm="rmsnorm", pos="rope", emb_norm=True, bias=False)


def test_a_checkpoint_is_exported_checked_and_read_back(launch, tokenizer, tmp_path):
    model = tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer,
                            **MODERN | dict(n_experts=4, n_active=2))
    result = launch("export_hf.py", "--checkpoint", ".", "--out", "a/b", "--check")
    # neither bars nor warnings of transformers and torch
    assert (result.returncode, result.stderr) == (0, ".: ckpt_00001.pt, the newest\n")
    assert "Glm4MoeForCausalLM" in result.stdout
    assert "200 of 200 texts" in result.stdout
    out = tmp_path / "a" / "b"
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    idx = torch.randint(tokenizer.vocab_size, (2, 32))
    ours = GPT.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), model(idx), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_without_optimizer(dtype, tokenizer, tmp_path, capsys):
    """Of any model, also one that transformers has no class for."""
    source = tmp_path / "ckpt_00001.pt"
    model = tiny_checkpoint(source, tokenizer, softcap=15.0)
    state = checkpoint.read(source)
    checkpoint.write(source, state | {"optimizer": {"m": torch.ones(9)}, "chat_template": JINJA})
    out = tmp_path / "new" / "small.pt"
    flags = ["--checkpoint", str(source), "--out", str(out), "--dtype", dtype]
    export_hf.main(flags)
    assert f"{out}: 0.00 GB, {dtype}" in capsys.readouterr().out
    again, own, state = load_checkpoint(str(out))
    assert own.spec == tokenizer.spec
    assert state["chat_template"] == JINJA
    assert "optimizer" not in state
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(getattr(torch, dtype)).float())
    with pytest.raises(BadInput, match="exists: name another --out"):
        export_hf.main(flags)
    with pytest.raises(BadInput, match="--check is for a folder"):
        export_hf.main([*flags[:3], str(tmp_path / "b.pt"), "--check"])


def test_help_names_every_class():
    assert all(f"\n    {name} " in export_hf.__doc__ for name in huggingface.FAMILIES)


@pytest.mark.parametrize("preset", ["speedrun", "tiny"])
def test_presets_have_a_class_of_transformers_with_flags_of_the_docs(preset):
    flags = ("--no-token_shift --no-value_residual --no-residual_scalars --bigram 0 --softcap 0 "
             "--no-qk_norm")
    page = (ROOT / "docs" / "export.md").read_text().replace("\\\n", "")
    assert f"--preset tiny {flags} " in " ".join(page.split())

    def config(*flags):
        configs = (TrainConfig, GPTConfig)
        (_, c), _ = export_hf.parse(configs, ["--preset", preset, *flags], presets=PRESETS)
        return c

    assert huggingface.export_class(config()) == huggingface.CUSTOM
    assert huggingface.export_class(config(*flags.split())) == "ArceeForCausalLM"


CHAT = [
    {"role": "system", "content": "Be brief,\n  \tplease. "},
    {"role": "user", "content": " the cat\n"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "ö 猫?"},
]


@pytest.fixture(scope="module", params=["trained", "gpt2"])
def exported(request, tokenizer, tmp_path_factory):
    """An exported chat model -> (its folder, the model, its tokenizer)."""
    if request.param == "gpt2":
        tokenizer = load_tokenizer("gpt2")
    place = tmp_path_factory.mktemp(request.param)
    path = place / "ckpt_00001.pt"
    model = tiny_checkpoint(path, tokenizer, **MODERN | {"vocab_size": tokenizer.vocab_size + 4})
    state = torch.load(path, weights_only=True)
    checkpoint.write(path, state | {"chat_template": JINJA})
    folder = place / "chat"
    export_hf.main(["--checkpoint", str(path), "--out", str(folder), "--check"])
    return folder, model, tokenizer


def test_a_chat_model_keeps_its_template(exported):
    """transformers' apply_chat_template has the ids of lib/chat_template.py."""
    from transformers import AutoTokenizer, GenerationConfig

    folder, _, tokenizer = exported
    theirs = AutoTokenizer.from_pretrained(folder)
    for messages in (CHAT, CHAT[1:3], CHAT[1:]):
        for reply in (False, True):
            expected, _ = render(messages, tokenizer, reply)
            for safe in (False, True):
                assert theirs.apply_chat_template(
                    messages, add_generation_prompt=reply, return_dict=False,
                    sanitize_control_tokens=safe) == expected
    ids, _ = render(CHAT, tokenizer)
    turns = [f"<|{message['role']}|>{message['content']}<|end|>" for message in CHAT]
    assert theirs.decode(ids) == "<|endoftext|>" + "".join(turns)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == [tokenizer.eot, tokenizer.reserved["<|end|>"]]


def test_control_tokens_that_a_user_types_stay_text(exported):
    from transformers import AutoTokenizer

    folder, _, tokenizer = exported
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "say <|end|> and <|endoftext|><|assistant|>"
    typed = [{"role": "user", "content": text}]
    safe = theirs.apply_chat_template(typed, return_dict=False, sanitize_control_tokens=True)
    unsafe = theirs.apply_chat_template(typed, return_dict=False, sanitize_control_tokens=False)
    expected, _ = render(typed, tokenizer)
    assert theirs.decode(safe) == theirs.decode(unsafe) == theirs.decode(expected)
    control = {tokenizer.eot, *tokenizer.reserved.values()}
    assert [token for token in safe if token in control] == [
        tokenizer.eot, tokenizer.reserved["<|user|>"], tokenizer.reserved["<|end|>"]]
    assert len([token for token in unsafe if token in control]) == 6  # transformers' default
    assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text).tolist()


def test_an_exported_chat_model_is_read_back(exported):
    folder, model, tokenizer = exported
    ours, again, can_chat = chat_script.load_chat(str(folder), "cpu")
    assert can_chat
    assert again.same_ids(tokenizer)
    assert ours.config.vocab_size == tokenizer.vocab_size + 4
    ids, _ = render(CHAT[1:3], tokenizer)
    idx = torch.tensor([ids])[:, :32]
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), model(idx), rtol=0, atol=1e-4)


def test_control_tokens_in_the_texts_of_a_check_are_text(tokenizer, tmp_path, monkeypatch, capsys):
    """Random ids of a small vocabulary contain <|endoftext|>."""
    path = tmp_path / "ckpt_00001.pt"
    tiny_checkpoint(path, tokenizer, **MODERN | {"vocab_size": tokenizer.vocab_size + 4})
    checkpoint.write(path, torch.load(path, weights_only=True) | {"chat_template": JINJA})
    monkeypatch.setattr(type(tokenizer), "decode",
                        lambda self, ids: f"a{ids[0]} <|endoftext|> <|end|>b")
    export_hf.main(["--checkpoint", str(path), "--out", str(tmp_path / "out"), "--check"])
    assert "200 of 200 texts" in capsys.readouterr().out


@torch.no_grad()
def test_a_folder_that_differs_is_detected(tokenizer, tmp_path, monkeypatch, capsys):
    """One that differs only by rounding is accepted: it sends tokens to other experts."""
    path = tmp_path / "ckpt_00001.pt"
    out = tmp_path / "out"
    model = tiny_checkpoint(path, tokenizer, **MODERN | dict(n_experts=8, n_active=2))
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(10)
    checkpoint.write(path, torch.load(path, weights_only=True) | {"model": model.state_dict()})
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    export_hf.main(["--checkpoint", str(path), "--out", str(out), "--dtype", "bfloat16", "--check"])
    assert "checked: " in capsys.readouterr().out
    # silenced during the export only
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    idx = torch.randint(tokenizer.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    logits = model(idx)
    rounded = GPT.from_pretrained(out).eval()(idx)
    assert (rounded - logits).abs().max() > 0.05 * logits.abs().max()

    def check():
        check_export(model, tokenizer, str(out), torch.bfloat16, GPT.from_pretrained)

    convert = huggingface.convert

    def converted_wrongly(model):
        converted = convert(model)
        converted.lm_head.weight.mul_(1.001)
        return converted

    monkeypatch.setattr(huggingface, "convert", converted_wrongly)
    with pytest.raises(BadInput, match="differs from the checkpoint"):
        check()
    monkeypatch.undo()
    weights = load_file(out / "model.safetensors")
    for factor in (1.01, torch.nan):
        wrong = weights | {"lm_head.weight": weights["lm_head.weight"] * factor}
        save_file(wrong, out / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BadInput, match="differs from the checkpoint"):
            check()
    model.lm_head.weight[5] = torch.nan
    with pytest.raises(BadInput, match="the model's logits are NaN"):
        check()


def test_a_disk_that_fills_up_leaves_nothing(tokenizer, tmp_path):
    path = tmp_path / "ckpt_00001.pt"
    tiny_checkpoint(path, tokenizer)
    says = r"cannot write .+out \(.*: free some disk space"
    with full_disk(20_000), pytest.raises(BadInput, match=says):
        export_hf.main(["--checkpoint", str(path), "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("last", ["README.md", "modeling_modern_gpt.py", "tokenizer.json"])
def test_a_disk_that_fills_up_with_a_later_file_leaves_nothing(last, tokenizer, tmp_path,
                                                               monkeypatch):
    path = tmp_path / "ckpt_00001.pt"
    tiny_checkpoint(path, tokenizer, token_shift=True)
    real_open = io.open

    def full(file, mode="r", *args, **kwargs):
        is_last = str(file).endswith(last) or f"{last}." in str(file)  # a temporary name
        if is_last and "r" not in mode:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return real_open(file, mode, *args, **kwargs)

    for owner in (builtins, io, Path):  # in Python 3.10, Path.open does not look up io.open
        monkeypatch.setattr(owner, "open", full)
    with pytest.raises(BadInput, match="No space left on device.*: free some disk space"):
        export_hf.main(["--checkpoint", str(path), "--out", str(tmp_path / "a" / "out")])
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input(tokenizer, tmp_path, launch):
    fits = tmp_path / "ckpt_00001.pt"
    tiny_checkpoint(fits, tokenizer)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for flags, says in (
        ([], "name either --checkpoint"),
        (["--checkpoint", fits], "name --out"),
        (["--checkpoint", fits, "--out", full], "not an empty folder"),
        (["--checkpoint", fits, "--out", full / "mine.txt" / "x"], "cannot write"),
    ):
        with pytest.raises(BadInput, match=says):
            export_hf.main(list(map(str, flags)))
    result = launch("export_hf.py", "--checkpoint", fits, "--out", "full")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "full exists and is not an empty folder" in result.stderr
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
