"""The model card of an export, README.md: what the model is, how it was trained, how to load it.

Facts come from the checkpoint and, if it is in a run folder, from the files there. Unknown ones are
left out.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from lib.budget import hours_and_dollars, tokens_of
from lib.cli import BadInput
from lib.corpus import split_weight
from lib.files import read_json, read_text
from lib.huggingface import CUSTOM, export_class
from lib.logger import read_scalars
from lib.tokenizers import Tokenizer

Rows = list[tuple[str, str]]

CHOICES = {
    "mlp": {"gelu": "GELU", "swiglu": "SwiGLU", "relu2": "squared ReLU"},
    "norm": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"},
    "pos": {"learned": "learned positions", "rope": "rotary positions"},
}
SWITCHES = {
    "emb_norm": "post-embedding norm",
    "qk_norm": "query-key norm",
    "token_shift": "token shift",
    "value_residual": "value residual",
    "residual_scalars": "residual scalars",
    "bigram": "table of bigrams",
    "softcap": "soft-capped logits",
    "tie_embeddings": "tied embeddings",
    "bias": "biases",
}

LOAD = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({arguments})
tokenizer = AutoTokenizer.from_pretrained({arguments})
{prompt}
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```
"""
PROMPT = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
CHAT_PROMPT = """\
messages = [{"role": "user", "content": "What is a cat?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True,
    sanitize_control_tokens=True)"""
OWN_CODE = """
The model's code is `modeling_modern_gpt.py` in this folder: read its {lines} lines before you trust
it. It needs transformers 5.16 or newer.
"""
SOFT_CAP = """
trl's trainers compute a loss of their own that would leave out the soft cap on the logits, so they
refuse this model. With the model's loss:

```python
class Trainer(trl.SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        return transformers.Trainer.compute_loss(self, *args, **kwargs)
```
"""

LOAD_GGUF = """
```
ollama create {name} -f {name}.Modelfile && ollama run {name}
llama-cli -m {name}.gguf{jinja}
```
"""


class Loading(NamedTuple):
    """How an export is loaded."""

    metadata: str         # what the hub reads, YAML
    kind: tuple[str, str]  # a row of the table
    text: str             # of the section "Load it"


def in_transformers(c: Any, is_chat: bool) -> Loading:
    return Loading("library_name: transformers", ("class", export_class(c)),
                   how_to_load(c, is_chat))


def in_llamacpp(architecture: str, name: str, is_chat: bool) -> Loading:
    """name: of the GGUF file, without its suffix."""
    return Loading("tags:\n- gguf", ("architecture in llama.cpp", architecture),
                   LOAD_GGUF.format(name=name, jinja=" --jinja" if is_chat else ""))


def model_card(model: Any, tokenizer: Tokenizer, state: dict[str, Any], path: str | Path,
               loading: Loading, evaluations: Sequence[tuple[str, str, str]] = ()) -> str:
    """The text of README.md.

    state: the checkpoint. path: where it was read from. evaluations: (task, metric, value) each.
    """
    is_chat = bool(state.get("chat_template"))
    what = "A chat model" if is_chat else "A language model"
    total = model.parameter_counts()["total"]
    training = training_rows(state, Path(path).parent)
    name = Path(path).name
    if training:
        name = Path(path).resolve().parent.name
        what += " trained with `train_gpt2.py`"
    parts = [
        f"---\n{loading.metadata}\npipeline_tag: text-generation\n---\n",
        f"# {name}\n",
        f"{what}. It has {total:,} parameters. It imitates its training data, and "
        "its statements may be false.\n",
        table("model", [loading.kind, *model_rows(model, tokenizer)]),
    ]
    if training:
        parts.append(table("training", training))
    if evaluations:
        parts.append(evaluation_table(evaluations))
    parts.append("## Load it")
    parts.append(loading.text)
    return "\n".join(parts)


