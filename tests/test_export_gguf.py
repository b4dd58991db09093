"""export_gguf.py: the file is read back by the package gguf. tests/test_gguf_in_llamacpp.py runs it
in llama.cpp.

    python -m pytest tests/test_export_gguf.py
"""

import re
import sys

import numpy as np
import pytest
import torch
from helpers import full_disk, tiny, tiny_checkpoint
from jinja2 import Template

import export_gguf
from lib import checkpoint, llamacpp
from lib.chat_template import JINJA, render
from lib.cli import BadInput
from lib.tokenizers import Tokenizer, load_tokenizer
from train_gpt2 import PRESETS, GPTConfig, TrainConfig

gguf = pytest.importorskip("gguf")

ROPE = dict(pos="rope")
RMS = dict(pos="rope", norm="rmsnorm")
SWIGLU = RMS | dict(mlp="swiglu", bias=False)
MOE = SWIGLU | dict(n_experts=4, n_active=2)
SOFTMAX = MOE | dict(router="softmax", balance="loss")
CASES = {  # name: (architecture, changes to the tiny GPTConfig)
    "gpt2": ("gpt2", {}),
    "gpt2-without-biases": ("gpt2", dict(bias=False, tie_embeddings=False)),
    "starcoder2": ("starcoder2", ROPE),
    "starcoder2-emb_norm": ("starcoder2", ROPE | dict(bias=False, emb_norm=True)),
    "nemotron": ("nemotron", ROPE | dict(mlp="relu2")),
    "nemotron-without-biases": ("nemotron", ROPE | dict(mlp="relu2", bias=False)),
    "stablelm": ("stablelm", ROPE | dict(mlp="swiglu", bias=False)),
    "stablelm-qk_norm": ("stablelm", ROPE | dict(mlp="swiglu", bias=False, qk_norm=True)),
    "llama": ("llama", SWIGLU | dict(emb_norm=True)),
    "llama-with-biases": ("llama", SWIGLU | dict(bias=True, tie_embeddings=False)),
    "qwen3": ("qwen3", SWIGLU | dict(qk_norm=True)),
    "arcee": ("arcee", RMS | dict(mlp="relu2", bias=False)),
    "llama-experts": ("llama", SOFTMAX | dict(bias=True)),
    "qwen3moe": ("qwen3moe", SOFTMAX | dict(qk_norm=True)),
    "glm4moe": ("glm4moe", MOE),
    "glm4moe-shared": ("glm4moe", SOFTMAX | dict(n_shared=2, qk_norm=True)),
}
LACKS = "--no-token_shift --no-value_residual --no-residual_scalars --bigram 0 --softcap 0"  # flags


def export(model_changes, tokenizer, folder, *flags, template=None):
    """Export a tiny model -> (the model, a GGUFReader)."""
    path = folder / "ckpt_00001.pt"
    model = tiny_checkpoint(path, tokenizer, **model_changes)
    if template:
        checkpoint.write(path, checkpoint.read(path) | {"chat_template": template})
    out = folder / "model.gguf"
    export_gguf.main(["--checkpoint", str(path), "--out", str(out), *flags])
    return model, gguf.GGUFReader(out)


def value(reader, key):
    """The value of a key; {arch} is the architecture's name."""
    arch = reader.get_field("general.architecture").contents()
    field = reader.get_field(key.format(arch=arch))
    return None if field is None else field.contents()


def read_tensors(reader):
    """{name: its values as fp32}"""
    found = {}
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(array.copy()).view(*map(int, reversed(tensor.shape)))
    return found


