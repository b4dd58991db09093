"""Hugging Face: our models as transformers' classes compute them, written and read as its folders;
its hub without a network."""

import dataclasses
import http.client
import os
import ssl
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch

from lib.cli import BadInput
from lib.files import check_room, make_folder, read_json, replace, write_json
from lib.tokenizers import END, EOT, load_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# Which class computes which of our models. Parameters go by module: ours -> theirs,
# several where we have fused them into one matrix

ACTIVATIONS = {"gelu": "gelu_new", "relu2": "relu2", "swiglu": "silu"}
FREE = {
    "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "vocab_multiple", "bias",
    "tie_embeddings", "dropout", "init", "n_active", "expert_width", "router_z_loss"
}


class Family(NamedTuple):
    """A class of transformers. fits: the values of GPTConfig's fields that it computes, where not
    the default alone; the fields in FREE may have any. config: (GPTConfig, hidden units of the MLP
    or an expert) -> its configuration. modules: GPTConfig -> {ours: theirs}, by layer; where ours
    is a single tensor, theirs is one. fields: a configuration of its -> those of GPTConfig that
    only this one says."""
    fits: dict
    config: object
    modules: object
    fields: object = lambda theirs: {}


def _gpt2(c, hidden):
    return dict(
        n_positions=c.block_size,
        n_ctx=c.block_size,  # twice: llama.cpp's converter reads the name OpenAI's file has
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_inner=hidden,
        activation_function=ACTIVATIONS[c.mlp],
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout))


def _gpt2_modules(c):
    layer = ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    return {
        name: (name,)
        for name in ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head",
                     *(f"transformer.h.{i}.{name}" for i in range(c.n_layer) for name in layer))
    }


def _llama(**more):
    """The configuration of a class that descends from Llama. more: what is its own, values or
    functions of the GPTConfig."""
    def config(c, hidden):
        c = dataclasses.replace(c, expert_width=hidden)
        return dict(
            hidden_size=c.n_embd, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
            num_key_value_heads=c.n_head, intermediate_size=hidden, hidden_act=ACTIVATIONS[c.mlp],
            max_position_embeddings=c.block_size, rope_parameters={
                "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0
            }, **{key: value(c) if callable(value) else value for key, value in more.items()})
    return config


def _llama_modules(*mlp, experts=None):
    """mlp: its names of the matrices in our c_fc, and of that in our c_proj. experts: those of ours
    and theirs in its place."""
    feed_forward = experts or {
        "mlp.c_fc": tuple(f"mlp.{name}" for name in mlp[:-1]), "mlp.c_proj": (f"mlp.{mlp[-1]}",)
    }

    def modules(c):
        layer = {
            "ln_1": ("input_layernorm",), "ln_2": ("post_attention_layernorm",),
            "attn.c_attn": tuple(f"self_attn.{name}_proj" for name in "qkv"),
            "attn.c_proj": ("self_attn.o_proj",), "attn.q_norm": ("self_attn.q_norm",),
            "attn.k_norm": ("self_attn.k_norm",), **feed_forward
        }
        modules = {
            "transformer.wte": ("model.embed_tokens",),
            "transformer.ln_f": ("model.norm",),
            "lm_head": ("lm_head",),
        }
        for i in range(c.n_layer):
            for ours, theirs in layer.items():
                modules[f"transformer.h.{i}.{ours}"] = tuple(
                    f"model.layers.{i}.{name}" for name in theirs)
        return modules
    return modules


def _head_dim(c):
    return c.n_embd // c.n_head


def _bias(c):
    return c.bias


# rotary positions leave the post-embedding norm a function of the token alone
ROPE = dict(pos=("rope",), emb_norm=(False, True))
EXPERTS = ROPE | dict(norm=("rmsnorm",), mlp=("swiglu",), bias=(False,), n_experts=range(2, 257))
SORTED = {"mlp.router": ("mlp.gate",), "mlp.c_fc.weight": ("mlp.experts.gate_up_proj",),
          "mlp.c_proj.weight": ("mlp.experts.down_proj",)}
