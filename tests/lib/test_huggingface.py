"""lib/huggingface.py against transformers: python -m pytest tests/lib/test_huggingface.py"""

import collections
import dataclasses
import itertools
import json
import random
import socket

import pytest
import torch
from helpers import sentences, tiny

from lib import huggingface
from lib.chat_template import JINJA
from lib.cli import BadInput
from lib.moe import MoE
from lib.tokenizers import Tokenizer, load_tokenizer, train_bpe
from train_gpt2 import GPT

TOGGLES = dict(
    norm=("layernorm", "rmsnorm"),
    pos=("learned", "rope"),
    mlp=("gelu", "relu2", "swiglu"),
    qk_norm=(False, True),
    emb_norm=(False, True),
    bias=(False, True),
    tie_embeddings=(False, True),
    bigram=(0, 37),
)
MODERN = dict(norm="rmsnorm", pos="rope", mlp="swiglu", bias=False, emb_norm=True)
GLM = dict(n_experts=4, n_active=2)
MIXTRAL = GLM | dict(router="softmax", balance="loss")
EXACT = dict(rtol=0, atol=1e-4)


def random_model(**toggles):
    """All weights random: biases and norms start at 0 and 1, which would hide a mistake."""
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
    config = GPT2Config(vocab_size=97, n_positions=24, n_embd=48, n_layer=3, n_head=4)
    theirs = GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():  # biases and norms start at 0 and 1, which would hide a mistake
        p.data.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(97, (3, 24))
    with torch.no_grad():
        assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4
        targets = idx[:, 1:]
        loss = ours(idx[:, :-1], targets) / targets.numel()
        torch.testing.assert_close(loss, theirs(idx, labels=idx).loss, rtol=1e-5, atol=0)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


@torch.no_grad()
def test_every_combination_is_exported_exactly():
    """As a class of transformers if there is one, else as ours; find_family names the flags that
    no class supports."""
    exported = collections.Counter()
    idx = torch.randint(61, (2, 16))
    for values in itertools.product(*TOGGLES.values()):
        toggles = dict(zip(TOGGLES, values))
        model = random_model(**toggles)
        theirs = huggingface.convert(model)
        name = type(theirs).__name__
        if name == huggingface.CUSTOM:
            with pytest.raises(BadInput) as error:
                huggingface.find_family(model.config)
            named = str(error.value).partition("lacks ")[2]
            assert any(f"--{flag}" in named or f"--no-{flag}" in named for flag in toggles), named
        logits = model(idx)
        assert logits.abs().max() > 0.3
        assert (theirs(idx).logits - logits).abs().max() < 1e-4
        assert theirs.get_input_embeddings().weight.shape == (61, 32)  # without padding
        exported[name] += 1
    assert exported == {
        "GPT2LMHeadModel": 8,
        "LlamaForCausalLM": 8,
        "Qwen3ForCausalLM": 4,
        "ArceeForCausalLM": 16,
        "Starcoder2ForCausalLM": 16,
        "StableLmForCausalLM": 4,
        huggingface.CUSTOM: 136 + 192,  # none of transformers has bigrams
    }


@torch.no_grad()
@pytest.mark.parametrize("toggles, name", [
    (GLM, "Glm4Moe"),
    (GLM | dict(n_shared=2, qk_norm=True), "Glm4Moe"),
    (GLM | dict(n_experts=5, n_active=5, balance="loss", expert_width=24), "Glm4Moe"),
    (MIXTRAL, "Mixtral"),
    (MIXTRAL | dict(n_active=1, expert_width=24, router_z_loss=0.1), "Mixtral"),
    (MIXTRAL | dict(qk_norm=True), "Qwen3Moe"),
], ids=str)
def test_mixtures_of_experts_are_exported_exactly_and_read_back(toggles, name, tokenizer, tmp_path):
    model = random_model(vocab_size=tokenizer.vocab_size, **MODERN | toggles)
    idx = torch.randint(61, (2, 16))
    huggingface.write(model, tokenizer, tmp_path / "fp32")
    huggingface.write(model, tokenizer, tmp_path / "bf16", torch.bfloat16)
    theirs, _ = huggingface.load(tmp_path / "fp32")
    assert type(theirs).__name__ == f"{name}ForCausalLM"
    logits = model(idx)
    assert logits.abs().max() > 0.5
    torch.testing.assert_close(theirs(idx).logits, logits, **EXACT)
    ours = GPT.from_pretrained(tmp_path / "fp32").eval()
    torch.testing.assert_close(ours(idx), logits, **EXACT)
    rounded = GPT.from_pretrained(tmp_path / "bf16").eval()
    # the biases that choose experts are not rounded
    assert torch.equal(rounded.transformer.h[0].mlp.bias, model.transformer.h[0].mlp.bias)