# --------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("case", CASES)
def test_a_file_holds_the_architecture_and_all_weights(case, tokenizer, tmp_path):
    arch, changes = CASES[case]
    model, reader = export(changes, tokenizer, tmp_path, "--dtype", "f32")
    c = model.config
    assert value(reader, "general.architecture") == arch
    assert value(reader, "{arch}.context_length") == c.block_size
    assert value(reader, "{arch}.block_count") == c.n_layer
    assert value(reader, "{arch}.expert_used_count") == (c.n_active if c.n_experts else None)
    eps = "layer_norm_rms_epsilon" if c.norm == "rmsnorm" else "layer_norm_epsilon"
    assert value(reader, f"{{arch}}.attention.{eps}") == pytest.approx(1e-5)
    found = read_tensors(reader)
    with torch.no_grad():
        wte = model.transformer.wte.weight[:c.vocab_size]
        torch.testing.assert_close(found["token_embd.weight"], model.transformer.emb_norm(wte))
    if "output.weight" in found:
        assert torch.equal(found["output.weight"], model.lm_head.weight[:c.vocab_size])
    assert not c.emb_norm or "output.weight" in found
    block = model.transformer.h[1]
    q, k, v = block.attn.c_attn.weight.detach().chunk(3)
    if arch == "gpt2":
        assert torch.equal(found["blk.1.attn_qkv.weight"], torch.cat((q, k, v)))
    else:
        theirs = [found[f"blk.1.attn_{name}.weight"] for name in "qkv"]
        if arch in ("llama", "arcee"):
            theirs[:2] = [uninterleave(weight, c.n_head) for weight in theirs[:2]]
        assert torch.equal(torch.cat(theirs), torch.cat((q, k, v)))
    assert torch.equal(found["blk.1.attn_output.weight"], block.attn.c_proj.weight)
    down = "ffn_down_exps" if c.n_experts else "ffn_down"
    assert torch.equal(found[f"blk.1.{down}.weight"], block.mlp.c_proj.weight)
    if c.mlp == "swiglu":
        kinds = [down.replace("down", kind) for kind in ("gate", "up")]
        fused = torch.cat([found[f"blk.1.{kind}.weight"] for kind in kinds], dim=-2)
        assert torch.equal(fused, block.mlp.c_fc.weight)


def uninterleave(weight, n_head):
    """Rows of a head 0, 1, 2, 3, ... -> 0, 2, ..., 1, 3, ..."""
    heads = [torch.cat((head[0::2], head[1::2])) for head in weight.chunk(n_head)]
    return torch.cat(heads)


def test_missing_biases_and_shared_experts_are_zeros(tokenizer, tmp_path):
    _, reader = export(CASES["gpt2-without-biases"][1], tokenizer, tmp_path)
    found = read_tensors(reader)
    biases = [tensor for name, tensor in found.items() if name.endswith(".bias")]
    assert len(biases) == 2 * 6 + 1
    assert not torch.cat(biases).any()
    for path in tmp_path.iterdir():
        path.unlink()
    _, reader = export(MOE, tokenizer, tmp_path)
    assert value(reader, "{arch}.expert_shared_count") == 1
    assert not read_tensors(reader)["blk.0.ffn_down_shexp.weight"].any()


@pytest.mark.parametrize("dtype, tolerance", [("f16", 1e-3), ("q8_0", 1e-2)])
def test_matrices_are_rounded_and_vectors_are_not(dtype, tolerance, tokenizer, tmp_path):
    _, reader = export(SOFTMAX, tokenizer, tmp_path, "--dtype", dtype)
    rounded = read_tensors(reader)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    for path in tmp_path.iterdir():
        path.unlink()
    _, reader = export(SOFTMAX, tokenizer, tmp_path, "--dtype", "f32")
    for name, exact in read_tensors(reader).items():
        precise = exact.dim() == 1 or "ffn_gate_inp" in name
        if precise:
            assert types[name] == "F32"
        largest = exact.abs().max() or 1
        assert (rounded[name] - exact).abs().max() <= (0 if precise else tolerance) * largest
    assert types["token_embd.weight"] == dtype.upper()
    # experts have 40 hidden units, which blocks of 32 do not divide
    assert types["blk.0.ffn_down_exps.weight"] == "F16"


def test_help_names_every_architecture():
    for architecture in llamacpp.ARCHITECTURES:
        assert f"\n    {architecture.name} " in export_gguf.__doc__


@pytest.mark.parametrize("preset", ["speedrun", "tiny"])
def test_presets_that_llamacpp_lacks_fit_with_the_flags_named(preset):
    def config(*flags):
        configs = (TrainConfig, GPTConfig)
        (_, c), _ = export_gguf.parse(configs, ["--preset", preset, *flags], presets=PRESETS)
        return c

    with pytest.raises(BadInput, match="lacks .*: train with ") as error:
        llamacpp.find_architecture(config())
    remedy = str(error.value).rpartition("train with ")[2]
    assert set(remedy.split()) <= set(f"--mlp swiglu {LACKS}".split())
    for flags, name in ((remedy, "qwen3"), (f"{LACKS} --no-qk_norm", "arcee")):
        assert llamacpp.find_architecture(config(*flags.split())).name == name


