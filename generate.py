"""Generate text with a checkpoint.

    python generate.py --checkpoint log/<run> --prompt "Once upon a time" --max_new_tokens 100
    python generate.py --checkpoint PATH --prompt "One" "Another, longer" --samples 8  # one batch
    python generate.py --checkpoint PATH --prompt_file story.txt --samples 1           # streamed
    python generate.py --model gpt2                                        # OpenAI's weights

If a text outgrows the model's context, its older half is dropped and the rest is prefilled again
from position 0.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from lib import checkpoint, compiler, files
from lib.cli import BadInput, flag, parse, path_flag, run
from lib.decoding import SampleConfig, sample
from lib.devices import dtype_flag, pick_device
from lib.rope import ContextConfig, extend
from lib.tokenizers import Tokenizer
from train_gpt2 import load_checkpoint


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    prompt: tuple[str, ...] = flag(
        ("Hello, I'm a language model,",), "prompts to continue; an empty one starts a document")
    prompt_file: str | None = path_flag(
        None, "read the prompt from a file instead, without the newline at its end")
    strict: bool = flag(
        False, "refuse a prompt longer than the context, instead of printing a note")
    graphs: bool = flag(
        True, "on cuda, replay the decoding step as a CUDA graph: one launch per token instead of "
              "hundreds")
    compile: bool = flag(
        False, "on cuda, compile the decoding step: starts slowly, pays off for many tokens")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")
    dtype: str = dtype_flag()


def read_prompts(cfg: Config, given: set[str]) -> tuple[str, ...]:
    """The prompts. Raises BadInput if the file cannot be read, or both flags are given."""
    if cfg.prompt_file is None:
        return cfg.prompt
    if "prompt" in given:
        raise BadInput("--prompt and --prompt_file are both given: leave out one of them")
    text = files.read_text(cfg.prompt_file, "name another --prompt_file")
    byte_order_mark = "\ufeff"
    return (text.removeprefix(byte_order_mark).removesuffix("\n").removesuffix("\r"),)


def ids_prompts(cfg: Config, given: set[str], stop: tuple[str, ...] | None) -> tuple[str, ...]:
    """The prompts for a model of ids that are not text. Raises BadInput for --stop."""
    if stop:
        raise BadInput("--stop is for text: leave it out; the separating id ends a document")
    if {"prompt", "prompt_file"} & given:
        return read_prompts(cfg, given)
    return ("",)


def check_length(prompt: str, n: int, block_size: int, max_new_tokens: int) -> str | None:
    """A note if a prompt of n tokens or its continuation does not fit the context (see
    lib/decoding.py's `generate`), else None."""
    notes = []
    if n > block_size:
        notes.append(f"the first new token sees only the newest {block_size:,}")
    first = max(block_size - n, 0) + 2  # the first new token that does not see all before it
    if first <= max_new_tokens:
        fewest = max(block_size // 2, 1)
        notes.append(f"from new token {first:,} on, each sees only the newest {fewest:,} to "
                     f"{block_size:,}")
    if not notes:
        return None
    return f"the prompt {prompt[:20]!r}... has {n:,} tokens: {'; '.join(notes)}"


def check_lengths(prompts: Sequence[str], tokenizer: Tokenizer, block_size: int, strict: bool,
                  max_new_tokens: int) -> None:
    """Print the notes of check_length. Raises BadInput if a prompt is too long for `strict`."""
    for prompt in prompts:
        n = max(len(tokenizer.encode(prompt)), 1)  # an empty prompt is an end-of-text token
        if strict and n > block_size:
            raise BadInput(f"the prompt {prompt[:20]!r}... has {n:,} tokens and the context "
                           f"{block_size:,}: shorten it, or leave out --strict")
        note = check_length(prompt, n, block_size, max_new_tokens)
        if note:
            print(note, file=sys.stderr)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python ran out of memory, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)


def main(argv: list[str]) -> None:
    (cfg, context, sampling), given = parse((Config, ContextConfig, SampleConfig), argv, __doc__)
    name = checkpoint.named(cfg)
    prompts = read_prompts(cfg, given)
    device = pick_device(cfg.device)
    model, tokenizer, _ = load_checkpoint(name, device, cfg.dtype)
    if not tokenizer.is_text:
        prompts = ids_prompts(cfg, given, sampling.stop)
    stream = len(prompts) == sampling.samples == 1
    show = partial(print, end="", flush=True) if stream else lambda piece: None
    try:
        extend(model, context)
        check_lengths(prompts, tokenizer, model.config.block_size, cfg.strict,
                      sampling.max_new_tokens)
        compiled = cfg.compile and compiler.can_decode(device)
        texts = sample(model, tokenizer, prompts, sampling, show, graphs=cfg.graphs,
                       compile=compiled)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BadInput("out of memory: lower --samples, --max_new_tokens or --context, or give "
                       "fewer prompts") from error
    if stream:
        print()
        return
    for text in texts:
        print(f"{text}\n---")


if __name__ == "__main__":
    run(main)
