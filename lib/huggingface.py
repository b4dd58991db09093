"""Hugging Face: convert models to and from transformers' classes and folders, and use its hub
without a network."""

import dataclasses
import http.client
import os
import shutil
import ssl
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lib.cli import BadInput
from lib.files import check_room, new_folder, read_json, replace, write_json
from lib.tokenizers import END, EOT, Tokenizer, load_tokenizer

# --------------------------------------------------------------------------------------------------
# transformers' classes and the GPTConfigs that they support.

ACTIVATIONS = {"gelu": "gelu_new", "relu2": "relu2", "swiglu": "silu"}
# fields of GPTConfig that may have any value in every class
FREE = {
    "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "vocab_multiple", "bias",
    "tie_embeddings", "dropout", "init", "n_active", "expert_width", "router_z_loss",
    "bigram_dim",
}
# fields of GPTConfig that ModernGPTConfig has by the same name
CUSTOM_FIELDS = (
    "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp", "norm", "pos", "bias",
    "emb_norm", "qk_norm", "token_shift", "value_residual", "residual_scalars", "bigram",
    "bigram_dim", "softcap", "dropout", "n_experts", "n_active", "n_shared", "router",
)
# ours -> theirs; several if we fuse them into one matrix
Modules = Mapping[str, tuple[str, ...]]


def no_fields(theirs: Any) -> dict[str, Any]:
    return {}


class Family(NamedTuple):
    """A class of transformers.

    allowed: {field of GPTConfig: values that the class supports}; other fields, except FREE, must
    have their default. config: (GPTConfig, hidden units of the MLP or of an expert) -> the
    keyword arguments of the class's configuration. modules: GPTConfig -> Modules; where ours is a
    single tensor, theirs is one. fields: a configuration of the class -> the fields of GPTConfig
    that are specific to this class.
    """
    allowed: dict
    config: Callable
    modules: Callable
    fields: Callable = no_fields


def gpt2_config(c: Any, hidden: int) -> dict[str, Any]:
    return dict(
        n_positions=c.block_size,
        n_ctx=c.block_size,  # the same under the name in OpenAI's file, which llama.cpp reads
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_inner=hidden,
        activation_function=ACTIVATIONS[c.mlp],
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        resid_pdrop=c.dropout,
        embd_pdrop=c.dropout,
        attn_pdrop=c.dropout,
    )


def gpt2_modules(c: Any) -> Modules:
    names = ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"]
    for i in range(c.n_layer):
        for name in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            names.append(f"transformer.h.{i}.{name}")
    return {name: (name,) for name in names}


def llama_config(own: Callable) -> Callable:
    """The Family.config of a class derived from Llama. own: (GPTConfig, hidden units) -> the
    keyword arguments that are specific to the class."""
    def config(c, hidden):
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
        return dict(
            hidden_size=c.n_embd,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_head,
            intermediate_size=hidden,
            hidden_act=ACTIVATIONS[c.mlp],
            max_position_embeddings=c.block_size,
            rope_parameters=rope,
        ) | own(c, hidden)
    return config


def llama_modules(feed_forward: Modules) -> Callable:
    """The Family.modules of a class derived from Llama. feed_forward: modules of a layer's MLP or
    experts."""
    layer = {
        "ln_1": ("input_layernorm",),
        "ln_2": ("post_attention_layernorm",),
        "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj": ("self_attn.o_proj",),
        "attn.q_norm": ("self_attn.q_norm",),
        "attn.k_norm": ("self_attn.k_norm",),
        **feed_forward,
    }

    def modules(c):
        found = {
            "transformer.wte": ("model.embed_tokens",),
            "transformer.ln_f": ("model.norm",),
            "lm_head": ("lm_head",),
        }
        for i in range(c.n_layer):
            for ours, theirs in layer.items():
                names = tuple(f"model.layers.{i}.{name}" for name in theirs)
                found[f"transformer.h.{i}.{ours}"] = names
        return found
    return modules


GATED = {"mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"), "mlp.c_proj": ("mlp.down_proj",)}
PLAIN = {"mlp.c_fc": ("mlp.up_proj",), "mlp.c_proj": ("mlp.down_proj",)}
STARCODER = {"mlp.c_fc": ("mlp.c_fc",), "mlp.c_proj": ("mlp.c_proj",)}
EXPERTS = {
    "mlp.router": ("mlp.gate",),
    "mlp.c_fc.weight": ("mlp.experts.gate_up_proj",),
    "mlp.c_proj.weight": ("mlp.experts.down_proj",),
}
# GLM also has shared experts, and the biases by which --balance bias chooses experts.
GLM_EXPERTS = EXPERTS | {
    "mlp.bias": ("mlp.gate.e_score_correction_bias",),
    "mlp.shared.c_fc": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "mlp.shared.c_proj": ("mlp.shared_experts.down_proj",),
}


