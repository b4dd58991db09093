"""generate.py, launched for real on a tiny checkpoint: python -m pytest tests/test_generate.py"""

import pytest
from helpers import tiny_checkpoint

import generate
from lib.cli import BadInput
from lib.decoding import SampleConfig, sample


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """(path, model) of an untrained model."""
    path = tmp_path / "ckpt_00001.pt"
    return path, tiny_checkpoint(path, tokenizer, mlp="swiglu", pos="rope", norm="rmsnorm", bias=False)


def test_it_prints_what_sample_returns(launch, checkpoint, tokenizer):
    path, model = checkpoint
    settings = dict(prompt="the cat", samples=3, max_new_tokens=40, temperature=0.8, top_k=20, seed=7)
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    result = launch("generate.py", "--checkpoint", path, *flags, "--device", "cpu")
    assert (result.returncode, result.stderr) == (0, "")
    texts = sample(model, tokenizer, SampleConfig(**settings))  # the prompt and 40 tokens: beyond block_size
    assert result.stdout == "".join(f"{text}\n---\n" for text in texts)
    assert len(set(texts)) == 3 and all(text.startswith("the cat") for text in texts)


def test_defaults_temperature_0_and_an_empty_prompt(checkpoint, capsys):
    path, _ = checkpoint
    generate.main(["--checkpoint", str(path)])
    assert capsys.readouterr().out.count("Hello, I'm a language model,") == SampleConfig().samples
    generate.main(["--checkpoint", str(path), "--prompt", "", "--temperature", "0", "--samples", "2"])
    one, two, end = capsys.readouterr().out.split("\n---\n")
    assert one == two and end == ""


@pytest.mark.parametrize("flags, says", [([], "name a --checkpoint"), (["--checkpoint", "."], "cannot read . (a folder)"),
                                         (["--checkpoint", "ckpt_00001.pt", "--temperature", "101"], "--temperature must be")])
def test_bad_flags(flags, says, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as error:
        generate.main(flags)
    assert says in str(error.value)


def test_bad_input_of_a_real_process_is_one_line(launch):
    result = launch("generate.py", "--checkpoint", "nowhere.pt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("generate.py: error: ") and "nowhere.pt" in result.stderr and result.stderr.count("\n") == 1
