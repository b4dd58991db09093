"""Export a checkpoint to a folder that transformers loads: weights, config.json, tokenizer, model
card.

    python export_hf.py --checkpoint log/<run> --out exported
    python export_hf.py --checkpoint PATH --out exported --dtype bf16 --check
    python export_hf.py --checkpoint PATH --out weights_05000.pt --dtype bf16

    model = transformers.AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)
    model = train_gpt2.GPT.from_pretrained("exported")                       # this project's

The exported model computes the same. Its class depends on the flags used in training:
    GPT2LMHeadModel         --norm layernorm --pos learned --mlp gelu or relu2, --no-emb_norm
    LlamaForCausalLM        --norm rmsnorm   --pos rope    --mlp swiglu
    Qwen3ForCausalLM        --norm rmsnorm   --pos rope    --mlp swiglu --qk_norm --no-bias
    ArceeForCausalLM        --norm rmsnorm   --pos rope    --mlp gelu or relu2
    Starcoder2ForCausalLM   --norm layernorm --pos rope    --mlp gelu or relu2
    StableLmForCausalLM     --norm layernorm --pos rope    --mlp swiglu --no-bias
    Glm4MoeForCausalLM      --norm rmsnorm   --pos rope    --mlp swiglu --no-bias --n_experts N
                            [--n_shared N] [--qk_norm]
    MixtralForCausalLM      as Glm4Moe with --router softmax --balance loss, without --n_shared
                            and --qk_norm
    Qwen3MoeForCausalLM     as Glm4Moe with --router softmax --balance loss --qk_norm, without
                            --n_shared
    ModernGPTForCausalLM    any other flags, as in the presets speedrun and tiny
Embeddings may be tied or untied. With --pos rope, --emb_norm is supported in all classes: it is
applied to the embedding table. The last class is not part of transformers: its code is in the
folder, modeling_modern_gpt.py, and only it needs trust_remote_code.

An --out that ends in .pt is a checkpoint without optimizer, which every script of this project
takes.

The folder of a chat model has its chat template: tokenizer.apply_chat_template(messages,
add_generation_prompt=True). Add sanitize_control_tokens=True if users may type <|end|> and the
like.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import contextlib
import os
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib import checkpoint, files, huggingface
from lib.cli import BadInput, flag, parse, path_flag, run
from lib.devices import DTYPES, TORCH_NAMES, dtype_name
from lib.evals import harness
from lib.evals.export_check import check_export
from lib.model_card import in_transformers, model_card
from train_gpt2 import GPT, load_checkpoint


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    out: str | None = path_flag(None, "folder to write, new or empty; or a new .pt file")
    dtype: str = flag("fp32", "dtype of the weights", choices=lambda: DTYPES, aliases=TORCH_NAMES)
    check: bool = flag(
        False, "load the written folder and compare its tokens, logits, text and evaluation with "
               "the checkpoint's")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and warnings of transformers and torch that are irrelevant to an
    export, such as that a text is longer than the context."""
    logging = huggingface.library().utils.logging
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # GLM's shared experts, if there are none
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def write_weights(name: str, cfg: Config) -> None:
    """Write the model `name` to the file --out as a checkpoint without optimizer."""
    path = Path(cfg.out or "")
    if cfg.check:
        raise BadInput(f"--check is for a folder, and --out {path} is a file: leave it out")
    if os.path.lexists(path):
        raise BadInput(f"{path} exists: name another --out")
    model, _, state = load_checkpoint(name)
    files.make_folder(path.parent, "name another --out")
    dtype = DTYPES[cfg.dtype]
    weights = checkpoint.weights_of({**state, "model": model.state_dict()}, dtype)
    checkpoint.write(path, weights)
    gigabytes = checkpoint.n_bytes(weights) / 1e9
    print(f"{path}: {gigabytes:.2f} GB, {dtype_name(dtype)}, without optimizer")


def main(argv: list[str]) -> None:
    (cfg,), _ = parse((Config,), argv, __doc__)
    name = checkpoint.named(cfg)
    if cfg.out is None:
        raise BadInput("name --out, the folder to write")
    if cfg.out.endswith(".pt"):
        write_weights(name, cfg)
        return
    name = checkpoint.pick(name)
    model, tokenizer, state = load_checkpoint(name)
    template = state.get("chat_template")
    card = model_card(model, tokenizer, state, name, in_transformers(model.config, bool(template)),
                      harness.found_evaluations(name, state.get("step")))
    extras = huggingface.Extras(template, card)
    dtype = DTYPES[cfg.dtype]
    with quiet():
        huggingface.write(model, tokenizer, cfg.out, dtype, extras)
        print(f"{cfg.out}: {huggingface.export_class(model.config)}, {dtype_name(dtype)}")
        if cfg.check:
            for line in check_export(model, tokenizer, cfg.out, dtype, GPT.from_pretrained):
                print(f"checked: {line}")
    out = Path(cfg.out)
    print(f"upload it: hf upload {shlex.quote(out.resolve().name)} {shlex.quote(cfg.out)}")


if __name__ == "__main__":
    run(main)
