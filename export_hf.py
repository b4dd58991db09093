"""Export a checkpoint to a folder that stock transformers loads without custom code: weights,
config.json, tokenizer.

    python export_hf.py --checkpoint log/<run> --out exported
    python export_hf.py --checkpoint PATH --out exported --dtype bf16 --check
    python export_hf.py --checkpoint PATH --out weights_05000.pt --dtype bf16

    model = transformers.AutoModelForCausalLM.from_pretrained("exported")    # transformers' class
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
Embeddings may be tied or untied. With --pos rope, --emb_norm is supported, too: it is applied to
the embedding table. Other combinations are rejected. transformers has no counterpart of
--token_shift, --value_residual, --residual_scalars and --softcap, which the presets speedrun and
tiny use.

An --out that ends in .pt is a checkpoint without optimizer, which every script of this project
takes, with any flags used in training.

The folder of a chat model has its chat template: tokenizer.apply_chat_template(messages,
add_generation_prompt=True). Add sanitize_control_tokens=True if users may type <|end|> and the
like.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib import checkpoint, files, huggingface
from lib.chat_template import ROLES, render
from lib.cli import BadInput, flag, parse, path_flag, run
from lib.decoding import NonFinite
from lib.devices import DTYPES, TORCH_NAMES, dtype_name
from lib.tokenizers import Tokenizer
from train_gpt2 import GPT, load_checkpoint

TOLERANCE = 1e-4  # of logits, as a share of the largest, or of 1 if all are smaller
N_TEXTS = 200     # of random tokens, whose encodings are compared


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    out: str | None = path_flag(None, "folder to write, new or empty; or a new .pt file")
    dtype: str = flag("fp32", "dtype of the weights", choices=lambda: DTYPES, aliases=TORCH_NAMES)
    check: bool = flag(
        False, "load the written folder and compare its logits and tokens with the checkpoint's")


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


@torch.no_grad()
def check(model: GPT, tokenizer: Tokenizer, folder: str, dtype: torch.dtype,
          chat_template: str | None = None) -> None:
    """Load the folder with transformers and compare it with the checkpoint. Raises BadInput if
    logits or tokens differ."""
    from transformers import AutoTokenizer

    theirs, _ = huggingface.load(folder)
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shape = (4, min(model.config.block_size, 256))
    idx = torch.randint(tokenizer.vocab_size, shape, generator=generator)
    difference, largest = compare_logits(model, theirs, idx, dtype)
    random_ids = torch.randint(tokenizer.vocab_size, (N_TEXTS, 20), generator=generator)
    texts = [tokenizer.decode(row.tolist()) for row in random_ids]
    same = 0
    for text in texts:
        ids = their_tokenizer(text, split_special_tokens=True)["input_ids"]
        same += ids == tokenizer.encode(text).tolist()
    if chat_template:
        messages = [{"role": role, "content": text} for role, text in zip(ROLES, texts)]
        ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                  return_dict=False, sanitize_control_tokens=True)
        expected, _ = render(messages, tokenizer, reply=True)
        same -= ids != expected
    rounding = ""
    if dtype != torch.float32:
        rounding = f", beyond what rounding to {dtype_name(dtype)} changes"
    result = (f"logits up to {largest:.2f} differ by {difference:.2e} at most{rounding}; "
              f"{same} of {N_TEXTS} texts have the same tokens")
    within = difference <= TOLERANCE * max(largest, 1)  # False for NaN
    if not within or same < N_TEXTS:
        raise BadInput(f"{folder} differs from the checkpoint ({result}): do not use it, and "
                       "report this")
    print(f"checked: {result}")


def compare_logits(model: GPT, theirs: Any, idx: torch.Tensor,
                   dtype: torch.dtype) -> tuple[float, float]:
    """-> (largest difference between the logits of the model and the loaded model, largest logit).
    Raises NonFinite.

    Rounding to `dtype` may route tokens to other experts, which changes logits a lot. Two
    comparisons avoid that: the model with its conversion in fp32, and the rounded conversion with
    the loaded model.
    """
    logits = model(idx)
    if not logits.isfinite().all():
        raise NonFinite
    converted = huggingface.convert(model)
    of_conversion = logits - converted(idx).logits
    for p in converted.parameters():
        p.data = p.data.to(dtype).float()
    of_writing = converted(idx).logits - theirs(idx).logits
    difference = torch.stack((of_conversion, of_writing)).abs().max().item()
    return difference, logits.abs().max().item()


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
    model, tokenizer, state = load_checkpoint(name)
    tokenizer.require_text("an export, which includes the tokenizer,")
    chat_template = state.get("chat_template")
    dtype = DTYPES[cfg.dtype]
    with quiet():
        huggingface.write(model, tokenizer, cfg.out, dtype, chat_template)
        print(f"{cfg.out}: {huggingface.find_family(model.config)}, {dtype_name(dtype)}")
        if cfg.check:
            check(model, tokenizer, cfg.out, dtype, chat_template)


if __name__ == "__main__":
    run(main)
