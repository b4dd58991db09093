"""generate.py, launched for real on a tiny checkpoint: python -m pytest tests/test_generate.py"""

import pytest
import torch
from helpers import sentences, tiny, tiny_checkpoint

import generate
from lib import decoding
from lib.cli import BadInput
from lib.tokenizers import train_bpe
from train_gpt2 import GPT, SampleConfig, sample


@pytest.fixture
def checkpoint(tmp_path):
    """(path, model, tokenizer) of an untrained model."""
    tokenizer, path = train_bpe(sentences(200), 280), tmp_path / "ckpt_00001.pt"
    return path, tiny_checkpoint(path, tokenizer, mlp="swiglu", pos="rope", norm="rmsnorm", bias=False), tokenizer


def test_it_prints_what_sample_returns(launch, checkpoint):
    path, model, tokenizer = checkpoint
    settings = dict(prompt="the cat", samples=3, max_new_tokens=40, temperature=0.8, top_k=20, seed=7)
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    result = launch("generate.py", "--checkpoint", path, *flags, "--device", "cpu")
    assert (result.returncode, result.stderr) == (0, "")
    texts = sample(model, tokenizer, SampleConfig(**settings))  # the prompt and 40 tokens: beyond block_size
    assert result.stdout == "".join(f"{text}\n---\n" for text in texts)
    assert len(set(texts)) == 3 and all(text.startswith("the cat") for text in texts)


@pytest.mark.parametrize("toggles", [
    dict(), dict(pos="rope", n_head=4), dict(pos="rope", norm="rmsnorm", mlp="swiglu", emb_norm=True, qk_norm=True, bias=False),
    dict(norm="rmsnorm", qk_norm=True)])
@pytest.mark.parametrize("prompt", [1, 5, 16, 30])  # block_size is 16
def test_cached_logits_are_those_of_the_whole_text(toggles, prompt):
    torch.manual_seed(0)
    model, seen, widths = GPT(tiny(init="xavier", **toggles)).eval(), [], []
    model.transformer.wte.register_forward_hook(lambda module, args, out: widths.append(out.size(1)))

    def choose(logits):
        seen.append(logits)
        return logits.argmax(dim=-1, keepdim=True)

    idx = torch.randint(61, (3, prompt))
    out = decoding.generate(model, idx, 20, choose)
    assert out.shape == (3, prompt + 20) and torch.equal(out[:, :prompt], idx)
    # one position a token, but for the prompt, and for a window that moves
    assert widths == [min(prompt, 16), *(16 if n > 16 else 1 for n in range(prompt + 1, prompt + 20))]
    for i, logits in enumerate(seen):
        torch.testing.assert_close(logits, model(out[:, :prompt + i][:, -16:])[:, -1])


def test_generation_ends_when_it_is_done():
    model, calls = GPT(tiny()).eval(), []
    out = decoding.generate(model, torch.zeros(2, 3, dtype=torch.long), 20, lambda logits: torch.full((2, 1), len(calls)),
                            lambda idx: calls.append(idx.clone()) or len(calls) == 4)
    assert out.tolist() == [[0, 0, 0, 0, 1, 2, 3]] * 2 and [c.size(1) for c in calls] == [4, 5, 6, 7]


def test_defaults_temperature_0_and_an_empty_prompt(checkpoint, capsys):
    path, model, tokenizer = checkpoint
    generate.main(["--checkpoint", str(path)])
    assert capsys.readouterr().out.count("Hello, I'm a language model,") == SampleConfig().samples
    generate.main(["--checkpoint", str(path), "--prompt", "", "--temperature", "0", "--samples", "2"])
    likeliest = capsys.readouterr().out
    one, two, end = likeliest.split("\n---\n")
    assert one == two and end == ""
    generate.main(["--checkpoint", str(path), "--prompt", "", "--temperature", "1e-45", "--samples", "2"])
    assert capsys.readouterr().out == likeliest


@pytest.mark.parametrize("flags, says", [
    ([], "name a --checkpoint"),
    (["--checkpoint", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["--checkpoint", "ckpt_00001.pt", "--samples", "0"], "--samples must be at least 1"),
    (["--checkpoint", "ckpt_00001.pt", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
    (["--checkpoint", "ckpt_00001.pt", "--temperature", "-1"], "--temperature must be at least 0"),
    (["--checkpoint", "ckpt_00001.pt", "--temperature", "nan"], "--temperature must be at least 0"),
    (["--checkpoint", "ckpt_00001.pt", "--top_k", "-1"], "--top_k must be at least 0"),
    (["--checkpoint", "ckpt_00001.pt", "--seed", "1e30"], "--seed must be at least 0 and below 2^63"),
    (["--checkpoint", "ckpt_00001.pt", "--device", "mps"], "--device mps"),
    (["--checkpoint", "ckpt_00001.pt", "--temprature", "1"], "did you mean --temperature"),
    (["--checkpoint", "torn.pt"], "torn.pt is not a whole checkpoint"),
    (["--checkpoint", "."], "no checkpoint at ."),
    (["--checkpoint", "x" * 5000], ""),  # longer than any file system lets a name be
    (["--checkpoint", "others.pt"], "others.pt is not a checkpoint of this project"),
    (["--checkpoint", "list.pt"], "list.pt is not a whole checkpoint"),
    (["--checkpoint"], "--checkpoint: expected one argument"),
    (["--checkpoint", "ckpt_00001.pt", "--max_new_tokens", "nan"], "--max_new_tokens: invalid integer value"),
    (["--checkpoint", "ckpt_00001.pt", "--seed", "-1"], "--seed must be at least 0"),
], ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "")
def test_bad_flags(flags, says, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.pt").write_bytes(checkpoint[0].read_bytes()[:5000])
    torch.save(torch.nn.Linear(2, 2).state_dict(), "others.pt")
    torch.save([1, 2], "list.pt")
    with pytest.raises(BadInput) as error:
        generate.main(flags)
    assert says in str(error.value)


def test_bad_input_of_a_real_process_is_one_line(launch):
    result = launch("generate.py", "--checkpoint", "nowhere.pt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("generate.py: error: no checkpoint at nowhere.pt") and result.stderr.count("\n") == 1
