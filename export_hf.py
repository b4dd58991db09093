"""Write a checkpoint as a folder that stock transformers loads, without code of ours: weights,
config.json, tokenizer.

    python export_hf.py --checkpoint log/<run> --out exported
    python export_hf.py --checkpoint PATH --out exported --dtype bfloat16 --check

    model = transformers.AutoModelForCausalLM.from_pretrained("exported")    # theirs
    model = train_gpt2.GPT.from_pretrained("exported")                       # ours again

Exact, by what the model was trained with:
    GPT2LMHeadModel         --norm layernorm --pos learned --mlp gelu or relu2, --no-emb_norm
    LlamaForCausalLM        --norm rmsnorm   --pos rope    --mlp swiglu
    Qwen3ForCausalLM        --norm rmsnorm   --pos rope    --mlp swiglu --qk_norm --no-bias
    ArceeForCausalLM        --norm rmsnorm   --pos rope    --mlp gelu or relu2
    Starcoder2ForCausalLM   --norm layernorm --pos rope    --mlp gelu or relu2
    StableLmForCausalLM     --norm layernorm --pos rope    --mlp swiglu --no-bias
    Glm4MoeForCausalLM      --norm rmsnorm   --pos rope    --mlp swiglu --no-bias --n_experts N [--n_shared N] [--qk_norm]
    MixtralForCausalLM      the same with --router softmax --balance loss, but without --n_shared and --qk_norm
    Qwen3MoeForCausalLM     the same with --router softmax --balance loss --qk_norm, but without --n_shared
each with tied or untied embeddings, and with --pos rope also --emb_norm, which is worked into the
embedding table. Every other combination is refused: --token_shift, --value_residual,
--residual_scalars and --softcap, as in the presets speedrun and tiny, have no counterpart there.

A chat model's folder has its chat template: tokenizer.apply_chat_template(messages,
add_generation_prompt=True), with sanitize_control_tokens=True where users may type <|end|> or the
like.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import contextlib
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from lib import checkpoint, huggingface
from lib.chat_template import ROLES, render
from lib.cli import BadInput, flag, parse, path_flag, run
from lib.decoding import NonFinite
from train_gpt2 import load_checkpoint


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    out: str | None = path_flag(None, "folder to write, new or empty")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "of the weights")
    check: bool = flag(
        False, "load what was written and compare its logits and tokens with the checkpoint's")


TOLERANCE = 1e-4  # of logits, as a share of the largest, or of 1 if all are smaller


@contextlib.contextmanager
def quiet():
    """Without the bars and warnings of transformers and torch, about other uses:
    that a text is longer than the context, say."""
    logging = huggingface.library().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore",
                "Initializing zero-element tensors")  # GLM's shared experts, where there are none
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def check(model, tokenizer, cfg, chat_template=None):
    """Load the folder with transformers and compare it with the checkpoint. Raises BadInput if
    logits or tokens differ.

    In two steps, so that rounding, which may send tokens to other experts, hides nothing and
    condemns nothing: the checkpoint with what was made of it, in fp32; that, rounded, with the
    folder.
    """
    from transformers import AutoTokenizer

    (theirs, _), their_tokenizer = huggingface.load(cfg.out), AutoTokenizer.from_pretrained(cfg.out)
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(tokenizer.vocab_size, (4, min(model.config.block_size, 256)),
                        generator=generator)
    logits, made = model(idx), huggingface.convert(model)
    if not logits.isfinite().all():
        raise NonFinite
    converting = logits - made(idx).logits
    for p in made.parameters():
        p.data = p.data.to(getattr(torch, cfg.dtype)).float()
    writing = made(idx).logits - theirs(idx).logits
    apart, largest = torch.stack(
        (converting, writing)).abs().max().item(), logits.abs().max().item()
    texts = [
        tokenizer.decode(row[:20].tolist())
        for row in torch.randint(tokenizer.vocab_size, (200, 20), generator=generator)
    ]
    same = sum(
        their_tokenizer(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(
            text).tolist() for text in texts)
    if chat_template:
        messages = [{"role": role, "content": text} for role, text in zip(ROLES, texts)]
        told = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                   return_dict=False, sanitize_control_tokens=True)
        same -= told != render(messages, tokenizer, reply=True)[0]
    rounding = "" if cfg.dtype == "float32" else f", beyond what rounding to {cfg.dtype} changes"
    result = (f"logits up to {largest:.2f} differ by {apart:.2e} at most{rounding}; "
              f"{same} of {len(texts)} texts have the same tokens")
    if not apart <= TOLERANCE * max(largest, 1) or same < len(texts):
        raise BadInput(
            f"{cfg.out} is not what the checkpoint is ({result}): do not use it, and report this")
    print(f"checked: {result}")


def main(argv):
    (cfg,), _ = parse((Config,), argv, __doc__)
    name = checkpoint.named(cfg)
    if cfg.out is None:
        raise BadInput("name --out, the folder to write")
    model, tokenizer, state = load_checkpoint(name)
    with quiet():
        huggingface.write(model, tokenizer, cfg.out, getattr(torch, cfg.dtype),
                          state.get("chat_template"))
        print(f"{cfg.out}: {huggingface.find_family(model.config)}, {cfg.dtype}")
        if cfg.check:
            check(model, tokenizer, cfg, state.get("chat_template"))


if __name__ == "__main__":
    run(main)
