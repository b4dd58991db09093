"""llama.cpp: write a GPT and its tokenizer as one GGUF file, which Ollama and LM Studio load, too.

llama.cpp builds one graph per architecture. An `Architecture` here is the part of our
configurations that its graph computes exactly (src/models/*.cpp in llama.cpp).
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from lib.cli import BadInput
from lib.files import check_room, new_folder
from lib.moe import ExpertConfig
from lib.rope import BASE
from lib.tokenizers import END, SPLIT, Tokenizer

EPS = 1e-5             # of our norms
LARGEST_HALF = 65_504  # the largest number in fp16
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}  # dtype: gguf's name
# fields of GPTConfig that may have any value in every architecture
FREE = {
    "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "vocab_multiple", "bias",
    "tie_embeddings", "dropout", "init",
}
ROUTING = {field.name for field in dataclasses.fields(ExpertConfig)} - {"n_experts"}
ROUTING_FREE = {"n_active", "expert_width", "router_z_loss"}

# --------------------------------------------------------------------------------------------------
# Architectures

# our module -> llama.cpp's tensors; several if we fuse them into one matrix
Names = Mapping[str, tuple[str, ...]]
OUTER: Names = {
    "transformer.wte": ("token_embd",),
    "transformer.wpe": ("position_embd",),
    "transformer.ln_f": ("output_norm",),
    "lm_head": ("output",),
}
BLOCK: Names = {
    "ln_1": ("attn_norm",),
    "attn.c_attn": ("attn_q", "attn_k", "attn_v"),
    "attn.q_norm": ("attn_q_norm",),
    "attn.k_norm": ("attn_k_norm",),
    "attn.c_proj": ("attn_output",),
    "ln_2": ("ffn_norm",),
    "mlp.c_fc": ("ffn_up",),
    "mlp.c_proj": ("ffn_down",),
}
GATED = {"mlp.c_fc": ("ffn_gate", "ffn_up")}
EXPERTS = {
    "mlp.router": ("ffn_gate_inp",),
    "mlp.c_fc": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.c_proj": ("ffn_down_exps",),
}
# GLM also has the biases by which --balance bias chooses experts, and shared experts.
GLM = EXPERTS | {
    "ln_2": ("post_attention_norm",),
    "mlp": ("exp_probs_b",),
    "mlp.shared.c_fc": ("ffn_gate_shexp", "ffn_up_shexp"),
    "mlp.shared.c_proj": ("ffn_down_shexp",),
}
NORM_BIASES = {"attn_norm", "ffn_norm", "output_norm"}
ALL_BIASES = NORM_BIASES | {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}


class Architecture(NamedTuple):
    """An architecture of llama.cpp.

    allowed: {field of GPTConfig: values that it supports}; other fields, except FREE, must have
    their default. names: where its tensors differ from BLOCK. biases: tensors whose bias must
    exist; 0 if the model has none. needs_head: the head cannot be tied. interleaved: RoPE pairs
    dimensions 2i and 2i + 1, not i and i + D/2.
    """
    name: str
    allowed: dict[str, Any]
    names: Names = {}
    biases: Iterable[str] = ()
    needs_head: bool = False
    interleaved: bool = False


ANY = (True, False)
LAYER_NORM: dict[str, Any] = dict(norm=("layernorm",), pos=("rope",), emb_norm=ANY)
RMS: dict[str, Any] = dict(norm=("rmsnorm",), pos=("rope",), emb_norm=ANY)
MOE = RMS | dict(mlp=("swiglu",), bias=(False,), n_experts=range(1, 257))
SOFTMAX = MOE | dict(router=("softmax",), balance=("loss",), n_shared=(0,))
# In the order of preference. GLM's shared experts and biases may be 0, so it computes any mixture.
ARCHITECTURES = (
    Architecture("gpt2", dict(norm=("layernorm",), pos=("learned",), mlp=("gelu",)),
                 {"attn.c_attn": ("attn_qkv",)}, ALL_BIASES),
    Architecture("starcoder2", LAYER_NORM | dict(mlp=("gelu",)), biases=ALL_BIASES),
    Architecture("nemotron", LAYER_NORM | dict(mlp=("relu2",)), biases=NORM_BIASES,
                 needs_head=True),
    Architecture("stablelm", LAYER_NORM | dict(mlp=("swiglu",), bias=(False,), qk_norm=ANY),
                 GATED, NORM_BIASES, needs_head=True),
    Architecture("llama", RMS | dict(mlp=("swiglu",)), GATED, interleaved=True),
    Architecture("qwen3", RMS | dict(mlp=("swiglu",), bias=(False,), qk_norm=(True,)), GATED),
    Architecture("arcee", RMS | dict(mlp=("relu2",), bias=(False,)), interleaved=True),
    Architecture("llama", SOFTMAX | dict(bias=ANY), EXPERTS, interleaved=True),
    Architecture("qwen3moe", SOFTMAX | dict(qk_norm=(True,)), EXPERTS),
    Architecture(
        "glm4moe",
        MOE | dict(qk_norm=ANY, router=("sigmoid", "softmax"), balance=("bias", "loss"),
                   n_shared=range(257)),
        GLM),
)


def unsupported(config: Any, architecture: Architecture) -> dict[str, Any]:
    """{field of a GPTConfig that the architecture does not compute: the value to train with}."""
    changes = {}
    free = FREE | (ROUTING_FREE if config.n_experts else ROUTING)
    for field in dataclasses.fields(config):
        allowed = architecture.allowed.get(field.name)
        if allowed is None and field.name in free:
            continue
        if allowed is None:
            allowed = (field.default,)
        if getattr(config, field.name) not in allowed:
            changes[field.name] = allowed[0]
    return changes


def find_architecture(config: Any) -> Architecture:
    """GPTConfig -> the first architecture that computes it. Raises BadInput if none does, naming
    what the nearest one lacks and the flags to train with instead."""
    candidates = [(unsupported(config, each), each) for each in ARCHITECTURES]
    changes, architecture = min(candidates, key=lambda candidate: distance(candidate[0]))
    if changes:
        lacks = [as_flag(name, getattr(config, name)) for name in changes]
        remedy = [as_flag(name, value) for name, value in changes.items()]
        raise BadInput(f"llama.cpp cannot compute this model: its nearest architecture, "
                       f"{architecture.name}, lacks {', '.join(lacks)}: train with "
                       f"{' '.join(remedy)}")
    return architecture


def distance(changes: dict[str, Any]) -> tuple:
    """A key to sort by: the number of changes; among equals, keep experts and give up biases."""
    return len(changes), "n_experts" in changes, "bias" not in changes


def as_flag(name: str, value: Any) -> str:
    """A setting as on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


