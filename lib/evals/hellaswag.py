"""HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): items, prompts, accuracy."""

import http.client
import re
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lib import files
from lib.cli import BadInput
from lib.devices import Processes, autocast
from lib.evals.scoring import score
from lib.tokenizers import Tokenizer

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
ELSEWHERE = "name a local hellaswag_val.jsonl with --file, in training with --hellaswag_file"
BATCH_TOKENS = 16_384  # per forward pass, padding included; bounds the memory of the logits

Question = tuple[int, list]  # label, and four rows of (context ids, ending ids, characters)


class NotDownloaded(BadInput):
    """HellaSwag is not on this machine and cannot be downloaded."""


# --------------------------------------------------------------------------------------------------
# Items


def load(path: str | Path | None = None) -> list[dict]:
    """The items of a jsonl file; by default the validation split, downloaded once.

    Raises NotDownloaded, or BadInput if the file cannot be read or a line is not a HellaSwag item.
    """
    remedy = ELSEWHERE
    if not path:
        path = _download(Path("hellaswag/hellaswag_val.jsonl"))
        remedy = f"move the file away to download it again, or {ELSEWHERE}"
    items = files.read_rows(path, remedy, check_item)
    if not items:
        raise BadInput(f"{path} contains no HellaSwag items: {remedy}")
    return items


def check_item(item: Any) -> dict:
    """Return the item. Raises ValueError if it is not a HellaSwag item."""
    if not has_choices(item):
        raise ValueError("not a HellaSwag item with ctx, four endings and a label from 0 to 3")
    for name in ("activity_label", "ctx_a", "ctx_b"):
        if not isinstance(item.get(name, ""), str):
            raise ValueError("not a HellaSwag item: activity_label, ctx_a and ctx_b must be text")
    return item


def has_choices(item: Any) -> bool:
    """Whether an item has a ctx, four endings and the label of one of them."""
    if not isinstance(item, dict) or not is_text(item.get("ctx")):
        return False
    endings = item.get("endings")
    if not isinstance(endings, list) or len(endings) != 4 or not all(map(is_text, endings)):
        return False
    label = item.get("label")
    return type(label) is int and 0 <= label < 4  # not a bool


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _download(path):
    """Download the validation split to `path` unless it exists; only one process downloads.

    Raises NotDownloaded, or BadInput if the file cannot be written.
    """
    if path.exists():
        return path
    files.make_folder(path.parent, ELSEWHERE)

    def wait():
        line = "another process is downloading HellaSwag: waiting for it"
        print(line, file=sys.stderr, flush=True)

    with files.locked(path.parent, ELSEWHERE, wait):
        if path.exists():  # downloaded by another process meanwhile
            return path
        try:
            with urllib.request.urlopen(URL, timeout=5) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise NotDownloaded(f"cannot download HellaSwag from {URL} ({error}): {ELSEWHERE}, "
                                "or train with --hellaswag_every 0") from error
        try:
            files.replace(path, lambda file: file.write(content))
        except OSError as error:
            raise BadInput(f"cannot write {path} ({error.strerror}): {ELSEWHERE}") from error
    return path


# --------------------------------------------------------------------------------------------------
# Prompts


def render(items: list[dict], tokenizer: Tokenizer, style: str = "completion") -> list[Question]:
    """Items -> list of (label, four rows of (context ids, ending ids, characters of the ending)).

    style "completion" is build-nanogpt's: the context and " " + ending, encoded separately. style
    "lm_eval" is lm-evaluation-harness's: it puts the activity before the context and removes
    brackets; it needs items with an activity_label. Rows are not truncated here: scoring.score
    truncates them as the harness does.
    """
    def encode(text):
        return tokenizer.encode(text).tolist()

    questions = []
    for item in items:
        context = item["ctx"]
        endings = item["endings"]
        if style == "lm_eval":
            context = harness_context(item)
            endings = [clean(ending) for ending in endings]
        context_ids = encode(context)
        rows = []
        for ending in endings:
            rows.append((context_ids, encode(" " + ending), max(len(ending), 1)))
        questions.append((item["label"], rows))
    return questions