@pytest.mark.parametrize("changes, lacks, remedy", [
    (dict(norm="rmsnorm"), "--norm rmsnorm", "--norm layernorm"),
    (dict(mlp="relu2"), "--mlp relu2", "--mlp gelu"),
    (dict(emb_norm=True), "--emb_norm", "--no-emb_norm"),
    (SWIGLU | dict(softcap=15.0), "--softcap 15", "--softcap 0"),
    (MOE | dict(mlp="relu2"), "--mlp relu2", "--mlp swiglu"),
    (MOE | dict(bias=True), "--bias", "--no-bias"),
    (ROPE | dict(mlp="swiglu"), "--bias", "--no-bias"),
    (dict(n_experts=4), "--n_experts 4", "--n_experts 0"),
])
def test_what_llamacpp_lacks_is_named(changes, lacks, remedy):
    with pytest.raises(BadInput, match=f"lacks {lacks}: train with {remedy}$"):
        llamacpp.find_architecture(tiny(**changes))


def test_flags_without_effect_are_ignored():
    c = tiny(**SWIGLU, router="softmax", balance="loss", n_shared=3, init="xavier", dropout=0.1)
    assert llamacpp.find_architecture(c).name == "llama"


# --------------------------------------------------------------------------------------------------
# Tokenizers


TEXTS = [
    "the cat sat", " don't DON'T we'LL", "12345 \r\n\n  x", "\x00é猫👍 <|endoftext|>", "..!  "
]


@pytest.mark.parametrize("name, rule", [("trained", "llama-bpe"), ("gpt2", "gpt-2")])
def test_vocabulary_and_merges_encode_to_the_same_ids(name, rule, tokenizer, tmp_path):
    """Compared through the library tokenizers, given what the file holds."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models

    if name == "gpt2":
        tokenizer = load_tokenizer("gpt2")
    _, reader = export({}, tokenizer, tmp_path)
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.pre") == rule
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    assert value(reader, "tokenizer.ggml.bos_token_id") == tokenizer.eot
    assert value(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eot
    tokens = value(reader, "tokenizer.ggml.tokens")
    kinds = value(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == tokenizer.vocab_size
    control = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    assert control == [tokenizer.eot]
    merges = [tuple(pair.split(" ")) for pair in value(reader, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = HFTokenizer(models.BPE(vocab, merges))
    ours = HFTokenizer.from_str(tokenizer.to_json())
    bpe.pre_tokenizer = ours.pre_tokenizer
    for text in TEXTS:
        assert bpe.encode(text).ids == tokenizer.encode(text).tolist()


def test_unassigned_ids_are_unused(tokenizer):
    tokens, kinds, _ = llamacpp.vocabulary(tokenizer, tokenizer.vocab_size + 2, chat=False)
    assert len(set(tokens)) == len(tokens)
    assert kinds[-3:] == [gguf.TokenType.CONTROL, gguf.TokenType.UNUSED, gguf.TokenType.UNUSED]


def test_a_splitting_rule_that_llamacpp_lacks_is_refused(tokenizer):
    import tiktoken

    ranks = tokenizer.encoding._mergeable_ranks
    special = {"<|endoftext|>": len(ranks)}
    other = tiktoken.Encoding("o200k_base", pat_str=r"\s+|\S+", mergeable_ranks=ranks,
                              special_tokens=special)
    with pytest.raises(BadInput, match="tokenizer o200k_base does: .* --tokenizer gpt2 or bpe:"):
        llamacpp.splitting_rule(Tokenizer(other, "o200k_base"))


# --------------------------------------------------------------------------------------------------
# Chat models


def test_a_chat_model_has_its_template_and_a_modelfile(tokenizer, tmp_path):
    size = tokenizer.vocab_size + 4
    _, reader = export(dict(vocab_size=size), tokenizer, tmp_path, template=JINJA)
    template = value(reader, "tokenizer.chat_template")
    assert "<|assistant|>" not in template  # else taken for Phi-3's
    end = tokenizer.reserved["<|end|>"]
    assert value(reader, "tokenizer.ggml.eos_token_id") == end
    assert value(reader, "tokenizer.ggml.eot_token_id") == end
    tokens = value(reader, "tokenizer.ggml.tokens")
    for name, i in tokenizer.reserved.items():
        assert tokens[i] == name
    text = (tmp_path / "model.Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n")
    assert "PARAMETER num_ctx 32\n" in text
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids, _ = render(chat, tokenizer, reply=True)
    names = {i: name for name, i in tokenizer.reserved.items()} | {tokenizer.eot: "<|endoftext|>"}
    expected = "".join(names.get(i) or tokenizer.decode([i]) for i in ids)
    jinja = Template(template)
    assert jinja.render(messages=chat, add_generation_prompt=True) == expected
    [template] = re.findall('TEMPLATE """(.*)"""', text)
    assert render_go(template, chat) == expected


def render_go(template, messages):
    """A template of Ollama, as far as ours uses Go's language."""
    before, turn, after = re.split(r"\{\{ range \.Messages \}\}|\{\{ end \}\}", template)
    turns = []
    for message in messages:
        named = turn.replace("{{ .Role }}", message["role"])
        turns.append(named.replace("{{ .Content }}", message["content"]))
    return before + "".join(turns) + after