RMS, TWO_MATRICES = ROPE | dict(norm=("rmsnorm",)), dict(mlp=("gelu", "relu2"))
FAMILIES = {
    "GPT2LMHeadModel": Family(TWO_MATRICES, _gpt2, _gpt2_modules),
    "LlamaForCausalLM": Family(
        RMS | dict(mlp=("swiglu",)),
        _llama(rms_norm_eps=1e-5, head_dim=_head_dim, attention_bias=_bias, mlp_bias=_bias),
        _llama_modules("gate_proj", "up_proj", "down_proj")),
    "Qwen3ForCausalLM": Family(
        RMS | dict(mlp=("swiglu",), qk_norm=(True,), bias=(False,)),
        _llama(rms_norm_eps=1e-5, head_dim=_head_dim, attention_bias=False,
               use_sliding_window=False), _llama_modules("gate_proj", "up_proj", "down_proj")),
    "ArceeForCausalLM": Family(
        RMS | TWO_MATRICES,
        _llama(rms_norm_eps=1e-5, head_dim=_head_dim, attention_bias=_bias, mlp_bias=_bias),
        _llama_modules("up_proj", "down_proj")),
    "Starcoder2ForCausalLM": Family(ROPE | TWO_MATRICES,
                                    _llama(norm_epsilon=1e-5, use_bias=_bias, sliding_window=None),
                                    _llama_modules("c_fc", "c_proj")),
    "StableLmForCausalLM": Family(
        ROPE | dict(mlp=("swiglu",), bias=(False,)),
        _llama(layer_norm_eps=1e-5, use_qkv_bias=False, qk_layernorm=False,
               use_parallel_residual=False), _llama_modules("gate_proj", "up_proj", "down_proj")),
    # Mixture of Experts: the biases by which ours picks experts, those of --balance bias, are
    # GLM's; the others have none
    "Glm4MoeForCausalLM": Family(
        EXPERTS | dict(qk_norm=(False, True), balance=("bias", "loss"), n_shared=range(257)),
        _llama(rms_norm_eps=1e-5, head_dim=_head_dim, attention_bias=False,
               use_qk_norm=lambda c: c.qk_norm, first_k_dense_replace=0,
               n_routed_experts=lambda c: c.n_experts, num_experts_per_tok=lambda c: c.n_active,
               n_shared_experts=lambda c: c.n_shared,
               moe_intermediate_size=lambda c: c.expert_width, n_group=1, topk_group=1,
               norm_topk_prob=True, routed_scaling_factor=1.0, num_nextn_predict_layers=0),
        _llama_modules(
            experts=SORTED | {
                "mlp.bias": ("mlp.gate.e_score_correction_bias",), "mlp.shared.c_fc": (
                    "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"
                ), "mlp.shared.c_proj": ("mlp.shared_experts.down_proj",)
            }),
        lambda theirs: dict(n_experts=theirs.n_routed_experts, n_active=theirs.num_experts_per_tok,
                            n_shared=theirs.n_shared_experts, expert_width=theirs.
                            moe_intermediate_size, qk_norm=theirs.use_qk_norm)),
    "MixtralForCausalLM": Family(
        EXPERTS | dict(router=("softmax",), balance=("loss",)),
        _llama(rms_norm_eps=1e-5, head_dim=_head_dim, num_local_experts=lambda c: c.n_experts,
               num_experts_per_tok=lambda c: c.n_active, sliding_window=None),
        _llama_modules(experts=SORTED),
        lambda theirs: dict(n_experts=theirs.num_local_experts, n_active=theirs.num_experts_per_tok,
                            expert_width=theirs.intermediate_size)),
    "Qwen3MoeForCausalLM": Family(
        EXPERTS | dict(router=("softmax",), balance=("loss",), qk_norm=(True,)),
        _llama(rms_norm_eps=1e-5, head_dim=_head_dim, attention_bias=False,
               use_sliding_window=False, decoder_sparse_step=1, mlp_only_layers=[],
               norm_topk_prob=True, num_experts=lambda c: c.n_experts,
               num_experts_per_tok=lambda c: c.n_active,
               moe_intermediate_size=lambda c: c.expert_width), _llama_modules(experts=SORTED),
        lambda theirs: dict(n_experts=theirs.num_experts, n_active=theirs.num_experts_per_tok,
                            expert_width=theirs.moe_intermediate_size)),
}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight"
          )  # GPT2LMHeadModel's hold the transpose of a Linear's weight


def misfits(c, family):
    """The flags of a GPTConfig, as given, that a Family does not compute."""
    allowed = {
        field.name: (field.default,) for field in dataclasses.fields(c) if field.name not in FREE
    } | family.fits
    return [
        f"--{'' if value is not False else 'no-'}{name}" +
        (f" {value}" if not isinstance(value, bool) else "")
        for name in allowed
        if (value := getattr(c, name)) not in allowed[name]
    ]


def find_family(c):
    """GPTConfig -> the name of the class that computes it. Raises BadInput if none does, naming the
    flags in the way."""
    wrong = {name: misfits(c, family) for name, family in FAMILIES.items()}
    name = min(wrong, key=lambda name: len(wrong[name]))
    if wrong[name]:
        raise BadInput(f"this model cannot be exported: no class of transformers computes it; the nearest, {name}, lacks "
                       f"{', '.join(wrong[name])}: train without")
    return name