def harness_context(item: dict) -> str:
    """The context of an item as lm-evaluation-harness writes it."""
    if "ctx_a" in item and "ctx_b" in item:
        ctx_a = item["ctx_a"]
        ctx_b = item["ctx_b"]
    else:
        ctx_a, ctx_b = split_context(item["ctx"])
    return clean(f"{item['activity_label']}: {ctx_a} {ctx_b.capitalize()}")


def split_context(ctx: str) -> tuple[str, str]:
    """ctx -> (ctx_a, ctx_b) for files with ctx only: the finished sentences, and the start of the
    sentence to complete, or "".

    ctx_b starts in lower case; lm-evaluation-harness capitalizes it.
    """
    parts = re.fullmatch(r"(.*[.!?][\"')]*) +([a-z][^.!?]*)", ctx, re.DOTALL)
    if parts is None:
        return ctx, ""
    return parts[1], parts[2]


def clean(text: str) -> str:
    r"""Remove WikiHow's markup as lm-evaluation-harness does: " [title]" becomes a full stop, other
    brackets are deleted.

    The harness's re.sub(r"\[.*?\]", "", text) takes quadratic time on brackets that never close. So
    this applies it only up to the last closing bracket of a line, where every search matches.
    """
    cleaned = []
    for line in text.strip().replace(" [title]", ". ").split("\n"):
        head, close, tail = line.rpartition("]")
        cleaned.append(re.sub(r"\[.*?\]", "", head + close) + tail)
    return "\n".join(cleaned).replace("  ", " ")


# --------------------------------------------------------------------------------------------------
# Accuracy


def count_correct(model: Callable, questions: list[Question], processes: Processes,
                  stopped: Callable[[], bool] = lambda: False) -> list[int]:
    """Count the questions that the model answers correctly, distributed over the processes.

    model, stopped: as in scoring.score. Returns, on every process, the counts [questions, correct
    by summed log-likelihood, by its mean per token, by its mean per character]. Raises NonFinite
    and RankError like scoring.score.
    """
    rows = [row for _, four in questions for row in four]
    pairs = ((context, ending) for context, ending, _ in rows)
    nats, _ = score(model, pairs, processes, BATCH_TOKENS, progress=processes.main, stopped=stopped)
    nats = np.reshape(nats, (-1, 4))
    tokens = np.reshape([len(ending) for _, ending, _ in rows], (-1, 4))
    characters = np.reshape([count for _, _, count in rows], (-1, 4))
    labels = np.array([label for label, _ in questions])
    counts = [len(questions)]
    for scores in (nats, nats / tokens, nats / characters):
        correct = scores.argmax(axis=1) == labels
        counts.append(int(correct.sum()))
    return counts


def tracked(cfg: Any, tokenizer: Tokenizer, processes: Processes,
            required: bool) -> Callable | None:
    """HellaSwag during training, with the file of --hellaswag_file: a function (model, micro_batch,
    stopped) -> {tag: acc_norm}.

    Returns None for ids that are not text, and, after a warning, if the data cannot be downloaded
    and is not `required`.
    """
    if not tokenizer.is_text:
        if required and cfg.hellaswag_every:
            tokenizer.require_text("HellaSwag")
        return None
    try:
        with processes.main_first():
            items = load(cfg.hellaswag_file) if cfg.hellaswag_every else []
    except NotDownloaded as error:
        if required:
            raise
        if processes.main:
            line = f"warning: training continues without HellaSwag: {error}"
            print(line, file=sys.stderr, flush=True)
        return None
    questions = render(items, tokenizer)

    def run(model, micro_batch, stopped):
        with autocast(model):
            n, _, correct, _ = count_correct(model, questions, processes, stopped)
        return {"eval/hellaswag": correct / n}

    return run