# --------------------------------------------------------------------------------------------------
# Tensors


@torch.no_grad()
def tensors(model: Any, architecture: Architecture) -> dict[str, torch.Tensor]:
    """A GPT -> {llama.cpp's name: tensor}, fp32, sharing memory where possible.

    The rows that pad the vocabulary are cut off. A post-embedding norm is applied to the embedding
    table, which is then no longer tied to the head.
    """
    c = model.config
    state = model.state_dict()
    for key in ("transformer.wte.weight", "lm_head.weight"):
        state[key] = state[key][:c.vocab_size]
    state["transformer.wte.weight"] = model.transformer.emb_norm(state["transformer.wte.weight"])
    if c.tie_embeddings and not c.emb_norm and not architecture.needs_head:
        del state["lm_head.weight"]
    if architecture.name == "glm4moe" and not c.n_shared:
        add_empty_shared_experts(state, c)
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        prefix, names = tensor_names(module, architecture)
        if not names:
            continue
        dim = 1 if value.dim() == 3 else 0  # experts are (E, out, in)
        for name, part in zip(names, value.chunk(len(names), dim), strict=True):
            found[f"{prefix}{name}.{kind}"] = arrange(name, part, c.n_head, architecture)
    add_biases(found, architecture)
    return found


def tensor_names(module: str, architecture: Architecture) -> tuple[str, tuple[str, ...]]:
    """Our module -> (prefix, names) of its tensors; no names if the architecture has no such
    tensor."""
    if not module.startswith("transformer.h."):
        return "", OUTER.get(module, ())
    _, _, layer, inner = module.split(".", 3)
    names = architecture.names.get(inner, BLOCK.get(inner, ()))
    return f"blk.{layer}.", names


