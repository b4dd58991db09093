"""export_hf.py, launched for real on a tiny checkpoint: python -m pytest tests/test_export_hf.py"""

import pytest
import torch
from helpers import tiny_checkpoint

import export_hf
from lib.cli import BadInput
from train_gpt2 import GPT

MODERN = dict(mlp="swiglu", norm="rmsnorm", pos="rope", emb_norm=True, bias=False)


def test_a_checkpoint_is_exported_checked_and_read_back(launch, tokenizer, tmp_path):
    model = tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, **MODERN)
    result = launch("export_hf.py", "--checkpoint", "ckpt_00001.pt", "--out", "a/b", "--check")
    assert result.returncode == 0 and "LlamaForCausalLM" in result.stdout and "200 of 200 texts" in result.stdout, result.stderr
    idx = torch.randint(tokenizer.vocab_size, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(tmp_path / "a" / "b").eval()(idx), model(idx), rtol=0, atol=1e-4)


def test_a_folder_that_differs_is_found(tokenizer, tmp_path, monkeypatch, capsys):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, **MODERN)
    flags = ["--checkpoint", str(tmp_path / "ckpt_00001.pt"), "--out"]
    export_hf.main([*flags, str(tmp_path / "half"), "--dtype", "bfloat16", "--check"])
    assert "checked: " in capsys.readouterr().out
    tiny_checkpoint(tmp_path / "ckpt_00002.pt", tokenizer, **MODERN | dict(n_layer=3))
    (config,), _ = export_hf.parse((export_hf.Config,), [*flags, str(tmp_path / "half")])
    model, _, _ = export_hf.load_checkpoint(tmp_path / "ckpt_00002.pt")
    with pytest.raises(BadInput, match="is not what the checkpoint is"):
        export_hf.check(model, tokenizer, config)


def test_bad_input(tokenizer, tmp_path, launch):
    path, full = tmp_path / "ckpt_00001.pt", tmp_path / "full"
    tiny_checkpoint(path, tokenizer, softcap=15.0)
    tiny_checkpoint(tmp_path / "fits.pt", tokenizer)
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for flags, says in (([], "name --checkpoint"), (["--checkpoint", path], "name --out"), (["--checkpoint", path, "--out", tmp_path / "new"], "--softcap 15.0"),
                        (["--checkpoint", tmp_path / "fits.pt", "--out", full], "not an empty folder"),
                        (["--checkpoint", tmp_path / "fits.pt", "--out", full / "mine.txt" / "x"], "cannot write")):
        with pytest.raises(BadInput, match=says):
            export_hf.main(list(map(str, flags)))
    result = launch("export_hf.py", "--checkpoint", path, "--out", "new")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "cannot be exported" in result.stderr and not (tmp_path / "new").exists()
