"""lib/huggingface.py against transformers: python -m pytest tests/lib/test_huggingface.py"""

import itertools
import json
import random
import socket

import pytest
import torch
from helpers import sentences, tiny

from lib import huggingface
from lib.cli import BadInput
from lib.moe import MoE
from lib.tokenizers import load_tokenizer, train_bpe
from train_gpt2 import GPT

TOGGLES = dict(norm=("layernorm", "rmsnorm"), pos=("learned", "rope"),
               mlp=("gelu", "relu2", "swiglu"),
               **dict.fromkeys(("qk_norm", "emb_norm", "bias", "tie_embeddings"), (False, True)))


def odd_model(**toggles):
    """Weights all over the place: biases and norms start at 0 and 1, which would hide a mistake."""
    torch.manual_seed(0)
    model = GPT(tiny(**toggles)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.2)
    for module in model.modules():
        if isinstance(module, MoE) and module.bias_rate:
            module.bias.normal_(std=0.2)
    return model


def test_gpt2_parity_with_transformers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=24, n_embd=48, n_layer=3, n_head=4)).eval()
    for p in theirs.parameters():  # biases and norms start at 0 and 1, which would hide a mistake
        p.data.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(97, (3, 24))
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4
        torch.testing.assert_close(
            ours(idx[:, :-1], idx[:, 1:]) / idx[:, 1:].numel(),
            theirs(idx, labels=idx).loss, rtol=1e-5, atol=0)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


@torch.no_grad()
def test_every_combination_is_exported_exactly_or_refused_by_its_flags():
    exported, idx = {}, torch.randint(61, (2, 16))
    for values in itertools.product(*TOGGLES.values()):
        toggles = dict(zip(TOGGLES, values))
        model = odd_model(**toggles)
        try:
            theirs = huggingface.convert(model)
        except BadInput as error:
            named = str(error).partition("lacks ")[2]
            assert any(f"--{flag}" in named or f"--no-{flag}" in named for flag in toggles), named
            continue
        want = model(idx)
        assert (theirs(idx).logits - want).abs().max() < 1e-4 and want.abs().max() > 0.5
        assert theirs.get_input_embeddings().weight.shape == (61, 32)  # the padding is cut
        exported[type(theirs).__name__] = exported.get(type(theirs).__name__, 0) + 1
    assert exported == {
        "GPT2LMHeadModel": 8, "LlamaForCausalLM": 8, "Qwen3ForCausalLM": 4, "ArceeForCausalLM": 16,
        "Starcoder2ForCausalLM": 16, "StableLmForCausalLM": 4
    }


MODERN = dict(norm="rmsnorm", pos="rope", mlp="swiglu", bias=False, emb_norm=True)
GLM, MIXTRAL = dict(n_experts=4, n_active=2), dict(n_experts=4, n_active=2, router="softmax",
                                                   balance="loss")


@torch.no_grad()
@pytest.mark.parametrize(
    "toggles, name",
    [(GLM, "Glm4Moe"), (GLM | dict(n_shared=2, qk_norm=True), "Glm4Moe"),
     (GLM | dict(n_experts=5, n_active=5, balance="loss", expert_width=24), "Glm4Moe"),
     (MIXTRAL, "Mixtral"),
     (MIXTRAL | dict(n_active=1, expert_width=24, router_z_loss=0.1), "Mixtral"),
     (MIXTRAL | dict(qk_norm=True), "Qwen3Moe")], ids=lambda value: value
    if isinstance(value, str) else " ".join(map(str, value.values())))
def test_mixtures_of_experts_are_exported_exactly_and_read_back(toggles, name, tokenizer, tmp_path):
    model, idx = odd_model(vocab_size=tokenizer.vocab_size,
                           **MODERN | toggles), torch.randint(61, (2, 16))
    huggingface.write(model, tokenizer, tmp_path / "fp32")
    huggingface.write(model, tokenizer, tmp_path / "bf16", torch.bfloat16)
    theirs, _ = huggingface.load(tmp_path / "fp32")
    want = model(idx)
    assert type(theirs).__name__ == f"{name}ForCausalLM" and want.abs().max() > 0.5
    torch.testing.assert_close(theirs(idx).logits, want, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        GPT.from_pretrained(tmp_path / "fp32").eval()(idx), want, rtol=0, atol=1e-4)
    rounded = GPT.from_pretrained(tmp_path / "bf16").eval()
    assert torch.equal(rounded.transformer.h[0].mlp.bias,
                       model.transformer.h[0].mlp.bias)  # what picks experts is not rounded