RMS_ROPE = dict(pos="rope", norm="rmsnorm", bias=False, emb_norm=True)


@torch.no_grad()
@pytest.mark.parametrize("toggles", [
    dict(),
    dict(mlp="relu2", bias=False, tie_embeddings=False),
    dict(pos="rope", mlp="relu2"),
    RMS_ROPE | dict(mlp="swiglu"),
    RMS_ROPE | dict(mlp="swiglu", qk_norm=True),
    RMS_ROPE | dict(mlp="relu2"),
    RMS_ROPE | dict(norm="layernorm", mlp="swiglu"),
], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_is_loaded_by_transformers_and_by_us(toggles, dtype, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = random_model(vocab_size=tokenizer.vocab_size, **toggles)
    idx = torch.randint(61, (2, 16))
    out = tmp_path / "out"
    huggingface.write(model, tokenizer, out, dtype)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len(list(tmp_path.iterdir())) == 1  # no temporary files
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = GPT.from_pretrained(out).eval()
    logits = model(idx)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1 * logits.abs().max()
    assert (theirs(idx).logits - logits).abs().max() < tolerance
    torch.testing.assert_close(ours(idx), theirs(idx).logits, **EXACT)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoTokenizer.from_pretrained(out).eos_token_id == tokenizer.eot
    assert GenerationConfig.from_pretrained(out).eos_token_id == tokenizer.eot


@torch.no_grad()
@pytest.mark.parametrize("toggles", [
    dict(norm="rmsnorm", mlp="swiglu"),
    dict(norm="rmsnorm", mlp="relu2"),
    dict(mlp="gelu"),
], ids=str)
def test_an_untrained_model_whose_biases_are_0_is_read_back(toggles, tokenizer, tmp_path):
    model = GPT(tiny(pos="rope", vocab_size=tokenizer.vocab_size, **toggles)).eval()
    idx = torch.randint(61, (2, 16))
    huggingface.write(model, tokenizer, tmp_path / "out")
    ours = GPT.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(ours(idx), model(idx), **EXACT)
    assert ours.config.bias


@pytest.mark.parametrize("toggles, says", [
    (dict(softcap=15.0), "--softcap 15.0"),
    (dict(token_shift=True), "--token_shift"),
    (dict(value_residual=True, residual_scalars=True), "--value_residual, --residual_scalars"),
    (dict(bigram=37), "GPT2LMHeadModel, lacks --bigram 37"),
    (dict(emb_norm=True), "GPT2LMHeadModel, lacks --emb_norm"),
    (dict(norm="rmsnorm"), "--norm rmsnorm"),
    (dict(norm="rmsnorm", pos="rope", mlp="relu2", qk_norm=True),
     "ArceeForCausalLM, lacks --qk_norm"),
    (dict(norm="rmsnorm", pos="rope", mlp="swiglu", qk_norm=True, bias=True), "--qk_norm"),
    (MODERN | GLM | dict(router="softmax"), "--router softmax"),
    (MODERN | GLM | dict(mlp="relu2"), "--n_experts 4"),
    (MODERN | MIXTRAL | dict(n_shared=1), "--router softmax"),
])
def test_the_flags_that_no_class_of_transformers_supports_are_named(toggles, says):
    config = tiny(**toggles)
    with pytest.raises(BadInput, match="no class of transformers") as error:
        huggingface.find_family(config)
    assert says in str(error.value)
    assert huggingface.export_class(config) == huggingface.CUSTOM


@torch.no_grad()
@pytest.mark.parametrize("toggles", [
    dict(token_shift=True, softcap=15.0),
    dict(bigram=37),
    MODERN | GLM | dict(n_shared=1, value_residual=True, tie_embeddings=False),
], ids=str)
def test_a_model_of_our_own_class_is_read_back(toggles, tokenizer, tmp_path):
    model = random_model(vocab_size=tokenizer.vocab_size, **toggles)
    idx = torch.randint(61, (2, 16))
    huggingface.write(model, tokenizer, tmp_path / "out")
    again = GPT.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(again(idx), model(idx), **EXACT)
    changed = {"vocab_size", "vocab_multiple", "expert_width"}
    for field in dataclasses.fields(model.config):
        if field.name not in changed:
            assert getattr(again.config, field.name) == getattr(model.config, field.name)


def test_code_in_a_folder_is_not_run_to_read_it(tokenizer, tmp_path):
    out = tmp_path / "out"
    huggingface.write(random_model(vocab_size=tokenizer.vocab_size, softcap=5.0), tokenizer, out)
    (out / "modeling_modern_gpt.py").write_text("raise SystemExit('run')")
    GPT.from_pretrained(out)
    huggingface.register_custom()
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)


@pytest.mark.parametrize("change", [
    dict(n_layer=3), dict(intermediate_size=64), dict(norm="rmsnorm"), dict(bigram=37)], ids=str)
def test_a_changed_folder_of_our_own_class_is_refused(change, tokenizer, tmp_path):
    out = tmp_path / "out"
    huggingface.write(random_model(vocab_size=tokenizer.vocab_size, softcap=5.0), tokenizer, out)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(BadInput, match=str(out)):
        GPT.from_pretrained(out)


@pytest.mark.parametrize("vocab_size, chat_template", [(100, None), (281, JINJA)])
def test_a_tokenizer_with_more_ids_than_the_model_is_refused(vocab_size, chat_template, tokenizer,
                                                              tmp_path):
    """Also if only the reserved ids of a chat are too many."""
    model = random_model(vocab_size=vocab_size)
    extras = huggingface.Extras(chat_template)
    with pytest.raises(BadInput, match="the tokenizer has 28"):
        huggingface.write(model, tokenizer, tmp_path / "a" / "out", extras=extras)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "empty", "link"])