def head_dim(c: Any) -> int:
    return c.n_embd // c.n_head


def llama(c: Any, hidden: int) -> dict[str, Any]:  # and Arcee
    return dict(rms_norm_eps=1e-5, head_dim=head_dim(c), attention_bias=c.bias, mlp_bias=c.bias)


def qwen(c: Any, hidden: int) -> dict[str, Any]:
    return dict(rms_norm_eps=1e-5, head_dim=head_dim(c), attention_bias=False,
                use_sliding_window=False)


def starcoder(c: Any, hidden: int) -> dict[str, Any]:
    return dict(norm_epsilon=1e-5, use_bias=c.bias, sliding_window=None)


def stablelm(c: Any, hidden: int) -> dict[str, Any]:
    return dict(layer_norm_eps=1e-5, use_qkv_bias=False, qk_layernorm=False,
                use_parallel_residual=False)


def glm(c: Any, hidden: int) -> dict[str, Any]:
    return dict(
        rms_norm_eps=1e-5,
        head_dim=head_dim(c),
        attention_bias=False,
        use_qk_norm=c.qk_norm,
        first_k_dense_replace=0,
        n_routed_experts=c.n_experts,
        num_experts_per_tok=c.n_active,
        n_shared_experts=c.n_shared,
        moe_intermediate_size=hidden,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        num_nextn_predict_layers=0,
    )


def glm_fields(theirs: Any) -> dict[str, Any]:
    return dict(
        n_experts=theirs.n_routed_experts,
        n_active=theirs.num_experts_per_tok,
        n_shared=theirs.n_shared_experts,
        expert_width=theirs.moe_intermediate_size,
        qk_norm=theirs.use_qk_norm,
    )


def mixtral(c: Any, hidden: int) -> dict[str, Any]:
    return dict(rms_norm_eps=1e-5, head_dim=head_dim(c), num_local_experts=c.n_experts,
                num_experts_per_tok=c.n_active, sliding_window=None)


def mixtral_fields(theirs: Any) -> dict[str, Any]:
    return dict(n_experts=theirs.num_local_experts, n_active=theirs.num_experts_per_tok,
                expert_width=theirs.intermediate_size)


def qwen_moe(c: Any, hidden: int) -> dict[str, Any]:
    return qwen(c, hidden) | dict(
        decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, num_experts=c.n_experts,
        num_experts_per_tok=c.n_active, moe_intermediate_size=hidden)


def qwen_moe_fields(theirs: Any) -> dict[str, Any]:
    return dict(n_experts=theirs.num_experts, n_active=theirs.num_experts_per_tok,
                expert_width=theirs.moe_intermediate_size)


TWO_MATRICES = dict(mlp=("gelu", "relu2"))
# with rotary positions, the post-embedding norm depends on the token only
ROPE = dict(pos=("rope",), emb_norm=(False, True))
RMS = ROPE | dict(norm=("rmsnorm",))
MOE = RMS | dict(mlp=("swiglu",), bias=(False,), n_experts=range(2, 257))
SOFTMAX_MOE = MOE | dict(router=("softmax",), balance=("loss",))
FAMILIES = {
    "GPT2LMHeadModel": Family(TWO_MATRICES, gpt2_config, gpt2_modules),
    "LlamaForCausalLM": Family(
        RMS | dict(mlp=("swiglu",)), llama_config(llama), llama_modules(GATED)),
    "Qwen3ForCausalLM": Family(
        RMS | dict(mlp=("swiglu",), qk_norm=(True,), bias=(False,)),
        llama_config(qwen), llama_modules(GATED)),
    "ArceeForCausalLM": Family(RMS | TWO_MATRICES, llama_config(llama), llama_modules(PLAIN)),
    "Starcoder2ForCausalLM": Family(
        ROPE | TWO_MATRICES, llama_config(starcoder), llama_modules(STARCODER)),
    "StableLmForCausalLM": Family(
        ROPE | dict(mlp=("swiglu",), bias=(False,)), llama_config(stablelm), llama_modules(GATED)),
    "Glm4MoeForCausalLM": Family(
        MOE | dict(qk_norm=(False, True), balance=("bias", "loss"), n_shared=range(257)),
        llama_config(glm), llama_modules(GLM_EXPERTS), glm_fields),
    "MixtralForCausalLM": Family(
        SOFTMAX_MOE, llama_config(mixtral), llama_modules(EXPERTS), mixtral_fields),
    "Qwen3MoeForCausalLM": Family(
        SOFTMAX_MOE | dict(qk_norm=(True,)),
        llama_config(qwen_moe), llama_modules(EXPERTS), qwen_moe_fields),
}
CUSTOM = "ModernGPTForCausalLM"  # of lib/modeling_modern_gpt.py, for every other model
# GPT2LMHeadModel stores these Linear weights transposed.
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def unsupported(c: Any, family: Family) -> list[str]:
    """The flags of a GPTConfig that a Family does not support, as on the command line."""
    flags = []
    for field in dataclasses.fields(c):
        name = field.name
        if name in family.allowed:
            allowed = family.allowed[name]
        elif name in FREE:
            continue
        else:
            allowed = (field.default,)
        value = getattr(c, name)
        if value in allowed:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags.append(f"--{name} {value}")
    return flags