@torch.no_grad()
@pytest.mark.parametrize("toggles", [
    dict(),
    dict(mlp="relu2", bias=False, tie_embeddings=False),
    dict(pos="rope", mlp="relu2"),
    *(dict(pos="rope", norm="rmsnorm", bias=False, emb_norm=True) | more
      for more in (dict(mlp="swiglu"), dict(mlp="swiglu", qk_norm=True), dict(mlp="relu2"),
                   dict(norm="layernorm", mlp="swiglu")))
], ids=lambda toggles: " ".join(map(str, toggles.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_is_loaded_by_transformers_and_by_us(toggles, dtype, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model, idx = odd_model(vocab_size=tokenizer.vocab_size, **toggles), torch.randint(61, (2, 16))
    huggingface.write(model, tokenizer, tmp_path / "out", dtype)
    assert {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"
    } == {path.name for path in (tmp_path / "out").iterdir()} and len(list(tmp_path.iterdir())) == 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours, want = GPT.from_pretrained(tmp_path / "out").eval(), model(idx)
    assert (theirs(idx).logits - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.1
                                                      * want.abs().max())
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "out"
                       / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert (AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eot
            == GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id)


@torch.no_grad()
@pytest.mark.parametrize(
    "toggles",
    [dict(norm="rmsnorm", mlp="swiglu"),
     dict(norm="rmsnorm", mlp="relu2"),
     dict(mlp="gelu")], ids=str)
def test_an_untrained_model_whose_biases_are_0_is_read_back(toggles, tokenizer, tmp_path):
    model, idx = GPT(tiny(pos="rope", vocab_size=tokenizer.vocab_size,
                          **toggles)).eval(), torch.randint(61, (2, 16))
    huggingface.write(model, tokenizer, tmp_path / "out")
    ours = GPT.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(ours(idx), model(idx), rtol=0, atol=1e-4)
    assert ours.config.bias


@pytest.mark.parametrize(
    "toggles, says",
    [(dict(softcap=15.0), "--softcap 15.0"), (dict(token_shift=True), "--token_shift"),
     (dict(value_residual=True, residual_scalars=True), "--value_residual, --residual_scalars"),
     (dict(emb_norm=True), "GPT2LMHeadModel, lacks --emb_norm"),
     (dict(norm="rmsnorm"), "--norm rmsnorm"),
     (dict(norm="rmsnorm", pos="rope", mlp="relu2",
           qk_norm=True), "ArceeForCausalLM, lacks --qk_norm"),
     (dict(norm="rmsnorm", pos="rope", mlp="swiglu", qk_norm=True, bias=True), "--qk_norm"),
     (MODERN | GLM | dict(router="softmax"), "--router softmax"),
     (MODERN | GLM | dict(mlp="relu2"), "--n_experts 4"),
     (MODERN | MIXTRAL | dict(n_shared=1), "--router softmax")])
def test_what_no_class_computes_is_refused_naming_the_flags(toggles, says, tokenizer, tmp_path):
    with pytest.raises(BadInput, match="cannot be exported") as error:
        huggingface.write(odd_model(vocab_size=tokenizer.vocab_size, **toggles), tokenizer,
                          tmp_path / "out")
    assert says in str(error.value) and list(tmp_path.iterdir()) == []


def odd_strings(n):
    rng = random.Random(0)
    ranges = [(32, 126), (0, 31), (127, 0x24F), (0x300, 0x36F), (0x600, 0x6FF), (0x4E00, 0x4FFF),
              (0x1F600, 0x1F64F), (0x2000, 0x206F), (0xFFF0, 0xFFFD)]
    words = [
        "<|endoftext|>", "<|endoftext", "'s", "'LL", "\r\n", "  ", " " * 40, "\u3000", "don't",
        "3.14159", "e\u0301", "\ufeff", "\u200d", "--", "ﬁ", "ß"
    ]

    def piece():
        return rng.choice(words) if rng.random() < 0.3 else "".join(
            chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 4)))

    return ["", *("".join(piece() for _ in range(rng.randint(1, 30))) for _ in range(n - 1))]


@pytest.mark.parametrize("name", ["gpt2", "trained", "cl100k's splitting rule"])
def test_tokens_are_the_same_for_odd_strings(name, tmp_path):
    import tiktoken
    from transformers import AutoTokenizer

    from lib.tokenizers import Tokenizer

    texts = odd_strings(1000)
    tokenizer = load_tokenizer("gpt2") if name == "gpt2" else train_bpe(
        sentences(50) + texts[:300], 600)
    if name not in (
            "gpt2", "trained"
    ):  # an encoding of tiktoken's with gaps in its numbering, as cl100k_base has them
        ranks = tokenizer.encoding._mergeable_ranks
        pattern = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
                   r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
        tokenizer = Tokenizer(
            tiktoken.Encoding("odd", pat_str=pattern, mergeable_ranks=ranks,
                              special_tokens={"<|endoftext|>": 610, "<|fim|>": 605}), "odd")
    huggingface.write(odd_model(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    # ours reads it, too, if it splits as GPT-2's does
    again = tokenizer if "rule" in name else load_tokenizer(str(tmp_path / "out"))
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text and again.encode(text).tolist() == ids
    assert theirs.decode([tokenizer.eot]) == "<|endoftext|>" and len(texts) == 1000


def test_other_architectures_and_no_model_are_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    shape = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(intermediate_size=16, num_key_value_heads=1,
                                 **shape)).save_pretrained(tmp_path / "llama")
    OPTForCausalLM(OPTConfig(ffn_dim=16, word_embed_proj_dim=16,
                             **shape)).save_pretrained(tmp_path / "opt")
    (tmp_path / "empty").mkdir()
    for name, says in (("nowhere", "cannot load"), ("llama", "num_key_value_heads"),
                       ("opt", "is a OPTForCausalLM"), ("empty", "cannot load")):
        with pytest.raises(BadInput, match=f"{name}.*{says}|{says}.*{name}"):
            GPT.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("change", [
    dict(activation_function="relu"),
    dict(layer_norm_epsilon=1e-3),
    dict(n_inner=60),
    dict(scale_attn_by_inverse_layer_idx=True),
    dict(add_cross_attention=True)
], ids=str)
def test_variants_that_would_be_computed_wrongly_are_refused(change, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_positions=24, n_embd=16, n_layer=1, n_head=2, **change)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=next(iter(change))):
        GPT.from_pretrained(tmp_path)


def test_a_hub_that_does_not_answer_leaves_the_cache(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.create_server(
        ("127.0.0.1", 0)) as server:  # takes the connection, then says nothing
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        huggingface.cache_only_without_network(seconds=0.2)
        assert constants.HF_HUB_OFFLINE
