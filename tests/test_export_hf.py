"""export_hf.py, launched for real on a tiny checkpoint: python -m pytest tests/test_export_hf.py"""

import resource

import pytest
import torch
from helpers import ROOT, tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import chat as chat_script
import export_hf
from lib import checkpoint, huggingface
from lib.chat_template import JINJA, render
from lib.cli import BadInput
from lib.tokenizers import load_tokenizer
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig

MODERN = dict(mlp="swiglu", norm="rmsnorm", pos="rope", emb_norm=True, bias=False)


def test_a_checkpoint_is_exported_checked_and_read_back(launch, tokenizer, tmp_path):
    model = tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer,
                            **MODERN | dict(n_experts=4, n_active=2))
    result = launch("export_hf.py", "--checkpoint", ".", "--out", "a/b", "--check")
    # neither bars nor warnings of transformers and torch
    assert (result.returncode, result.stderr) == (0, ".: ckpt_00001.pt, the newest\n")
    assert "Glm4MoeForCausalLM" in result.stdout and "200 of 200 texts" in result.stdout
    assert len({path.stat().st_mode for path in (tmp_path / "a" / "b").iterdir()}) == 1
    idx = torch.randint(tokenizer.vocab_size, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(
            GPT.from_pretrained(tmp_path / "a" / "b").eval()(idx), model(idx), rtol=0, atol=1e-4)


def test_help_names_every_class():
    assert all(f"\n    {name} " in export_hf.__doc__ for name in huggingface.FAMILIES)


@pytest.mark.parametrize("preset", ["speedrun", "tiny"])
def test_what_the_docs_say_of_presets(preset):
    """As they are, they cannot be exported; with these flags they can."""
    flags = "--no-token_shift --no-value_residual --no-residual_scalars --softcap 0 --no-qk_norm"
    page = " ".join((ROOT / "docs" / "export.md").read_text().split())
    assert f"`{flags}` they are `ArceeForCausalLM`" in page
    (_, refused), (_, fits) = (export_hf.parse((TrainConfig, GPTConfig),
                                               ["--preset", preset, *more], presets=PRESETS)[0]
                               for more in ([], flags.split()))
    with pytest.raises(BadInput, match="cannot be exported"):
        huggingface.find_family(refused)
    assert huggingface.find_family(fits) == "ArceeForCausalLM"


@pytest.mark.parametrize("named", ["trained", "gpt2"])
def test_a_chat_model_keeps_its_template_and_its_ids(named, launch, tokenizer, tmp_path):
    """transformers' apply_chat_template gives the ids of lib/chat_template.py,
    and what was typed stays text where it is told to."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = tokenizer if named == "trained" else load_tokenizer(named)
    model = tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer,
                            **MODERN | {"vocab_size": tokenizer.vocab_size + 4})
    state = torch.load(tmp_path / "ckpt_00001.pt", weights_only=True)
    checkpoint.write(tmp_path / "ckpt_00001.pt", state | {"chat_template": JINJA})
    result = launch("export_hf.py", "--checkpoint", "ckpt_00001.pt", "--out", "chat", "--check")
    assert result.returncode == 0 and "200 of 200 texts" in result.stdout, result.stderr
    theirs = AutoTokenizer.from_pretrained(tmp_path / "chat")
    chat = [{"role": "system",
             "content": "Be brief,\n  \tplease. "}, {"role": "user", "content": " the cat\n"},
            {"role": "assistant", "content": "sat"}, {"role": "user", "content": "ö 猫?"}]
    typed = [{"role": "user", "content": "say <|end|> and <|endoftext|><|assistant|>"}]
    for messages in (chat, chat[1:3], chat[1:]):
        for reply in (False, True):
            want = render(messages, tokenizer, reply)[0]
            for safe in (False, True):
                assert theirs.apply_chat_template(messages, add_generation_prompt=reply,
                                                  return_dict=False,
                                                  sanitize_control_tokens=safe) == want
    text, own = typed[0]["content"], set(tokenizer.reserved.values()) | {tokenizer.eot}
    safe, unsafe = (theirs.apply_chat_template(typed, return_dict=False,
                                               sanitize_control_tokens=yes)
                    for yes in (True, False))
    assert theirs.decode(safe) == theirs.decode(unsafe) == theirs.decode(
        render(typed, tokenizer)[0])
    assert [token for token in safe if token in own] == [
        tokenizer.eot, tokenizer.reserved["<|user|>"], tokenizer.reserved["<|end|>"]]
    assert len([token for token in unsafe if token in own]) == 6  # transformers' own default
    assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text).tolist()
    assert theirs.decode(render(chat, tokenizer)[0]) == "<|endoftext|>" + "".join(
        f"<|{m['role']}|>{m['content']}<|end|>" for m in chat)
    assert GenerationConfig.from_pretrained(
        tmp_path / "chat").eos_token_id == [tokenizer.eot, tokenizer.reserved["<|end|>"]]
    ours, again, chats = chat_script.load_chat(str(tmp_path / "chat"), "cpu")
    assert chats and again.same_ids(tokenizer)
    idx = torch.tensor([render(chat[1:3], tokenizer)[0]])[:, :32]
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), model(idx), rtol=0, atol=1e-4)
    assert ours.config.vocab_size == tokenizer.vocab_size + 4


def test_control_tokens_in_the_texts_of_a_check_are_text(tokenizer, tmp_path, monkeypatch, capsys):
    """Ids of a small vocabulary, drawn at random, hold <|endoftext|>."""
    path = tmp_path / "ckpt_00001.pt"
    tiny_checkpoint(path, tokenizer, **MODERN | {"vocab_size": tokenizer.vocab_size + 4})
    checkpoint.write(path, torch.load(path, weights_only=True) | {"chat_template": JINJA})
    monkeypatch.setattr(type(tokenizer), "decode",
                        lambda self, ids: f"a{ids[0]} <|endoftext|> <|end|>b")
    export_hf.main(["--checkpoint", str(path), "--out", str(tmp_path / "out"), "--check"])
    assert "200 of 200 texts" in capsys.readouterr().out


@torch.no_grad()
def test_a_folder_that_differs_is_found(tokenizer, tmp_path, monkeypatch, capsys):
    """And one that rounding alone makes differ is not: it sends tokens to other experts."""
    path, out = tmp_path / "ckpt_00001.pt", tmp_path / "out"
    model = tiny_checkpoint(path, tokenizer, **MODERN | dict(n_experts=8, n_active=2))
    for p in model.parameters():
        p.mul_(10 if p.dim() > 1 else 1)
    checkpoint.write(path, torch.load(path, weights_only=True) | {"model": model.state_dict()})
    flags = ["--checkpoint", str(path), "--out", str(out), "--dtype", "bfloat16"]
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    export_hf.main([*flags, "--check"])
    idx = torch.randint(tokenizer.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    assert "checked: " in capsys.readouterr().out
    assert (GPT.from_pretrained(out).eval()(idx)
            - model(idx)).abs().max() > 0.05 * model(idx).abs().max()
    assert (logging.get_verbosity(),
            logging.is_progress_bar_enabled()) == before  # silent during an export alone
    convert, weights = huggingface.convert, load_file(out / "model.safetensors")

    def converted_wrongly(model):
        made = convert(model)
        made.lm_head.weight.mul_(1.001)
        return made

    monkeypatch.setattr(huggingface, "convert", converted_wrongly)
    with pytest.raises(BadInput, match="differs from the checkpoint"):
        export_hf.check(model, tokenizer, str(out), "bfloat16")
    monkeypatch.undo()
    for factor in (1.01, torch.nan):
        save_file(weights | {"lm_head.weight": weights["lm_head.weight"] * factor},
                  out / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BadInput, match="differs from the checkpoint"):
            export_hf.check(model, tokenizer, str(out), "bfloat16")
    model.lm_head.weight[5] = torch.nan
    with pytest.raises(BadInput, match="the model's logits are NaN"):
        export_hf.check(model, tokenizer, str(out), "bfloat16")


def test_a_disk_that_fills_up_leaves_nothing(tokenizer, tmp_path):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(BadInput, match=r"cannot write \S+out \(.*: free some disk space"):
            export_hf.main(
                ["--checkpoint",
                 str(tmp_path / "ckpt_00001.pt"), "--out",
                 str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_00001.pt"]


def test_bad_input(tokenizer, tmp_path, launch):
    path, full = tmp_path / "ckpt_00001.pt", tmp_path / "full"
    tiny_checkpoint(path, tokenizer, softcap=15.0)
    tiny_checkpoint(tmp_path / "fits.pt", tokenizer)
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for flags, says in (([], "name either --checkpoint"), (["--checkpoint", path], "name --out"),
                        (["--checkpoint", path, "--out", tmp_path / "new"],
                         "--softcap 15.0"), (["--checkpoint", tmp_path / "fits.pt", "--out",
                                              full], "not an empty folder"),
                        (["--checkpoint", tmp_path / "fits.pt", "--out",
                          full / "mine.txt" / "x"], "cannot write")):
        with pytest.raises(BadInput, match=says):
            export_hf.main(list(map(str, flags)))
    result = launch("export_hf.py", "--checkpoint", path, "--out", "new")
    assert result.returncode == 2 and result.stderr.count(
        "\n") == 1 and "cannot be exported" in result.stderr
    assert not (tmp_path / "new").exists()