def nearest_family(c: Any) -> tuple[str, list[str]]:
    """GPTConfig -> the name of the class that comes closest, and the flags that it lacks."""
    lacking = {name: unsupported(c, family) for name, family in FAMILIES.items()}
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    return nearest, lacking[nearest]


def find_family(c: Any) -> str:
    """GPTConfig -> the name of a class of transformers that computes it. Raises BadInput if there
    is none, naming the unsupported flags."""
    nearest, lacking = nearest_family(c)
    if lacking:
        raise BadInput("no class of transformers computes this model; the nearest, "
                       f"{nearest}, lacks {', '.join(lacking)}: train without")
    return nearest


def export_class(c: Any) -> str:
    """GPTConfig -> the name of the class that its export has: one of transformers if any computes
    it, else CUSTOM."""
    nearest, lacking = nearest_family(c)
    return CUSTOM if lacking else nearest


def tensor_names(modules: Modules, state: dict) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules and single tensors, ours -> theirs, as (ours, theirs) of the tensors in our state
    dict."""
    for ours, theirs in modules.items():
        if ours in state:
            yield ours, theirs
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in state:
                yield f"{ours}.{kind}", tuple(f"{module}.{kind}" for module in theirs)


def is_transposed(family: Family, name: str) -> bool:
    return family.config is gpt2_config and name.endswith(CONV1D)


def library() -> Any:
    """The package transformers. Raises BadInput if it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise BadInput("Hugging Face formats need transformers: pip install -r requirements-dev.txt"
                       ) from error
    return transformers


# --------------------------------------------------------------------------------------------------
# Writing


@torch.no_grad()
def convert(model: Any, **config: Any) -> Any:
    """A GPT -> the transformers model that computes the same, in fp32, sharing weights where
    possible.

    The rows that pad the vocabulary are cut off. config: more fields of its configuration.
    """
    c = model.config
    state = model.state_dict()
    for key in ("transformer.wte.weight", "lm_head.weight"):
        state[key] = state[key][:c.vocab_size]
    hidden = state["transformer.h.0.mlp.c_proj.weight"].size(-1)
    if export_class(c) == CUSTOM:
        hf = custom(c, hidden, **config)
        hf.load_state_dict(state)
        return hf.eval()
    return convert_to_stock(model, state, hidden, config)


def convert_to_stock(model: Any, state: dict[str, torch.Tensor], hidden: int,
                     config: dict[str, Any]) -> Any:
    """The part of `convert` for a class of transformers. Raises BadInput like find_family.

    state: the GPT's, without the padding of the vocabulary. hidden: units of the MLP or of an
    expert. A post-embedding norm is applied to the embedding table, which is then no longer tied to
    the head.
    """
    c = model.config
    name = find_family(c)
    family = FAMILIES[name]
    state["transformer.wte.weight"] = model.transformer.emb_norm(state["transformer.wte.weight"])
    weights: dict[str, torch.Tensor] = {}
    for key, names in tensor_names(family.modules(c), state):
        value = state[key].t() if is_transposed(family, key) else state[key]
        weights |= dict(zip(names, value.chunk(len(names)), strict=True))

    cls = getattr(library(), name)
    tied = c.tie_embeddings and not c.emb_norm
    hf_config = cls.config_class(**family.config(c, hidden), vocab_size=c.vocab_size,
                                 tie_word_embeddings=tied, **config)
    hf = cls(hf_config).eval()
    for key, value in hf.state_dict().items():
        if key not in weights:
            # biases that some classes always have, and shared experts of width 0
            assert key.endswith(".bias") or not value.numel(), key
            weights[key] = torch.zeros_like(value)
    hf.load_state_dict(weights)
    return hf


