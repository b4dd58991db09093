"""lib/decoding.py against whole forward passes: python -m pytest tests/lib/test_decoding.py"""

import math

import pytest
import torch
from helpers import tiny

from lib import decoding
from lib.cli import BadInput, check
from lib.decoding import NonFinite, SampleConfig, draw, sample
from train_gpt2 import GPT


@pytest.mark.parametrize("toggles", [
    dict(), dict(pos="rope", n_head=4), dict(pos="rope", norm="rmsnorm", mlp="swiglu", emb_norm=True, qk_norm=True, bias=False),
    dict(norm="rmsnorm", qk_norm=True, value_residual=True, residual_scalars=True, softcap=3.0)])
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
    # one position per token, but for the prompt, and for a window that moves
    assert widths == [min(prompt, 16), *(16 if n > 16 else 1 for n in range(prompt + 1, prompt + 20))]
    for i, logits in enumerate(seen):
        torch.testing.assert_close(logits, model(out[:, :prompt + i][:, -16:])[:, -1])


def test_generation_ends_when_it_is_done():
    model, calls = GPT(tiny()).eval(), []
    out = decoding.generate(model, torch.zeros(2, 3, dtype=torch.long), 20, lambda logits: torch.full((2, 1), len(calls)),
                            lambda idx: calls.append(idx.clone()) or len(calls) == 4)
    assert out.tolist() == [[0, 0, 0, 0, 1, 2, 3]] * 2 and [c.size(1) for c in calls] == [4, 5, 6, 7]


def test_draws_follow_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(4000, -1)
    for temperature in (1.0, 0.5):
        drawn = draw(logits, temperature, torch.Generator().manual_seed(0)).flatten()
        want = (logits[0] / temperature).softmax(dim=-1)
        assert (drawn.bincount(minlength=4) / 4000 - want).abs().max() < 4 * math.sqrt(0.25 / 4000)
    for temperature in (0, 1e-50, 1e-45, 1e-9):
        assert (draw(logits, temperature) == 3).all()


def test_samples_end_at_the_end_of_text_and_leave_random_state_alone(tokenizer):
    torch.manual_seed(3)
    model = GPT(tiny(vocab_size=tokenizer.vocab_size, vocab_multiple=128)).train()
    model.lm_head.weight.data[tokenizer.eot] += 0.05  # likelier than others
    before = torch.random.get_rng_state()
    texts = sample(model, tokenizer, SampleConfig(prompt="the cat", samples=8, max_new_tokens=200))
    assert torch.equal(before, torch.random.get_rng_state()) and model.training
    assert texts == sample(model, tokenizer, SampleConfig(prompt="the cat", samples=8, max_new_tokens=200))
    assert all(text.startswith("the cat") and "<|endoftext|>" not in text for text in texts) and len(set(texts)) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_diverged_is_said_in_one_line(value, tokenizer):
    model = GPT(tiny(vocab_size=tokenizer.vocab_size)).train()
    model.transformer.h[0].mlp.c_fc.weight.data[3, 3] = value
    for settings in (SampleConfig(), SampleConfig(temperature=0.0)):
        with pytest.raises(NonFinite, match="NaN or infinite: .* name an earlier checkpoint"):
            sample(model, tokenizer, settings)
    assert model.training


@pytest.mark.parametrize("setting", [dict(samples=10**9), dict(max_new_tokens=10**308), dict(temperature=math.nan),
                                     dict(seed=2**63)])
def test_absurd_settings_are_out_of_bounds(setting):
    with pytest.raises(BadInput, match=f"--{next(iter(setting))} must be"):
        check(SampleConfig(**setting))
