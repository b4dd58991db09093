"""Whether an exported folder computes the same as its checkpoint: tokens, logits, text, and
lm-evaluation-harness."""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lib import huggingface
from lib.chat_template import ROLES, render
from lib.cli import BadInput
from lib.decoding import Decoder, NonFinite, generate
from lib.devices import Processes, dtype_name
from lib.evals import harness
from lib.tokenizers import Tokenizer

TOLERANCE = 1e-4  # of logits, as a share of the largest, or of 1 if all are smaller
N_TEXTS = 200     # of random tokens, whose encodings are compared
NEW_TOKENS = 200  # of the generated text
PROMPT = 16       # tokens
N_ITEMS = 100     # of the evaluation
LONGEST_WORD = 10   # bytes of a word in these items, with its space
LEAST_CONTEXT = 16  # tokens, for these items
NATS = 1e-3       # tolerance of an item's log-likelihoods
PAGE = Path(__file__).resolve().parents[2] / "README.md"
PAGE_LENGTH = 4000  # characters


class Result(NamedTuple):
    """One comparison: whether both agree, and what was compared."""
    same: bool
    text: str


class Original(NamedTuple):
    """What was exported. rounded: the GPT with its weights rounded to the folder's dtype."""
    model: Any
    rounded: Any
    tokenizer: Tokenizer


class Exported(NamedTuple):
    """An exported folder, loaded by transformers in fp32."""
    model: Any
    tokenizer: Any
    dtype: torch.dtype  # of the weights in the folder


def load_exported(folder: str, dtype: torch.dtype) -> Exported:
    """Load a folder that this process has just written, with the code that it contains."""
    from transformers import AutoTokenizer

    model = huggingface.load_with_its_code(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return Exported(model, tokenizer, dtype)


@torch.no_grad()
def check_export(model: Any, tokenizer: Tokenizer, folder: str, dtype: torch.dtype,
                 reread: Callable[[str], Any]) -> list[str]:
    """Compare a written folder with the GPT and Tokenizer in it -> lines that say what is equal.

    dtype: of the written weights. reread: loads the folder as a GPT in fp32; its weights are
    rounded to `dtype`. Raises BadInput if anything differs, and NonFinite.
    """
    exported = load_exported(folder, dtype)
    page = PAGE.read_text(encoding="utf-8")[:PAGE_LENGTH]
    rounded = model if dtype == torch.float32 else reread(folder).eval()
    original = Original(model, rounded, tokenizer)
    lines = []
    for compare in (compare_tokens, compare_logits, compare_generation, compare_evaluation):
        same, text = compare(original, exported, page)
        if not same:
            raise BadInput(f"{folder} differs from the checkpoint ({text}): do not use it, and "
                           "report this")
        lines.append(text)
    return lines


# --------------------------------------------------------------------------------------------------
# Tokens and logits


def compare_tokens(original: Original, exported: Exported, page: str) -> Result:
    """The ids of a page, of texts of random tokens and, for a chat model, of a conversation."""
    tokenizer = original.tokenizer
    generator = torch.Generator().manual_seed(0)
    random_ids = torch.randint(tokenizer.vocab_size, (N_TEXTS, 20), generator=generator)
    texts = [tokenizer.decode(row.tolist()) for row in random_ids]

    def is_same(text):
        ids = exported.tokenizer(text, split_special_tokens=True)["input_ids"]
        return ids == tokenizer.encode(text).tolist()

    same = sum(map(is_same, texts))
    same_page = is_same(page)
    verb = "has" if same_page else "has not"
    what = (f"{same} of {N_TEXTS} texts have the same tokens, a page of "
            f"{len(tokenizer.encode(page)):,} {verb}")
    same_chat = True
    if exported.tokenizer.chat_template:
        messages = [{"role": role, "content": text} for role, text in zip(ROLES, texts)]
        ids = exported.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True)
        expected, _ = render(messages, tokenizer, reply=True)
        same_chat = ids == expected
        what += ", a conversation has" if same_chat else ", a conversation has not"
    return Result(same == N_TEXTS and same_page and same_chat, what)


def compare_logits(original: Original, exported: Exported, page: str) -> Result:
    """The logits of random tokens and of a page. Raises NonFinite.

    Rounding to the folder's dtype may route tokens to other experts, which changes logits a lot.
    Two comparisons avoid that: the model with its conversion in fp32, and the rounded conversion
    with the loaded model.
    """
    model = original.model
    tokenizer = original.tokenizer
    block_size = model.config.block_size
    generator = torch.Generator().manual_seed(0)
    shape = (4, min(block_size, 256))
    batches = [torch.randint(tokenizer.vocab_size, shape, generator=generator)]
    batches += torch.tensor(tokenizer.encode(page).tolist())[None].split(block_size, dim=1)

    converted = huggingface.convert(model)
    largest = 0.0
    difference = 0.0
    for idx in batches:
        logits = model(idx)
        if not logits.isfinite().all():
            raise NonFinite
        largest = max(largest, logits.abs().max().item())
        difference = max_or_nan(difference, converted(idx).logits - logits)
    for p in converted.parameters():
        p.data = p.data.to(exported.dtype).float()
    for idx in batches:
        difference = max_or_nan(difference, converted(idx).logits - exported.model(idx).logits)

    rounding = ""
    if exported.dtype != torch.float32:
        name = dtype_name(exported.dtype)
        rounding = f", beyond what rounding to {name} changes"
    within = difference <= TOLERANCE * max(largest, 1)  # False for NaN
    return Result(within, f"logits up to {largest:.2f} differ by {difference:.2e} at most"
                          f"{rounding}")