def custom(c: Any, hidden: int, **config: Any) -> Any:
    """A ModernGPTForCausalLM of a GPTConfig, with initial weights.

    Its save_pretrained also writes its modeling file, and names it in config.json.
    """
    modeling = custom_module()
    fields = {name: getattr(c, name) for name in CUSTOM_FIELDS}
    hf_config = modeling.ModernGPTConfig(
        **fields, intermediate_size=hidden, tie_word_embeddings=c.tie_embeddings, **config)
    return modeling.ModernGPTForCausalLM(hf_config)


def custom_module() -> Any:
    """The module lib.modeling_modern_gpt. Raises BadInput without transformers."""
    library()
    from lib import modeling_modern_gpt as modeling

    # so that save_pretrained copies the module
    modeling.ModernGPTConfig.register_for_auto_class()
    modeling.ModernGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    return modeling


@dataclasses.dataclass(frozen=True)
class Extras:
    """What an export holds besides a model and its tokenizer."""
    chat_template: str | None = None  # of a chat model, whose turns end in the reserved <|end|>
    card: str | None = None           # the model card, README.md


def write(model: Any, tokenizer: Tokenizer, folder: str | Path,
          dtype: torch.dtype = torch.float32, extras: Extras | None = None) -> None:
    """Write a GPT and its Tokenizer as a folder that transformers loads: weights, config.json,
    tokenizer, generation settings and, for a model that no class of transformers computes, its
    modeling file. All files appear, or none.

    Raises BadInput if the tokenizer does not fit the model, or the folder is not empty or cannot be
    written.
    """
    extras = extras or Extras()
    folder = Path(folder)
    remedy = "name another folder"
    check_tokenizer(model.config.vocab_size, tokenizer, extras.chat_template)
    if os.path.lexists(folder):
        is_empty = folder.is_dir() and not any(folder.iterdir())
        if not is_empty:
            raise BadInput(f"{folder} exists and is not an empty folder: {remedy}")
    hf = convert(model, bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
    # not the biases that choose experts: they are buffers, which transformers keeps in fp32, too
    for p in hf.parameters():
        p.data = p.data.to(dtype)
    hf.config.dtype = dtype
    size = sum(p.numel() * p.element_size() for p in hf.parameters())
    hf.generation_config = generation_config(tokenizer, bool(extras.chat_template))
    from safetensors import SafetensorError

    prefix = f"{folder.name[:100]}."
    with new_folder(folder.parent, remedy):
        check_room(folder.parent, size, "the export", "free some disk space")
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as temporary:
                partial = Path(temporary, "export")  # readable by others, unlike `temporary`
                partial.mkdir()
                hf.save_pretrained(partial)
                write_tokenizer(tokenizer, partial, model.config.block_size, extras.chat_template)
                if extras.card:
                    (partial / "README.md").write_text(extras.card, encoding="utf-8")
                move_folder(partial, folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"cannot write {folder} ({reason}): free some disk space, or {remedy}"
                           ) from error


def check_tokenizer(n_ids: int, tokenizer: Tokenizer, chat_template: str | None) -> None:
    """Raises BadInput if a model with logits for `n_ids` ids cannot use the tokenizer."""
    tokenizer.require_text("an export, which includes the tokenizer,")
    needed = tokenizer.vocab_size
    if chat_template:
        needed = max(tokenizer.reserved.values()) + 1
    if needed > n_ids:
        raise BadInput(f"the tokenizer has {needed:,} ids and the model {n_ids:,}: "
                       "export the model with the tokenizer it was trained with")


def generation_config(tokenizer: Tokenizer, can_chat: bool) -> Any:
    """The defaults of transformers' `generate`: this project's sampling."""
    from transformers import GenerationConfig

    ends = [tokenizer.eot, tokenizer.reserved[END]] if can_chat else tokenizer.eot
    return GenerationConfig(bos_token_id=tokenizer.eot, eos_token_id=ends,
                            pad_token_id=tokenizer.eot, do_sample=True, temperature=1.0, top_k=50)


def move_folder(source: Path, folder: Path) -> None:
    """Rename an export to its folder, which may exist if it is empty.

    If the folder is a link or a mount point, its files are moved, config.json last, which makes the
    folder a model.
    """
    mode = (source / "config.json").stat().st_mode
    for path in source.iterdir():
        path.chmod(mode)  # safetensors writes files that only their owner may read
    if folder.is_symlink() or folder.is_mount():
        for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
            shutil.move(path, folder / path.name)
        return
    if folder.exists():
        folder.rmdir()
    os.replace(source, folder)


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path, length: int,
                    chat_template: str | None = None) -> None:
    """Write a Tokenizer so that transformers' encodes to the same ids; <|endoftext|> in a text is
    plain text, as here.

    With a chat template it is not: transformers renders a conversation to one string before
    encoding, so control tokens count wherever they appear. Its split_special_tokens=True, and
    sanitize_control_tokens=True in apply_chat_template, keep typed ones as text.
    """
    text = tokenizer.to_json(chat=bool(chat_template))
    replace(Path(folder, "tokenizer.json"), lambda file: file.write(text.encode()))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not chat_template,
        "bos_token": EOT,
        "eos_token": EOT,
        "pad_token": EOT,
        "unk_token": EOT,
    }
    if chat_template:
        settings["chat_template"] = chat_template
    write_json(Path(folder, "tokenizer_config.json"), settings)


