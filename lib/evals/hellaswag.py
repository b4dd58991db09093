"""HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): choose the right one of four endings by likelihood.

    python hellaswag.py --checkpoint log/<run>/ckpt_<step>.pt
    python hellaswag.py --model gpt2                                 # Hugging Face weights
    torchrun --standalone --nproc_per_node=8 hellaswag.py --checkpoint PATH

Three accuracies, which must not be compared with one another:
    acc               highest total log-likelihood of the ending
    acc_norm          highest mean log-likelihood a token: build-nanogpt's figure (GPT-2 124M: 29.55)
    lm_eval_acc_norm  highest log-likelihood a character of the ending, with the activity before the context, as
                      lm-evaluation-harness renders and scores it (GPT-2 124M: 31.14)
The 10,042 items of the validation split are downloaded once into hellaswag/, or read from --file.
"""

import json
import os
import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lib.cli import BadInput, flag
from lib.evals.scoring import score

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
BATCH_TOKENS = 16_384  # tokens a forward pass, padding included; bounds the memory of the logits


@dataclass
class Config:
    checkpoint: str | None = flag(None, "a ckpt_<step>.pt of this project")
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = flag(None, "a Hugging Face GPT-2 instead")
    file: str | None = flag(None, "hellaswag_val.jsonl; without it, downloaded once into hellaswag/")
    limit: int | None = flag(None, "score the first so many items only")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")


def load(path=None):
    """The items of a jsonl file (default: the validation split, downloaded once) as a list of dict.

    Raises BadInput if the file cannot be had, or a line is no item with ctx, four endings and a label.
    """
    remedy = "give another file" if path else "delete the file to download it again"
    path = Path(path) if path else _download(Path("hellaswag/hellaswag_val.jsonl"))
    items = []
    try:
        with open(path, encoding="utf-8") as file:  # by newlines alone: JSON may hold what str.splitlines splits at
            for line in file:
                items.append(_check(json.loads(line)))
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror}): name hellaswag_val.jsonl by --file, in training by --hellaswag_file") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}, line {len(items) + 1} is no HellaSwag item ({error}): {remedy}") from error
    if not items:
        raise BadInput(f"{path} holds no HellaSwag items: {remedy}")
    return items


def _check(item):
    """The item itself. Raises ValueError if it is none."""
    def texts(values):
        return all(isinstance(value, str) and value for value in values)

    whole = isinstance(item, dict) and texts([item.get("ctx")]) and isinstance(item.get("endings"), list)
    if not whole or len(item["endings"]) != 4 or not texts(item["endings"]) or item.get("label") not in range(4):
        raise ValueError("no ctx, four endings and label")
    if not all(isinstance(item.get(name, ""), str) for name in ("activity_label", "ctx_a", "ctx_b")):
        raise ValueError("activity_label, ctx_a and ctx_b must be text")
    return item


def _download(path):
    if not path.exists():
        partial = Path(f"{path}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            urllib.request.urlretrieve(URL, partial)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise BadInput(f"cannot download HellaSwag from {URL} ({error}): give a local hellaswag_val.jsonl by --file, in "
                           "training by --hellaswag_file, or train with --hellaswag_every 0") from error
    return path


def render(items, tokenizer, block_size, style="completion"):
    """Items -> list of (label, four rows), a row being (token ids, tokens of the ending, characters of the ending).

    style "completion" is build-nanogpt's: the context, a space, the ending, each encoded by itself.
    style "lm_eval" puts the activity before the context and cleans brackets (lm-evaluation-harness, tasks/hellaswag);
    items need an activity_label for it.
    A row longer than block_size loses the beginning of its context.
    """
    def encode(text):
        return tokenizer.encode(text).tolist()

    rendered = []
    for item in items:
        context, endings = item["ctx"], item["endings"]
        if style == "lm_eval":
            ctx_a, ctx_b = (item["ctx_a"], item["ctx_b"]) if "ctx_a" in item and "ctx_b" in item else split_context(context)
            context = f"{ctx_a} {ctx_b.capitalize()}"
            context, endings = _clean(f"{item['activity_label']}: {context}"), [_clean(e) for e in endings]
        context, rows = encode(context), []
        for ending in endings:
            ids = encode(" " + ending)
            rows.append(((context + ids)[-block_size:], min(len(ids), block_size - 1), max(len(ending), 1)))
        rendered.append((item["label"], rows))
    return rendered


def split_context(ctx):
    """ctx of a file that holds nothing else -> (ctx_a, ctx_b): what comes before, and the start of a sentence to complete, if there is one.

    lm-evaluation-harness begins ctx_b with a capital letter; in ctx it begins with a small one.
    """
    parts = re.fullmatch(r"(.*[.!?][\"')]*) +([a-z][^.!?]*)", ctx, re.DOTALL)
    return parts.groups() if parts else (ctx, "")


def _clean(text):
    """What lm-evaluation-harness does to WikiHow's markup: titles become full stops, brackets go."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def evaluate(model, rendered, processes, stopped=lambda: False):
    device, rank, world = processes.device, processes.rank, processes.world_size
    """Score this rank's share of the items (every `world`-th).

    model: as scoring.score takes it, in evaluation mode. stopped: as there.
    Returns [items, right by sum, right by mean a token, right by mean a character], to be added up over the ranks.
    """
    mine = rendered[rank::world]
    rows = [row for _, four in mine for row in four]
    pairs = ((ids[:-ending], ids[-ending:]) for ids, ending, _ in rows)
    window = max((len(row[0]) for row in rows), default=1)
    nats, _ = score(model, pairs, window, torch.device(device), BATCH_TOKENS, stopped=stopped)
    nats, n_tokens, n_chars = (np.reshape(values, (len(mine), 4)) for values in (nats, *([row[k] for row in rows] for k in (1, 2))))
    labels = np.array([label for label, _ in mine])
    right = [int((mean.argmax(axis=1) == labels).sum()) if mine else 0 for mean in (nats, nats / n_tokens, nats / n_chars)]
    return processes.sum([len(mine), *right])