def test_a_text_model_has_a_modelfile_too(tokenizer, tmp_path):
    _, reader = export({}, tokenizer, tmp_path)
    assert value(reader, "tokenizer.chat_template") is None
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in (tmp_path / "model.Modelfile").read_text()


# --------------------------------------------------------------------------------------------------
# Bad input


def test_a_disk_that_fills_up_leaves_nothing(tokenizer, tmp_path):
    path = tmp_path / "ckpt_00001.pt"
    tiny_checkpoint(path, tokenizer)
    says = r"cannot write .+m.gguf \(.*: free some disk space"
    with full_disk(20_000), pytest.raises(BadInput, match=says):
        export_gguf.main(["--checkpoint", str(path), "--out", str(tmp_path / "new/m.gguf")])
    assert list(tmp_path.iterdir()) == [path]


def test_existing_files_are_kept(tokenizer, tmp_path):
    path = tmp_path / "ckpt_00001.pt"
    tiny_checkpoint(path, tokenizer)
    for name in ("a.gguf", "b.Modelfile", "c.md"):
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.iterdir())
    for name in ("a.gguf", "b.gguf", "c.gguf"):
        with pytest.raises(BadInput, match="exists: name another --out"):
            export_gguf.main(["--checkpoint", str(path), "--out", str(tmp_path / name)])
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_weights_that_cannot_be_written(tokenizer, tmp_path):
    path = tmp_path / "ckpt_00001.pt"
    model = tiny_checkpoint(path, tokenizer)
    state = checkpoint.read(path)
    flags = ["--checkpoint", str(path), "--out", str(tmp_path / "m.gguf")]
    for number, says in ((1e6, "attn_output.weight has weights above 65,504"), (np.nan, "NaN")):
        with torch.no_grad():
            model.transformer.h[0].attn.c_proj.weight[0, 0] = number
        checkpoint.write(path, state | {"model": model.state_dict()})
        with pytest.raises(BadInput, match=says):
            export_gguf.main(flags)
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input(tokenizer, tmp_path, launch, monkeypatch):
    fits = tmp_path / "ckpt_00001.pt"
    tiny_checkpoint(fits, tokenizer)
    out = ["--out", str(tmp_path / "m.gguf")]
    for flags, says in (
        (out, "name either --checkpoint"),
        (["--checkpoint", str(fits)], "name --out, the .gguf file"),
        (["--checkpoint", str(fits), "--out", str(tmp_path)], "name --out, the .gguf file"),
        (["--checkpoint", str(fits), "--out", str(fits / "m.gguf")], "cannot write"),
    ):
        with pytest.raises(BadInput, match=says):
            export_gguf.main(flags)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadInput, match="pip install -r requirements-dev.txt"):
        export_gguf.main(["--checkpoint", str(fits), *out])
    capped = tmp_path / "capped.pt"
    tiny_checkpoint(capped, tokenizer, softcap=15.0)
    result = launch("export_gguf.py", "--checkpoint", capped, "--out", "m.gguf")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "gpt2, lacks --softcap 15: train with --softcap 0" in result.stderr
    assert sorted(tmp_path.iterdir()) == [capped, fits]


def test_ids_that_are_not_text_are_refused(tmp_path):
    from lib.tokenizers import load_ids

    path = tmp_path / "ckpt_00001.pt"
    tiny_checkpoint(path, load_ids("ids:61"))
    with pytest.raises(BadInput, match="needs text"):
        export_gguf.main(["--checkpoint", str(path), "--out", str(tmp_path / "m.gguf")])


def test_the_script_says_what_it_wrote(tokenizer, tmp_path, launch):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer)
    result = launch("export_gguf.py", "--checkpoint", ".", "--out", "new/chat.gguf")
    assert (result.returncode, result.stderr) == (0, ".: ckpt_00001.pt, the newest\n")
    assert result.stdout == ("new/chat.gguf: gpt2, f16, 0.00 GB\n"
                             "for Ollama: ollama create chat -f new/chat.Modelfile\n"
                             "upload it: hf upload chat new/chat.gguf && "
                             "hf upload chat new/chat.md README.md\n")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "chat.Modelfile", "chat.gguf", "chat.md"]
    assert "ollama run chat" in (tmp_path / "new" / "chat.md").read_text()
