"""lib/rope.py against transformers' rotary embeddings: python -m pytest tests/lib/test_rope.py"""

import pytest
import torch
from helpers import tiny

from lib.cli import BadInput
from lib.decoding import SampleConfig, sample
from lib.rope import ContextConfig, extend, frequencies
from train_gpt2 import GPT


@pytest.mark.parametrize("scaling, theirs", [("plain", {"rope_type": "default"}),
                                             ("ntk", {"rope_type": "dynamic", "factor": 1.0}),
                                             ("yarn", {"rope_type": "yarn"})])
@pytest.mark.parametrize("head_dim, trained, factor", [(64, 1024, 4.0), (128, 2048, 2.0),
                                                       (16, 256, 8.0), (64, 64, 1.5)])
def test_frequencies_are_those_of_transformers(scaling, theirs, head_dim, trained, factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": 10_000.0, "factor": factor, "original_max_position_embeddings": trained}
    rope |= theirs
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2,
                         max_position_embeddings=trained, rope_parameters=rope)
    if theirs["rope_type"] == "default":
        want = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        scale = 1.0
    else:
        init = ROPE_INIT_FUNCTIONS[theirs["rope_type"]]
        want, scale = init(config, "cpu", seq_len=int(trained * factor))
    have, have_scale = frequencies(head_dim, scaling, factor, trained)
    torch.testing.assert_close(have, want, rtol=1e-5, atol=0)
    assert have_scale == pytest.approx(scale)


def test_yarn_matches_transformers_in_a_longer_context():
    from lib.huggingface import convert

    torch.manual_seed(0)
    model = GPT(tiny(pos="rope", norm="rmsnorm", mlp="swiglu", init="xavier")).eval()
    idx = torch.randint(61, (2, 64))
    rope = {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
        "original_max_position_embeddings": 16
    }
    theirs = convert(model)
    settings = theirs.config.to_dict()
    settings |= {"rope_parameters": rope, "max_position_embeddings": 64}
    config = type(theirs.config)(**settings)
    stretched = type(theirs)(config).eval()
    stretched.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        plain = model(idx[:, :16])
        extend(model, ContextConfig(64, "yarn"))
        torch.testing.assert_close(model(idx), stretched(idx).logits, rtol=0, atol=1e-4)
        assert not torch.allclose(model(idx[:, :16]), plain, atol=1e-4)


@pytest.mark.parametrize("scaling", ["plain", "ntk", "yarn"])
def test_generation_in_a_longer_context(scaling, tokenizer):
    torch.manual_seed(0)
    long = GPT(tiny(pos="rope", vocab_size=tokenizer.vocab_size, block_size=64)).eval()
    model = GPT(tiny(pos="rope", vocab_size=tokenizer.vocab_size)).eval()
    model.load_state_dict(long.state_dict())
    extend(model, ContextConfig(64, scaling))
    assert model.config.block_size == 64
    layers = [module for module in model.modules() if hasattr(module, "cos")]
    assert len({layer.cos.data_ptr() for layer in layers}) == 1  # one table for all
    settings = SampleConfig(max_new_tokens=50)
    extended = sample(model, tokenizer, ["the cat"], settings)
    trained = sample(long, tokenizer, ["the cat"], settings)
    assert (extended == trained) == (scaling == "plain")


def test_learned_positions_cannot_be_extended():
    model = GPT(tiny()).eval()
    idx = torch.randint(61, (1, 8))
    with pytest.raises(BadInput, match="--context 17"):
        extend(model, ContextConfig(17))
    for context in (None, 16):
        with pytest.raises(BadInput, match="--rope_scaling yarn"):
            extend(model, ContextConfig(context, "yarn"))
    want = model(idx)
    extend(model, ContextConfig(8))  # a shorter context
    assert torch.equal(model(idx), want)
    assert model.config.block_size == 8