# --------------------------------------------------------------------------------------------------
# Reading


def load(name: str | Path) -> tuple[Any, list[str]]:
    """A name on the hub or a folder -> (transformers' model in fp32, names of its missing weights;
    for a folder of CUSTOM, also of weights that it does not use).

    Never runs code that the folder contains. Raises BadInput.
    """
    cls = library().AutoModelForCausalLM
    is_folder = os.path.isdir(name)
    if not is_folder:
        cache_only_without_network()
    elif is_custom(name):
        cls = custom_module().ModernGPTForCausalLM
    try:
        hf, report = cls.from_pretrained(name, dtype=torch.float32, output_loading_info=True,
                                         trust_remote_code=False)
    except Exception as error:  # anything that the hub and transformers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "load it once where the hub can be reached, or name a folder or a ckpt_<step>.pt"
        if is_folder:
            remedy = "name another folder"
        raise BadInput(f"cannot load the Hugging Face model {name}: {reason}; {remedy}") from error
    wrong = set(report["missing_keys"])
    if type(hf).__name__ == CUSTOM:
        wrong |= set(report["unexpected_keys"])
    return hf.eval(), sorted(wrong)


def load_with_its_code(folder: str | Path) -> Any:
    """A folder written by `write` -> transformers' model in fp32, as trust_remote_code loads it.

    Runs the code in the folder.
    """
    cls = library().AutoModelForCausalLM
    if is_custom(folder):  # not through AutoModelForCausalLM, which may know this project's class
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        settings = read_json(Path(folder, "config.json"), "name another folder")
        reference = settings["auto_map"]["AutoModelForCausalLM"]
        cls = get_class_from_dynamic_module(reference, str(folder))
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


def is_custom(folder: str | Path) -> bool:
    """Whether a folder holds a model of lib/modeling_modern_gpt.py."""
    path = Path(folder, "config.json")
    settings = read_json(path, "name another folder") if path.exists() else {}
    return isinstance(settings, dict) and settings.get("architectures") == [CUSTOM]


def register_custom() -> None:
    """Make transformers' Auto classes load folders of CUSTOM with this project's class, so that
    they need not run the code in the folder."""
    transformers = library()
    modeling = custom_module()
    config = modeling.ModernGPTConfig
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoModelForCausalLM.register(config, modeling.ModernGPTForCausalLM, exist_ok=True)


def read(name: str | Path, build: Callable) -> Any:
    """A model that transformers loads -> a GPT that computes the same.

    name: "gpt2", ..., "gpt2-xl", or a folder written by `write` or save_pretrained. build: fields
    of GPTConfig -> GPT. Raises BadInput if it cannot be loaded, or a GPT would not compute the
    same.
    """
    hf, missing = load(name)
    if type(hf).__name__ == CUSTOM:
        return read_custom(name, hf, missing, build)
    family = FAMILIES.get(type(hf).__name__)
    if family is None:
        raise BadInput(f"{name} is a {type(hf).__name__}: name one of {', '.join(FAMILIES)}")
    state = hf.state_dict()
    model = build(**config_fields(hf.config, family, state))
    hidden = model.transformer.h[0].mlp.c_proj.weight.size(-1)
    # transformers only warns about missing weights, and its variants compute something else
    different = missing or differences(hf.config, family.config(model.config, hidden))
    check_same(name, different)
    weights = model.state_dict()
    for key, names in tensor_names(family.modules(model.config), weights):
        rows = len(weights[key]) // len(names)
        absent = weights[key].new_zeros(rows)  # for a bias that theirs lacks
        value = torch.cat([state.get(name, absent) for name in names])
        weights[key] = value.t() if is_transposed(family, key) else value
    model.load_state_dict(weights)
    return model