def test_a_folder_that_may_be_written(kind, tokenizer, tmp_path):
    out = tmp_path / "out"
    if kind != "missing":
        (tmp_path / "there").mkdir()
        out = tmp_path / "there"
    if kind == "link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "there")
    huggingface.write(random_model(vocab_size=tokenizer.vocab_size), tokenizer, out)
    names = {path.name for path in out.iterdir()}
    assert "config.json" in names
    assert out.is_symlink() == (kind == "link")
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    left = {path.name for path in tmp_path.iterdir()} - {"out", "there", "link"}
    assert left == set()


def random_strings(n):
    """n strings of many scripts, control characters and odd spaces."""
    rng = random.Random(0)
    ranges = [(32, 126), (0, 31), (127, 0x24F), (0x300, 0x36F), (0x600, 0x6FF), (0x4E00, 0x4FFF),
              (0x1F600, 0x1F64F), (0x2000, 0x206F), (0xFFF0, 0xFFFD)]
    words = [
        "<|endoftext|>", "<|endoftext", "'s", "'LL", "\r\n", "  ", " " * 40, "\u3000", "don't",
        "3.14159", "e\u0301", "\ufeff", "\u200d", "--", "ﬁ", "ß",
    ]

    def piece():
        if rng.random() < 0.3:
            return rng.choice(words)
        characters = [chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 4))]
        return "".join(characters)

    strings = [""]
    while len(strings) < n:
        strings.append("".join(piece() for _ in range(rng.randint(1, 30))))
    return strings


def cl100k_like(ranks):
    """A Tokenizer with cl100k_base's splitting rule and gaps in its numbering."""
    import tiktoken

    pattern = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
               r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
    special = {"<|endoftext|>": 610, "<|fim|>": 605}
    encoding = tiktoken.Encoding("like cl100k", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=special)
    return Tokenizer(encoding, "like cl100k")


@pytest.mark.parametrize("name", ["gpt2", "trained", "cl100k's splitting rule"])
def test_transformers_encodes_random_strings_to_the_same_ids(name, tmp_path):
    from transformers import AutoTokenizer

    texts = random_strings(1000)
    if name == "gpt2":
        tokenizer = load_tokenizer("gpt2")
    else:
        tokenizer = train_bpe(sentences(50) + texts[:300], 600)
    if "rule" in name:
        tokenizer = cl100k_like(tokenizer.encoding._mergeable_ranks)
    huggingface.write(random_model(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    # ours reads it back if it splits as GPT-2's does
    again = tokenizer if "rule" in name else load_tokenizer(str(tmp_path / "out"))
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
        assert again.encode(text).tolist() == ids
    assert theirs.decode([tokenizer.eot]) == "<|endoftext|>"


def test_other_architectures_and_missing_models_are_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    shape = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    llama = LlamaConfig(intermediate_size=16, num_key_value_heads=1, **shape)
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    opt = OPTConfig(ffn_dim=16, word_embed_proj_dim=16, **shape)
    OPTForCausalLM(opt).save_pretrained(tmp_path / "opt")
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
    dict(add_cross_attention=True),
], ids=str)
def test_variants_that_we_do_not_compute_are_refused(change, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_positions=24, n_embd=16, n_layer=1, n_head=2, **change)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=next(iter(change))):
        GPT.from_pretrained(tmp_path)


def test_without_an_answer_of_the_hub_only_the_cache_is_used(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, but never answers
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        huggingface.cache_only_without_network(seconds=0.2)
    assert constants.HF_HUB_OFFLINE
