"""Evaluate on HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): pick the correct
one of four endings by likelihood.

    python hellaswag.py --checkpoint log/<run>
    python hellaswag.py --model gpt2                                 # OpenAI's weights
    torchrun --standalone --nproc_per_node=8 hellaswag.py --checkpoint PATH

Prints three accuracies, which are not comparable with each other:
    acc               highest total log-likelihood of the ending
    acc_norm          highest mean log-likelihood per token, as in build-nanogpt
                      (GPT-2 124M: 29.55)
    lm_eval_acc_norm  highest log-likelihood per character, with lm-evaluation-harness's prompts,
                      which put the activity before the context (GPT-2 124M: 31.14)
The 10,042 items of the validation split are downloaded once into hellaswag/, or read from --file.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import math
import time
from dataclasses import dataclass
from typing import Literal

from lib import checkpoint
from lib.cli import flag, parse, path_flag, run
from lib.devices import Processes, autocast, dtype_flag
from lib.evals.hellaswag import count_correct, load, render
from lib.rope import ContextConfig, extend
from train_gpt2 import load_checkpoint

CHANCE = 0.25  # one ending of four


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    file: str | None = path_flag(
        None, "hellaswag_val.jsonl; without it, downloaded once into hellaswag/")
    limit: int | None = flag(None, "score only the first N items", at_least=1)
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")
    dtype: str = dtype_flag()


def accuracy(name: str, correct: int, n: int) -> str:
    """An accuracy over n items as text, with its standard error and the accuracy of guessing."""
    share = correct / n
    error = math.sqrt(share * (1 - share) / max(n - 1, 1))
    return f"{name} {correct}/{n} = {share:.4f} ± {error:.4f} (chance: {CHANCE})"


def main(argv: list[str]) -> None:
    (cfg, context), _ = parse((Config, ContextConfig), argv, __doc__)
    name = checkpoint.named(cfg)
    with Processes(cfg.device) as processes:
        with processes.main_first():
            model, tokenizer, state = load_checkpoint(name, processes.device, cfg.dtype)
            tokenizer.require_text("HellaSwag")
            items = load(cfg.file)[:cfg.limit]
        processes.check_same(state.get("step", 0), checkpoint.DIFFERENT)
        extend(model, context)
        started = time.perf_counter()

        def evaluate(style):
            questions = render(items, tokenizer, style)
            with autocast(model):
                return count_correct(model, questions, processes)

        n, acc, acc_norm, _ = evaluate("completion")
        lines = [accuracy("acc", acc, n), accuracy("acc_norm", acc_norm, n)]
        if all("activity_label" in item for item in items):
            *_, per_character = evaluate("lm_eval")
            lines.append(accuracy("lm_eval_acc_norm", per_character, n))
        else:
            lines.append("lm_eval_acc_norm n/a: an item has no activity_label")
        lines.append(f"{time.perf_counter() - started:.1f} s")
        if processes.main:
            print("\n".join(lines))


if __name__ == "__main__":
    run(main)
