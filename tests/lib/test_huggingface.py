"""lib/huggingface.py against transformers: python -m pytest tests/lib/test_huggingface.py"""

import socket
import time

import pytest
import torch

from lib import huggingface
from lib.cli import BadInput
from train_gpt2 import GPT


def test_gpt2_parity_with_transformers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=24, n_embd=48, n_layer=3, n_head=4)).eval()
    for p in theirs.parameters():  # biases and norms start at 0 and 1, which would hide a mistake
        p.data.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(97, (3, 24))
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4
        torch.testing.assert_close(ours(idx[:, :-1], idx[:, 1:]) / idx[:, 1:].numel(), theirs(idx, labels=idx).loss, rtol=1e-5, atol=0)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


def test_other_architectures_and_no_model_are_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=2)).save_pretrained(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "llama", "empty"):
        with pytest.raises(BadInput, match=name):
            huggingface.read_gpt2(tmp_path / name)


@pytest.mark.parametrize("change", [dict(activation_function="relu"), dict(layer_norm_epsilon=1e-3), dict(n_inner=60),
                                    dict(tie_word_embeddings=False), dict(scale_attn_by_inverse_layer_idx=True),
                                    dict(add_cross_attention=True)], ids=str)
def test_variants_that_would_be_computed_wrongly_are_refused(change, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_positions=24, n_embd=16, n_layer=1, n_head=2, **change)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=next(iter(change))):
        huggingface.read_gpt2(tmp_path)


def test_a_hub_that_does_not_answer_leaves_the_cache(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection, then says nothing
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        huggingface.cache_only_without_network(seconds=0.2)
        assert constants.HF_HUB_OFFLINE and time.monotonic() - started < 60
