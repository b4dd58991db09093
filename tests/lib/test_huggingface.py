"""GPT-2's weights from Hugging Face, against transformers. Run: python -m pytest tests/lib/test_huggingface.py"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib.cli import BadInput
from train_gpt2 import GPT

load = GPT.from_pretrained


def test_gpt2_parity_with_transformers(tmp_path):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=24, n_embd=48, n_layer=3, n_head=4)).eval()
    for p in theirs.parameters():  # biases and norms start at 0 and 1, which would hide a mistake
        p.data.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path).eval()
    idx = torch.randint(97, (3, 24))
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4
        loss = ours(idx[:, :-1], idx[:, 1:]) / (3 * 23)
        torch.testing.assert_close(loss, theirs(idx, labels=idx).loss, rtol=1e-5, atol=0)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


def test_what_is_not_a_gpt2_is_refused(tmp_path):
    with pytest.raises(BadInput, match="nowhere"):
        load(tmp_path / "nowhere")
    LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=2)).save_pretrained(tmp_path / "llama")
    with pytest.raises(BadInput, match="llama"):
        load(tmp_path / "llama")


@pytest.mark.parametrize("change", [dict(activation_function="relu"), dict(layer_norm_epsilon=1e-3), dict(n_inner=60),
                                    dict(tie_word_embeddings=False), dict(scale_attn_by_inverse_layer_idx=True)], ids=str)
def test_variants_it_would_compute_wrongly_are_refused(change, tmp_path):
    config = GPT2Config(vocab_size=97, n_positions=24, n_embd=16, n_layer=1, n_head=2, **change)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=next(iter(change))):
        load(tmp_path)
