"""HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): choose the right one of four
endings by likelihood.

    python hellaswag.py --checkpoint log/<run>
    python hellaswag.py --model gpt2                                 # OpenAI's weights
    torchrun --standalone --nproc_per_node=8 hellaswag.py --checkpoint PATH

Three accuracies, which must not be compared with one another:
    acc               highest total log-likelihood of the ending
    acc_norm          highest mean log-likelihood per token: build-nanogpt's figure (GPT-2 124M: 29.55)
    lm_eval_acc_norm  highest log-likelihood per character of the ending, with the activity before the context, as
                      lm-evaluation-harness renders and scores it (GPT-2 124M: 31.14)
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
from lib.devices import Processes, autocast
from lib.evals.hellaswag import count_correct, load, render
from lib.rope import ContextConfig, extend
from train_gpt2 import load_checkpoint

CHANCE = 0.25  # one ending of four


@dataclass
class Config(checkpoint.ModelConfig):
    file: str | None = path_flag(
        None, "hellaswag_val.jsonl; without it, downloaded once into hellaswag/")
    limit: int | None = flag(None, "score only the first so many items", at_least=1)
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")


def accuracy(name, right, n):
    """A line: the share of n items that is right, its standard error, and that of guessing."""
    share = right / n
    error = math.sqrt(share * (1 - share) / max(n - 1, 1))
    return f"{name} {right}/{n} = {share:.4f} ± {error:.4f} (chance: {CHANCE})"


def main(argv):
    (cfg, context), _ = parse((Config, ContextConfig), argv, __doc__)
    name = checkpoint.named(cfg)
    with Processes(cfg.device) as processes:
        with processes.main_first():
            items = load(cfg.file)[:cfg.limit]
            model, tokenizer, state = load_checkpoint(name, processes.device)
        processes.check_same(state.get("step", 0), checkpoint.DIFFERENT)
        extend(model, context)
        started, results = time.perf_counter(), {}
        styles = {"completion": {"acc": 1, "acc_norm": 2}, "lm_eval": {"lm_eval_acc_norm": 3}}
        if not all("activity_label" in item for item in items):
            del styles["lm_eval"]
        for style, names in styles.items():
            rendered = render(items, tokenizer, style)
            with autocast(processes.device):
                counts = count_correct(model, rendered, processes)
            results |= {name: counts[k] for name, k in names.items()}
        if processes.main:
            for name, right in results.items():
                print(accuracy(name, right, len(items)))
            if "lm_eval" not in styles:
                print("lm_eval_acc_norm n/a: an item has no activity_label")
            print(f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main)
