"""HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): choose the right one of four endings by likelihood.

    python hellaswag.py --checkpoint log/<run>/ckpt_<step>.pt
    python hellaswag.py --model gpt2                                 # Hugging Face weights
    torchrun --standalone --nproc_per_node=8 hellaswag.py --checkpoint PATH

Three accuracies, which must not be compared with one another:
    acc               highest total log-likelihood of the ending
    acc_norm          highest mean log-likelihood per token: build-nanogpt's figure (GPT-2 124M: 29.55)
    lm_eval_acc_norm  highest log-likelihood per character of the ending, with the activity before the context, as
                      lm-evaluation-harness renders and scores it (GPT-2 124M: 31.14)
The 10,042 items of the validation split are downloaded once into hellaswag/, or read from --file.
"""

import time
from dataclasses import dataclass
from typing import Literal

from lib.cli import BadInput, flag, parse, run
from lib.devices import Processes, autocast
from lib.evals.hellaswag import evaluate, load, render
from lib.rope import ContextConfig, extend
from lib.tokenizers import load_tokenizer
from train_gpt2 import GPT, load_checkpoint


@dataclass
class Config:
    checkpoint: str | None = flag(None, "a ckpt_<step>.pt of this project")
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = flag(None, "a Hugging Face GPT-2 instead")
    file: str | None = flag(None, "hellaswag_val.jsonl; without it, downloaded once into hellaswag/")
    limit: int | None = flag(None, "score only the first so many items", at_least=1)
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")


def main(argv):
    (cfg, context), _ = parse((Config, ContextConfig), argv, __doc__)
    if (cfg.checkpoint is None) == (cfg.model is None):
        raise BadInput("name either --checkpoint or --model")
    with Processes(cfg.device) as processes:
        with processes.main_first():
            items = load(cfg.file)[:cfg.limit]
            if cfg.checkpoint:
                model, tokenizer, _ = load_checkpoint(cfg.checkpoint, processes.device)
            else:
                model, tokenizer = GPT.from_pretrained(cfg.model).to(processes.device).eval(), load_tokenizer("gpt2")
        extend(model, context)
        started, results = time.perf_counter(), {}
        styles = {"completion": {"acc": 1, "acc_norm": 2}, "lm_eval": {"lm_eval_acc_norm": 3}}
        if not all("activity_label" in item for item in items):
            del styles["lm_eval"]
        for style, names in styles.items():
            rendered = render(items, tokenizer, style)
            with autocast(processes.device):
                counts = evaluate(model, rendered, processes)
            results |= {name: counts[k] for name, k in names.items()}
        if processes.main:
            for name, right in results.items():
                print(f"{name} {right}/{len(items)} = {right / len(items):.4f}")
            if "lm_eval" not in styles:
                print("lm_eval_acc_norm n/a: an item has no activity_label")
            print(f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main)
