"""Generate text with a checkpoint.

    python generate.py --checkpoint log/<run> --prompt "Once upon a time" --max_new_tokens 100
    python generate.py --checkpoint PATH --prompt "One" "Another, longer" --samples 8      # all side by side
    python generate.py --checkpoint PATH --prompt_file story.txt --samples 1               # one text appears as it is written
    python generate.py --model gpt2                                                        # OpenAI's weights

A text may outgrow the model's context: its oldest half is then dropped, and what is left begins
anew at position 0.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from lib import checkpoint, files
from lib.cli import BadInput, flag, parse, path_flag, run
from lib.decoding import SampleConfig, sample
from lib.devices import pick_device
from lib.rope import ContextConfig, extend
from train_gpt2 import load_checkpoint


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    prompt: tuple[str, ...] = flag(("Hello, I'm a language model,",),
                                   "texts to continue; an empty one: a document of its own")
    prompt_file: str | None = path_flag(
        None, "a file whose text, without the newline at its end, is the prompt instead")
    strict: bool = flag(False, "refuse a prompt longer than the context; "
                        "what outgrows it while it is written is told, not refused")
    graphs: bool = flag(
        True,
        "on cuda, replay the decoding step as a CUDA graph: one launch per token instead of hundreds"
    )
    compile: bool = flag(False,
                         "on cuda, compile the decoding step: slow to start, pays for many tokens")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")


def read_prompts(cfg, given):
    """The prompts, a tuple of str. Raises BadInput if the file cannot be read, or two kinds are
    given."""
    if cfg.prompt_file is None:
        return cfg.prompt
    if "prompt" in given:
        raise BadInput("--prompt and --prompt_file are both given: leave out one of them")
    text = files.read_text(cfg.prompt_file,
                           "name another --prompt_file").removeprefix("\ufeff")  # a byte order mark
    return (text.removesuffix("\n").removesuffix("\r"),)


def check_length(prompts, tokenizer, block_size, strict, max_new_tokens):
    """Say of which prompts, and from when on, the model does not see all (lib/decoding.py's
    `generate`), or raise BadInput."""
    for prompt in prompts:
        n, unseen = max(len(tokenizer.encode(prompt)), 1), []
        if n > block_size:
            if strict:
                raise BadInput(f"the prompt {prompt[:20]!r}... has {n:,} tokens and the context {block_size:,}: "
                               "shorten it, or leave out --strict")
            unseen.append(f"the first new one follows its newest {block_size:,}")
        if (first := max(block_size - n, 0) + 2) <= max_new_tokens:
            unseen.append(f"from new token {first:,} on, "
                          f"each follows the newest {max(block_size // 2, 1):,} to {block_size:,} alone")
        if unseen:
            print(f"the prompt {prompt[:20]!r}... has {n:,} tokens: {'; '.join(unseen)}",
                  file=sys.stderr)


def main(argv):
    (cfg, context, sampling), given = parse((Config, ContextConfig, SampleConfig), argv, __doc__)
    name = checkpoint.named(cfg)
    prompts, device = read_prompts(cfg, given), pick_device(cfg.device)
    model, tokenizer, _ = load_checkpoint(name, device)
    one = len(prompts) == sampling.samples == 1
    show = partial(print, end="", flush=True) if one else lambda piece: None
    try:
        extend(model, context)
        check_length(prompts, tokenizer, model.config.block_size, cfg.strict,
                     sampling.max_new_tokens)
        texts = sample(model, tokenizer, prompts, sampling, show,
                       graphs=cfg.graphs, compile=cfg.compile and device.type == "cuda")
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError))
                or "DefaultCPUAllocator" in str(error)):  # a CPU's
            raise
        raise BadInput(
            "out of memory: lower --samples, --max_new_tokens or --context, or give fewer prompts"
        ) from error
    print("" if one else "".join(f"{text}\n---\n" for text in texts), end="\n" if one else "")


if __name__ == "__main__":
    run(main)