def arrange(name: str, value: torch.Tensor, n_head: int,
            architecture: Architecture) -> torch.Tensor:
    """The rows of a tensor as llama.cpp orders them."""
    if architecture.interleaved and name in ("attn_q", "attn_k"):
        pairs = value.view(n_head, 2, len(value) // n_head // 2, *value.shape[1:])
        return pairs.transpose(1, 2).reshape(value.shape)
    if architecture.name == "stablelm" and name in ("attn_q_norm", "attn_k_norm"):
        return value.expand(n_head, -1)  # one norm per head
    return value


def add_empty_shared_experts(state: dict[str, torch.Tensor], config: Any) -> None:
    """Add a shared expert of zeros to each block's state: llama.cpp's GLM always has some."""
    for i in range(config.n_layer):
        mlp = f"transformer.h.{i}.mlp"
        for matrix in ("c_fc", "c_proj"):
            one = state[f"{mlp}.{matrix}.weight"][0]
            state[f"{mlp}.shared.{matrix}.weight"] = torch.zeros_like(one)


def add_biases(found: dict[str, torch.Tensor], architecture: Architecture) -> None:
    """Add zeros for the biases that the model lacks and the architecture needs."""
    for key, value in list(found.items()):
        prefix, _, kind = key.rpartition(".")
        if kind == "weight" and prefix.rpartition(".")[2] in architecture.biases:
            found.setdefault(f"{prefix}.bias", value.new_zeros(len(value)))


def encode(name: str, value: torch.Tensor, dtype: str) -> tuple[Any, Any]:
    """A tensor -> (array, its gguf type).

    As llama.cpp's converter does it: vectors, norms, learned positions and routers stay fp32, and
    rows that Q8_0's blocks of 32 do not divide are fp16. Raises BadInput beyond fp16's range.
    """
    gguf = library()
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    array = value.contiguous().numpy()
    precise = value.dim() == 1 or any(part in name for part in ("norm", "position", "gate_inp"))
    if precise or dtype == "f32":
        return array, gguf.GGMLQuantizationType.F32
    if value.abs().max() > LARGEST_HALF:
        raise BadInput(f"{name} has weights above {LARGEST_HALF:,}, the largest in fp16: give "
                       "--dtype f32")
    if dtype == "q8_0" and value.size(-1) % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    return gguf.quants.quantize(array, kind), kind


# --------------------------------------------------------------------------------------------------
# Tokenizer


def splitting_rule(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for the rule by which a Tokenizer splits text. Raises BadInput if it has
    none."""
    from tiktoken_ext.openai_public import r50k_pat_str

    # SPLIT is Llama 3's rule. cl100k_base's yields the same ids, though other pieces at the end of
    # a text. o200k_base's is only approximated in llama.cpp.
    rules = {SPLIT: "llama-bpe", r50k_pat_str: "gpt-2"}
    if tokenizer.name == "cl100k_base":
        return "llama-bpe"
    rule = rules.get(tokenizer.encoding._pat_str)
    if rule is None:
        raise BadInput(f"llama.cpp does not split text as the tokenizer {tokenizer.name} does: "
                       "train on shards of fineweb.py --tokenizer gpt2 or bpe:32768")
    return rule


def vocabulary(tokenizer: Tokenizer, size: int,
               chat: bool) -> tuple[list[str], list[int], list[str]]:
    """(tokens, their types, merges) of a Tokenizer, for `size` ids.

    Only control tokens and unassigned ids are not normal tokens. chat: include the reserved ids.
    """
    types = library().TokenType
    data = json.loads(tokenizer.to_json(chat))
    names = {i: token for token, i in data["model"]["vocab"].items()}
    control = {token["id"]: token["content"] for token in data["added_tokens"]}
    names |= control
    tokens = []
    kinds = []
    for i in range(size):
        tokens.append(names.get(i, f"[UNUSED{i}]"))
        kind = types.CONTROL if i in control else types.NORMAL
        kinds.append(kind if i in names else types.UNUSED)
    merges = []
    for pair in data["model"]["merges"]:
        merges.append(pair if isinstance(pair, str) else " ".join(pair))
    return tokens, kinds, merges


# --------------------------------------------------------------------------------------------------
# Files


def library() -> ModuleType:
    """The package gguf. Raises BadInput if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise BadInput("GGUF files need the package gguf: pip install -r requirements-dev.txt"
                       ) from error
    return gguf


def write(model: Any, tokenizer: Tokenizer, path: str | Path, dtype: str, card: str,
          chat_template: str | None = None) -> tuple[Path, Path]:
    """Write a GPT and its Tokenizer to a GGUF file, and beside it <name>.Modelfile for Ollama and
    the model card <name>.md, whose paths are returned. All files appear, or none.

    dtype: a key of FILE_TYPES. chat_template: of a chat model, whose turns end in the reserved
    <|end|>. Raises BadInput if llama.cpp cannot compute the model or split the text, if a file
    exists, or if it cannot be written.
    """
    path = Path(path)
    modelfile = path.with_suffix(".Modelfile")
    readme = path.with_suffix(".md")
    remedy = "name another --out"
    for file in (path, modelfile, readme):
        if os.path.lexists(file):
            raise BadInput(f"{file} exists: {remedy}")
    writer = prepare(model, tokenizer, path.stem, dtype, chat_template)
    size = sum(tensor.nbytes for tensor in writer.tensors[0].values())
    instructions = ollama_modelfile(path.name, model.config.block_size, chat_template)
    texts = {modelfile: instructions, readme: card}
    with new_folder(path.parent, remedy):
        check_room(path.parent, size, "the export", "free some disk space")
        try:
            save(writer, path, texts)
        except OSError as error:
            for file in texts:
                file.unlink(missing_ok=True)
            reason = error.strerror or error
            raise BadInput(f"cannot write {path} ({reason}): free some disk space, or {remedy}"
                           ) from error
    return modelfile, readme


def save(writer: Any, path: Path, texts: dict[Path, str]) -> None:
    """Write the GGUF file and the text files to a temporary folder, then move them to where they
    belong."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.stem[:100]}.") as partial:
        model = Path(partial, path.name)
        try:
            writer.write_header_to_file(model)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        for file, text in texts.items():
            Path(partial, file.name).write_text(text, encoding="utf-8")
        for file in (*texts, path):
            os.replace(Path(partial, file.name), file)


def prepare(model: Any, tokenizer: Tokenizer, name: str, dtype: str,
            chat_template: str | None) -> Any:
    """A gguf.GGUFWriter with all metadata and tensors. Raises BadInput like `write`."""
    gguf = library()
    architecture = find_architecture(model.config)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, model, architecture)
    add_tokenizer(writer, tokenizer, model.config.vocab_size, chat_template)
    for key, value in tensors(model, architecture).items():
        array, kind = encode(key, value, dtype)
        writer.add_tensor(key, array, raw_dtype=kind)
    return writer


def add_shape(writer: Any, model: Any, architecture: Architecture) -> None:
    """Write the settings of the architecture."""
    c = model.config
    hidden = model.transformer.h[0].mlp.c_proj.weight.size(-1)
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_head)
    if c.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(EPS)
    else:
        writer.add_layer_norm_eps(EPS)
    if c.pos == "rope":
        head_dim = c.n_embd // c.n_head
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(BASE)
    if architecture.name == "stablelm":
        writer.add_parallel_residual(False)
    if c.n_experts:
        writer.add_expert_count(c.n_experts)
        writer.add_expert_used_count(c.n_active)
        writer.add_expert_feed_forward_length(hidden)
    if architecture.name == "glm4moe":
        add_router(writer, c)


def add_router(writer: Any, c: Any) -> None:
    """Write the settings of GLM's router, which other mixtures do not have."""
    writer.add_expert_shared_count(c.n_shared or 1)  # see add_empty_shared_experts
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_gating_func(library().ExpertGatingFuncType[c.router.upper()])
    writer.add_leading_dense_block_count(0)


def add_tokenizer(writer: Any, tokenizer: Tokenizer, size: int, chat_template: str | None) -> None:
    """Write the tokenizer and the chat template.

    No <|endoftext|> is added in front of a text, as in generate.py; the template has its own.
    """
    tokens, kinds, merges = vocabulary(tokenizer, size, chat=bool(chat_template))
    writer.add_tokenizer_model("gpt2")  # a byte-level BPE
    writer.add_tokenizer_pre(splitting_rule(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    end = tokenizer.reserved[END] if chat_template else tokenizer.eot
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_pad_token_id(tokenizer.eot)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_add_bos_token(False)
    if chat_template:
        # In the usual spelling, llama.cpp without --jinja takes it for Phi-3's, which has newlines.
        writer.add_chat_template(chat_template.replace("<|assistant|>", "<|' + 'assistant|>"))


# the chat template in Go's template language
CHAT_MODELFILE = '''\
TEMPLATE """<|endoftext|>{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}\
<|assistant|>"""
PARAMETER stop "<|end|>"
PARAMETER stop "<|endoftext|>"
'''
TEXT_MODELFILE = '''\
TEMPLATE """{{ .Prompt }}"""
PARAMETER stop "<|endoftext|>"
'''


def ollama_modelfile(name: str, block_size: int, chat_template: str | None) -> str:
    """The text of a Modelfile for the GGUF file `name` in the same folder."""
    template = CHAT_MODELFILE if chat_template else TEXT_MODELFILE
    return f"FROM ./{name}\n{template}PARAMETER num_ctx {block_size}\n"