def read_custom(name: str | Path, hf: Any, missing: list[str], build: Callable) -> Any:
    """`read` for a model of lib/modeling_modern_gpt.py."""
    fields = {field: getattr(hf.config, field) for field in CUSTOM_FIELDS}
    if fields["n_experts"]:
        fields["expert_width"] = hf.config.intermediate_size
    model = build(**fields, vocab_multiple=1, tie_embeddings=hf.config.tie_word_embeddings)
    weights = hf.state_dict()
    expected = model.state_dict()
    different = list(missing)
    for key in expected.keys() | weights.keys():
        if key not in weights or key not in expected or weights[key].shape != expected[key].shape:
            different.append(key)
    check_same(name, sorted(different))
    model.load_state_dict(weights)
    return model


def check_same(name: str | Path, different: list[str]) -> None:
    """Raises BadInput, naming what differs, unless nothing does."""
    if different:
        raise BadInput(f"{name} is not a model that this project computes: see its "
                       f"{', '.join(different[:4])}")


def config_fields(theirs: Any, family: Family, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A configuration of transformers and the weights -> fields of GPTConfig."""
    fields = {field: values[0] for field, values in family.allowed.items()}
    fields |= family.fields(theirs)
    activation = getattr(theirs, "activation_function", None) or theirs.hidden_act
    for mlp in family.allowed["mlp"]:
        if ACTIVATIONS[mlp] == activation:
            fields["mlp"] = mlp
            break
    bias = any(getattr(theirs, key, False) for key in ("attention_bias", "mlp_bias", "use_bias"))
    # some classes always have biases: unused ones are 0
    bias = bias or any(key.endswith(".bias") and bool(value.any()) for key, value in state.items())
    return fields | dict(
        block_size=theirs.max_position_embeddings,
        n_layer=theirs.num_hidden_layers,
        n_head=theirs.num_attention_heads,
        n_embd=theirs.hidden_size,
        vocab_size=theirs.vocab_size,
        vocab_multiple=1,  # no padding: its rows would be untrained but count in the loss
        tie_embeddings=theirs.tie_word_embeddings,
        bias=bias,
    )


def differences(theirs: Any, expected: dict[str, Any]) -> list[str]:
    """The keys of a configuration of transformers whose values are not the expected ones."""
    keys = []
    for key, value in expected.items():
        is_dropout = key.endswith("pdrop")
        if hasattr(theirs, key) and not is_dropout and not has_value(theirs, key, value):
            keys.append(key)
    return keys


def has_value(config: Any, key: str, value: Any) -> bool:
    """Whether a configuration of transformers has this value, written out or as its default."""
    found = getattr(config, key, None)
    if isinstance(value, dict):  # rope_parameters, 1.0 by default
        return all((found or {}).get(name, 1.0) == part for name, part in value.items())
    if key == "n_inner" and found is None:
        return value == 4 * config.n_embd
    return found == value


def read_tokenizer(name: str) -> tuple:
    """-> (the Tokenizer of a model that `read` loads, its chat template or None). Raises BadInput.
    """
    if not os.path.isdir(name):
        return load_tokenizer("gpt2"), None
    file = Path(name, "tokenizer.json")
    if not file.exists():
        raise BadInput(f"{name} has no tokenizer.json: save the model's tokenizer there, too")
    path = Path(name, "tokenizer_config.json")
    settings = read_json(path, "name another folder") if path.exists() else {}
    template = None
    if isinstance(settings, dict) and isinstance(settings.get("chat_template"), str):
        template = settings["chat_template"]
    return load_tokenizer(str(file)), template


# --------------------------------------------------------------------------------------------------
# The hub


def cache_only_without_network(seconds: float = 4.0) -> None:
    """If the hub cannot be reached, make its libraries use only their cache: they would retry for
    half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return  # it answers, and the libraries have their own certificates
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