def tensors(modules, state):
    """{ours: theirs} of modules and single tensors -> (ours, theirs) of tensors, those that a state
    dict of ours has."""
    for ours, theirs in modules.items():
        if ours in state:
            yield ours, theirs
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in state:
                yield f"{ours}.{kind}", tuple(f"{module}.{kind}" for module in theirs)


def library():
    """The package transformers. Raises BadInput if it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise BadInput(
            "Hugging Face's formats need transformers: pip install -r requirements-dev.txt"
        ) from error
    return transformers


# ----------------------------------------------------------------------------------------------------------------------
# Writing


@torch.no_grad()
def convert(model, **config):
    """A GPT -> the model of transformers that computes the same, in fp32, its weights shared where
    they can be.

    The rows that pad the vocabulary are cut off. A post-embedding norm is applied to the embedding
    table, which it then no longer shares with the head. config: what else goes into its
    configuration. Raises BadInput, as find_family does.
    """
    name, c, state = find_family(model.config), model.config, model.state_dict()
    family, theirs = FAMILIES[name], {}
    state |= {
        key: state[key][:c.vocab_size] for key in ("transformer.wte.weight", "lm_head.weight")
    }
    state["transformer.wte.weight"] = model.transformer.emb_norm(state["transformer.wte.weight"])
    for key, names in tensors(family.modules(c), state):
        value = state[key].t() if family.config is _gpt2 and key.endswith(CONV1D) else state[key]
        theirs |= dict(zip(names, value.chunk(len(names)), strict=True))
    cls, hidden = getattr(library(), name), state["transformer.h.0.mlp.c_proj.weight"].size(-1)
    hf = cls(
        cls.config_class(**family.config(c, hidden), vocab_size=c.vocab_size,
                         tie_word_embeddings=c.tie_embeddings and not c.emb_norm, **config)).eval()
    absent = {
        key: torch.zeros_like(value) for key, value in hf.state_dict().items() if key not in theirs
    }
    # some are never without
    assert all(key.endswith(".bias") or not value.numel()
               for key, value in absent.items()), absent.keys()
    hf.load_state_dict(theirs | absent)
    return hf


def write(model, tokenizer, folder, dtype=torch.float32, chat_template=None):
    """Write a GPT and its Tokenizer as a folder that transformers loads: weights, config.json,
    tokenizer, generation settings.

    chat_template: that of a chat model, whose turns end in the reserved <|end|>.
    Whole or not at all. Raises BadInput if the model cannot be exported, or the folder is not empty
    or cannot be written.
    """
    folder, remedy = Path(folder), "name another folder"
    find_family(model.config)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInput(f"{folder} exists and is not an empty folder: {remedy}")
    make_folder(folder.parent, remedy)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot)
    hf = convert(model, **ids)
    for p in hf.parameters(
    ):  # not the biases that pick experts, buffers, which transformers keeps in fp32, too
        p.data = p.data.to(dtype)
    hf.config.dtype = dtype
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    ends = {"eos_token_id": [tokenizer.eot, tokenizer.reserved[END]]} if chat_template else {}
    hf.generation_config = GenerationConfig(**ids | ends, pad_token_id=tokenizer.eot,
                                            do_sample=True, temperature=1.0, top_k=50)
    check_room(folder.parent, sum(p.numel() * p.element_size() for p in hf.parameters()),
               "the export", "free some disk space")
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent,
                                         prefix=f"{folder.name[:100]}.") as partial:
            hf.save_pretrained(partial)
            write_tokenizer(tokenizer, partial, model.config.block_size, chat_template)
            folder.mkdir(exist_ok=True)
            mode = os.stat(Path(
                partial,
                "config.json")).st_mode  # safetensors writes files that their owner alone may read
            for path in sorted(
                    Path(partial).iterdir(), key=lambda path: path.name == "config.json"
            ):  # which makes it a model: the last
                path.chmod(mode)
                os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {folder} ({getattr(error, 'strerror', None) or error}): "
                       f"free some disk space, or {remedy}") from error


def write_tokenizer(tokenizer, folder, length, chat_template=None):
    """Write a Tokenizer so that transformers' gives the same ids; as here, <|endoftext|> written
    out in a text is plain text.

    Not so with a chat template: transformers makes one string of a conversation before it looks for
    ids, so that control tokens count wherever they stand. Its split_special_tokens=True, and in
    apply_chat_template sanitize_control_tokens=True, leave what was typed as text.
    """
    replace(Path(folder, "tokenizer.json"),
            lambda file: file.write(tokenizer.to_json(chat=bool(chat_template)).encode()))
    write_json(
        Path(folder, "tokenizer_config.json"), {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length,
            "clean_up_tokenization_spaces": False, "split_special_tokens": not chat_template,
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), EOT),
            **({"chat_template": chat_template} if chat_template else {})
        })


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def load(name):
    """A name on the hub or a folder -> transformers' model in fp32, and what it could not find in
    it. Raises BadInput."""
    auto = library().AutoModelForCausalLM
    if not os.path.isdir(name):
        cache_only_without_network()
    try:
        hf, report = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # whatever the hub and the readers of its formats raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "load it once where the hub can be reached, or name a folder or a ckpt_<step>.pt"
        if os.path.isdir(name):
            remedy = "name another folder"
        raise BadInput(f"cannot load the Hugging Face model {name}: {reason}; {remedy}") from error
    return hf.eval(), sorted(report["missing_keys"])


def read(name, build):
    """A model that transformers loads -> a GPT that computes the same.

    name: "gpt2", ..., "gpt2-xl", or a folder that `write` or save_pretrained made. build: fields of
    GPTConfig -> GPT. Raises BadInput if it cannot be loaded, or computes something else than a GPT
    would.
    """
    hf, odd = load(name)
    theirs, family, state = hf.config, FAMILIES.get(type(hf).__name__), hf.state_dict()
    if family is None:
        raise BadInput(f"{name} is a {type(hf).__name__}: name one of {', '.join(FAMILIES)}")
    activation = getattr(theirs, "activation_function", None) or theirs.hidden_act
    # some classes always have them: unused, they are 0
    bias = any(getattr(theirs, name, False) for name in ("attention_bias", "mlp_bias", "use_bias"))
    bias = bias or any(key.endswith(".bias") and bool(value.any()) for key, value in state.items())
    model = build(**{field: values[0] for field, values in family.fits.items()}
                  | family.fields(theirs) | dict(
                      mlp=next((mlp for mlp in family.fits["mlp"]
                                if ACTIVATIONS[mlp] == activation), family.fits["mlp"][0]),
                      block_size=theirs.max_position_embeddings,
                      n_layer=theirs.num_hidden_layers,
                      n_head=theirs.num_attention_heads,
                      n_embd=theirs.hidden_size,
                      # no padding: its rows would be untrained weights, and take part in the loss
                      vocab_size=theirs.vocab_size,
                      vocab_multiple=1,
                      tie_embeddings=theirs.tie_word_embeddings,
                      bias=bias))
    # transformers only warns of another architecture's weights, and its variants compute something
    # else
    want = family.config(model.config, model.transformer.h[0].mlp.c_proj.weight.size(-1))
    odd = odd or [
        key for key, value in want.items()
        if hasattr(theirs, key) and not key.endswith("pdrop") and not _is(theirs, key, value)
    ]
    if odd:
        raise BadInput(
            f"{name} computes something else than this project's models: see its {', '.join(odd[:4])}"
        )
    weights = model.state_dict()
    for key, names in tensors(family.modules(model.config), weights):
        absent = weights[key].new_zeros(len(weights[key])
                                        // len(names))  # a bias that theirs is without
        value = torch.cat([state.get(name, absent) for name in names])
        weights[key] = value.t() if family.config is _gpt2 and key.endswith(CONV1D) else value
    model.load_state_dict(weights)
    return model


def read_tokenizer(name):
    """The Tokenizer of what `read` reads, and its chat template or None. Raises BadInput."""
    if not os.path.isdir(name):
        return load_tokenizer("gpt2"), None
    file = Path(name, "tokenizer.json")
    if not file.exists():
        raise BadInput(f"{name} holds no tokenizer.json: save the model's tokenizer there, too")
    path = Path(name, "tokenizer_config.json")
    settings = read_json(path, "name another folder") if path.exists() else {}
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    return load_tokenizer(str(file)), template if isinstance(template, str) else None


def _is(config, key, value):
    """Whether a configuration of transformers has this value; None stands for what GPT-2's n_inner
    and rotary dimensions are by default."""
    found = getattr(config, key, None)
    if isinstance(value, dict):
        return all((found or {}).get(name, 1.0) == part for name, part in value.items())
    return found == value or (key == "n_inner" and found is None and value == 4 * config.n_embd)


# ----------------------------------------------------------------------------------------------------------------------
# The hub


def cache_only_without_network(seconds=4.0):
    """Where the hub cannot be reached, let its libraries use their cache alone: they would try
    again for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"),
                               timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(getattr(error, "reason", error),
                      ssl.SSLError):  # it answers: the libraries bring their own certificates
            return
        os.environ["HF_HUB_OFFLINE"] = "1"  # for a library that is not imported yet
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