def max_or_nan(largest: float, differences: torch.Tensor) -> float:
    """The larger of a number and the absolute values of a tensor; NaN if any is NaN."""
    return torch.maximum(torch.tensor(largest), differences.abs().max().cpu()).item()


# --------------------------------------------------------------------------------------------------
# Text and evaluation


def compare_generation(original: Original, exported: Exported, page: str) -> Result:
    """Greedy text with both KV caches. It ends at two tokens with nearly equal logits."""
    model = original.rounded
    block_size = model.config.block_size
    prompt = original.tokenizer.encode(page).tolist()[:min(PROMPT, block_size // 2)]
    n = min(NEW_TOKENS, block_size - len(prompt))
    decoder = Decoder(model, 1, block_size)
    ours = [tokens[0] for tokens in generate(decoder, [prompt], n, lambda x: x.argmax(dim=-1))]
    idx = torch.tensor([prompt])
    output = exported.model.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=False, top_k=None,
        eos_token_id=-1, pad_token_id=original.tokenizer.eot)  # -1: do not stop
    theirs = output[0, len(prompt):].tolist()
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a == b:
            continue
        logits = model(torch.tensor([prompt + ours[:i]]))[0, -1]
        tied = (logits[a] - logits[b]).abs() <= TOLERANCE * logits.abs().max().clamp(min=1)
        if not tied:
            return Result(False, f"greedy text differs from token {i + 1} of {n} on")
        return Result(True, f"greedy text is the same up to a tie at token {i + 1} of {n}")
    return Result(True, f"{n} tokens of greedy text are the same")


def compare_evaluation(original: Original, exported: Exported, page: str) -> Result:
    """The result and log-likelihoods of a multiple-choice task in lm-evaluation-harness, by its own
    adapter and by this project's."""
    model = original.rounded
    if model.config.block_size < LEAST_CONTEXT:
        return Result(True, "not compared under lm-evaluation-harness (its context is too short)")
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        return Result(True, f"not compared under lm-evaluation-harness ({error.name} is missing)")
    manager, names = harness.find_tasks("hellaswag")
    theirs = HFLM(pretrained=exported.model, tokenizer=exported.tokenizer, batch_size=8)
    results = []
    nats = []
    with Processes("cpu") as processes, tempfile.TemporaryDirectory() as folder:
        items = make_items(page, model.config.block_size)
        lines = "".join(json.dumps(item) + "\n" for item in items)
        Path(folder, "hellaswag.jsonl").write_text(lines, encoding="utf-8")
        ours = harness.adapter(model, original.tokenizer, processes)
        for lm in (theirs, ours):
            tasks = harness.load_tasks(manager, names, folder)
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars
                found = harness.run_tasks(lm, tasks, bootstrap=0)
            if found["failed"]:
                return Result(False, f"lm_eval failed ({found['failed']})")
            results.append(found["results"])
            nats.append([request.resps[0][0] for task in tasks for request in task.instances])
    apart = (torch.tensor(nats[0]) - torch.tensor(nats[1])).abs().max().item()
    same = results[0] == results[1] and apart <= NATS
    verb = "agree" if same else "differ"
    return Result(same, f"lm_eval's adapter and ours {verb} on {N_ITEMS} items, log-likelihoods to "
                        f"{apart:.1e} nats")


def make_items(page: str, block_size: int) -> list[dict[str, Any]]:
    """N_ITEMS items for the harness's task hellaswag, from the short words of a page: a context and
    four endings, one of which follows it. An ending fits in the context length of any tokenizer."""
    words = [word for word in page.split() if word.isalpha() and len(word.encode()) < LONGEST_WORD]
    n = min(block_size // LONGEST_WORD, 5)  # words of an ending
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(words) - 20, (N_ITEMS, 4), generator=generator).tolist()
    items = []
    for i, (first, *others) in enumerate(starts):
        context = " ".join(words[first:first + 12])
        endings = [" ".join(words[start:start + n]) for start in (first + 12, *others)]
        label = i % 4
        endings[0], endings[label] = endings[label], endings[0]
        items.append({"ind": i, "activity_label": "Reading", "ctx_a": context, "ctx_b": "",
                      "endings": endings, "label": str(label)})
    return items
