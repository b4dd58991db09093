"""HellaSwag (Zellers et al. 2019, https://arxiv.org/abs/1905.07830): items, renderings, scores."""

import http.client
import re
import sys
import urllib.request
from pathlib import Path

import numpy as np

from lib import files
from lib.cli import BadInput
from lib.devices import autocast
from lib.evals.scoring import score

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
ELSEWHERE = "name a local hellaswag_val.jsonl by --file, in training by --hellaswag_file"
BATCH_TOKENS = 16_384  # tokens per forward pass, padding included; bounds the memory of the logits


class NotDownloaded(BadInput):
    """HellaSwag is not on this machine and cannot be downloaded."""


def load(path=None):
    """The items of a jsonl file (default: the validation split, downloaded once) as a list of dict.

    Raises NotDownloaded, or BadInput if the file cannot be read, or a line is not an item with
    ctx, four endings and a label.
    """
    remedy = ELSEWHERE if path else f"move the file away to download it again, or {ELSEWHERE}"
    path = path or _download(Path("hellaswag/hellaswag_val.jsonl"))
    items = files.read_rows(path, remedy, check_item)
    if not items:
        raise BadInput(f"{path} holds no HellaSwag items: {remedy}")
    return items


def check_item(item):
    """The item itself. Raises ValueError if it is not one."""
    def texts(values):
        return all(isinstance(value, str) and value for value in values)

    whole = isinstance(item, dict) and texts([item.get("ctx")]) and isinstance(
        item.get("endings"), list)
    if not (whole and len(item["endings"]) == 4 and texts(item["endings"])
            and type(item.get("label")) is int and 0 <= item["label"] < 4):
        raise ValueError("not a HellaSwag item with ctx, four endings and a label from 0 to 3")
    if not all(
            isinstance(item.get(name, ""), str) for name in ("activity_label", "ctx_a", "ctx_b")):
        raise ValueError("not a HellaSwag item: activity_label, ctx_a and ctx_b must be text")
    return item


def _download(path):
    """The file at `path`, downloaded if it is not there; of several processes by one.

    Raises NotDownloaded, or BadInput if it cannot be written.
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


def render(items, tokenizer, style="completion"):
    """Items -> list of (label, four rows of (context ids, ending ids, characters of the ending)).

    style "completion" is build-nanogpt's: the context, a space, the ending, each encoded by itself.
    style "lm_eval" puts the activity before the context and cleans brackets (lm-evaluation-harness,
    tasks/hellaswag); items need an activity_label for it. Nothing is cut here: scoring.score cuts
    long rows as the harness does.
    """
    def encode(text):
        return tokenizer.encode(text).tolist()

    rendered = []
    for item in items:
        context, endings = item["ctx"], item["endings"]
        if style == "lm_eval":
            ctx_a, ctx_b = (
                item["ctx_a"],
                item["ctx_b"]) if "ctx_a" in item and "ctx_b" in item else split_context(context)
            context = f"{ctx_a} {ctx_b.capitalize()}"
            context, endings = clean(f"{item['activity_label']}: {context}"), [
                clean(e) for e in endings
            ]
        context, rows = encode(context), []
        for ending in endings:
            rows.append((context, encode(" " + ending), max(len(ending), 1)))
        rendered.append((item["label"], rows))
    return rendered


def split_context(ctx):
    """The ctx of a file without ctx_a and ctx_b -> (ctx_a, ctx_b): what comes before, and the
    sentence to complete, if any.

    lm-evaluation-harness begins ctx_b with a capital letter; in ctx it begins with a small one.
    """
    parts = re.fullmatch(r"(.*[.!?][\"')]*) +([a-z][^.!?]*)", ctx, re.DOTALL)
    return parts.groups() if parts else (ctx, "")


def clean(text):
    r"""What lm-evaluation-harness does to WikiHow's markup: titles become full stops, brackets go.

    Its re.sub(r"\[.*?\]", "", text) takes quadratic time on brackets that never close. Up to the
    last closing one of a line, each search ends at a match.
    """
    lines = [line.rpartition("]") for line in text.strip().replace(" [title]", ". ").split("\n")]
    return "\n".join(re.sub(r"\[.*?\]", "", head + close) + tail
                     for head, close, tail in lines).replace("  ", " ")


def evaluate(model, rendered, processes, stopped=lambda: False):
    """How many rendered items a model gets right, shared out over the processes.

    model, stopped: as scoring.score takes them. Returns the counts [items, right by sum, right by
    mean per token, right by mean per character], on every process those of all items. Raises
    NonFinite and RankError, as scoring.score does.
    """
    rows = [row for _, four in rendered for row in four]
    pairs = ((context, ending) for context, ending, _ in rows)
    nats, _ = score(model, pairs, processes, BATCH_TOKENS, progress=processes.main, stopped=stopped)
    nats = np.reshape(nats, (-1, 4))
    n_tokens = np.reshape([len(ending) for _, ending, _ in rows], (-1, 4))
    n_chars = np.reshape([characters for _, _, characters in rows], (-1, 4))
    labels = np.array([label for label, _ in rendered])
    right = [
        int((scores.argmax(axis=1) == labels).sum())
        for scores in (nats, nats / n_tokens, nats / n_chars)
    ]
    return [len(rendered), *right]


def tracked(cfg, tokenizer, processes, required):
    """HellaSwag along a training run, by its flags --hellaswag_every and --hellaswag_file:
    (model, micro_batch, stopped) -> {tag: acc_norm}.

    Returns None, after a warning, if it cannot be downloaded and is not `required`.
    """
    try:
        with processes.main_first():
            items = load(cfg.hellaswag_file) if cfg.hellaswag_every else []
    except NotDownloaded as error:
        if required:
            raise
        if processes.main:
            line = f"warning: training goes on without HellaSwag: {error}"
            print(line, file=sys.stderr, flush=True)
        return None
    questions = render(items, tokenizer)

    def run(model, micro_batch, stopped):
        with autocast(processes.device):
            n, _, correct, _ = evaluate(model, questions, processes, stopped)
        return {"eval/hellaswag": correct / n}

    return run