def table(title: str, rows: Rows) -> str:
    lines = [f"| {title} | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([*lines, ""])


def evaluation_table(evaluations: Sequence[tuple[str, str, str]]) -> str:
    lines = ["| evaluation | metric | value |", "|---|---|---:|"]
    lines += [f"| {task} | {metric} | {value} |" for task, metric, value in evaluations]
    return "\n".join([*lines, ""])


def model_rows(model: Any, tokenizer: Tokenizer) -> Rows:
    c = model.config
    counts = model.parameter_counts()
    parameters = f"{counts['total']:,}, of them {counts['embedding']:,} in embeddings"
    if counts["active"] < counts["total"]:
        parameters += f"; {counts['active']:,} active per token"
    names = [CHOICES[field][getattr(c, field)] for field in CHOICES]
    names += [name for field, name in SWITCHES.items() if getattr(c, field)]
    if c.n_experts:
        names.append(f"{c.n_experts} experts per layer, {c.n_active} active, {c.n_shared} shared")
    return [
        ("parameters", parameters),
        ("shape", f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}"),
        ("context", f"{c.block_size:,} tokens"),
        ("parts", ", ".join(names)),
        ("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"),
    ]


def how_to_load(c: Any, is_chat: bool) -> str:
    """Python code that loads the folder, and its requirements."""
    is_custom = export_class(c) == CUSTOM
    arguments = '"FOLDER"'
    if is_custom:
        arguments += ", trust_remote_code=True"
    text = LOAD.format(arguments=arguments, prompt=CHAT_PROMPT if is_chat else PROMPT)
    if is_custom:
        code = Path(__file__).with_name("modeling_modern_gpt.py").read_text(encoding="utf-8")
        text += OWN_CODE.format(lines=code.count("\n"))
        if c.softcap:
            text += SOFT_CAP
    return text


# --------------------------------------------------------------------------------------------------
# Training


def training_rows(state: dict[str, Any], folder: Path) -> Rows:
    """Text, tokens, loss and cost, from a checkpoint and its run folder."""
    step = state.get("step")
    settings = state.get("train_config")
    if not step or not isinstance(settings, dict):
        return []
    rows = []
    if settings.get("data"):
        rows.append(("text", ", ".join(map(describe_data, settings["data"]))))
    if settings.get("total_batch_size"):
        cfg = SimpleNamespace(**{"batch_warmup": 0} | settings)
        rows.append(("tokens", f"{tokens_of(step, cfg):,} in {step:,} steps"))
    rows += measured_rows(folder, step, settings.get("price_per_hour"))
    commit = run_commit(folder)
    if commit:
        rows.append(("commit", commit))
    return rows


def measured_rows(folder: Path, step: int, price: float | None) -> Rows:
    """Loss and cost, from the logs of a run folder."""
    rows = []
    losses = logged(folder, "val")
    if step in losses:
        rows.append(("validation loss", f"{losses[step]:.4f} nats per token"))
    accuracies = logged(folder, "hella")
    if step in accuracies:
        rows.append(("HellaSwag", f"{accuracies[step]:.4f}"))
    milliseconds: dict[int, float] = {}
    with contextlib.suppress(Exception):  # no events, or damaged ones
        milliseconds = read_scalars(folder).get("perf/step_ms", {})
    seconds = sum(ms for at, ms in milliseconds.items() if at <= step) / 1e3
    if seconds:
        rows.append(("cost", f"{hours_and_dollars(seconds, price)} (training steps only)"))
    return rows


def logged(folder: Path, kind: str) -> dict[int, float]:
    """{step: value} of one kind in a run's log.txt; empty without it."""
    try:
        text = read_text(folder / "log.txt", "name another")
    except BadInput:
        return {}
    lines = re.findall(rf"^(\d{{1,12}}) {kind} (\S+)$", text, re.MULTILINE)
    return {int(step): float(value) for step, value in lines}


def run_commit(folder: Path) -> str | None:
    """The commit of the code that a run started with."""
    try:
        starts = read_json(folder / "config.json", "name another")["starts"]
        return starts[-1].get("commit")
    except (BadInput, LookupError, TypeError, AttributeError):
        return None


def describe_data(word: str) -> str:
    """A path of --data, DIR[:WEIGHT] for shards -> its name and where its text comes from."""
    try:
        folder, weight = split_weight(word)
    except BadInput:  # a file of posttrain.py with a colon in its name
        folder, weight = word, None
    text = Path(folder).name
    if weight is not None:
        text += f" (weight {weight:g})"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        settings = json.loads(Path(folder, "meta.json").read_text())["settings"]
        sources = settings["source"]
        if isinstance(sources, list):
            sources = ", ".join(Path(source).name for source in sources)
        if sources and sources != text:
            text += f", from {sources}"
    return text
