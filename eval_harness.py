"""EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a
checkpoint.

    python eval_harness.py --checkpoint log/<run>              # a small set of tasks, --group small
    python eval_harness.py --checkpoint PATH --tasks hellaswag,arc_easy,wikitext --limit 200
    python eval_harness.py --model gpt2                        # a Hugging Face model
    torchrun --standalone --nproc_per_node=8 eval_harness.py --checkpoint PATH
    python eval_harness.py --compare log/a log/b log/hf_gpt2   # a table of runs and a bar chart

Needs requirements-dev.txt. Results are written to eval_<step>.json next to the checkpoint, or to
log/hf_<model>/eval.json. With --context N or --limit N they are partial and go to
eval_<step>_context<N>.json or eval_<step>_limit<N>.json; --compare only uses these if the file
itself is named.

Data comes from the Hugging Face hub, or with --data_dir DIR from jsonl files: <task>.jsonl (or
<task>_test, _val, _validation) with the columns that the harness's task reads, and
<task>_train.jsonl with examples for few-shot tasks. Files of arc_easy, arc_challenge, piqa,
lambada_openai and hellaswag may instead have the columns query, choices and gold; context and
continuation; or ctx only.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import dataclasses
import datetime
import io
import json
import math
import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lib import checkpoint, files
from lib.cli import BadInput, flag, parse, path_flag, run
from lib.devices import DTYPES, Processes, dtype_flag
from lib.evals import harness
from lib.huggingface import cache_only_without_network, register_custom
from lib.rope import ContextConfig, extend
from train_gpt2 import load_checkpoint

GROUPS = {"small": "hellaswag,arc_easy,piqa,lambada_openai,sciq"}
ORDER = "tasks in alphabetical order"  # of tables and charts
TABLES = ("results", "n-samples", "higher_is_better")  # of the harness's results, keyed by task
LONGEST_NAME = 242  # bytes; a file name has 255, and the temporary name adds an ending


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    # what is evaluated
    model: str | None = path_flag(  # type: ignore[assignment]
        None, "a Hugging Face model instead, by name or folder, with the harness's own adapter")
    tasks: str | None = flag(
        None, "comma-separated names of harness tasks, groups or tags; * matches any letters")
    group: Literal["small"] = flag("small", "a set of tasks, if --tasks is not given")
    limit: int | None = flag(
        None, "evaluate only the first N items of each task", at_least=1, at_most=10**9)
    data_dir: str | None = path_flag(
        None, "folder of <task>.jsonl to read instead of the Hugging Face hub")
    # how
    batch_size: int | Literal["auto"] = flag(
        "auto", f"sequences per forward pass; auto: {harness.BATCH_TOKENS} tokens per pass, "
                f"{harness.SEQUENCES} sequences when generating", at_least=1, at_most=65536)
    dtype: str = dtype_flag(", and a --model's own dtype")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")
    # output
    output: str | None = path_flag(
        None, "where to write the results as json; default: next to the checkpoint")
    compare: tuple[str, ...] | None = path_flag(
        None, "print and draw a table of these runs instead (run folders or results)")
    chart: str = path_flag("compare.png", "where --compare draws its bar chart")


# --------------------------------------------------------------------------------------------------
# Comparing runs


def read_results(path: str | Path) -> dict:
    """The results in a file written by --output. Raises BadInput if it has other content."""
    data = files.read_json(path, "name a run folder, or a file that --output wrote")
    if not is_results(data):
        raise BadInput(f"{path} has no results of eval_harness.py: name a run folder, or a "
                       "file written by --output")
    return data


def is_results(data: Any) -> bool:
    """Whether data has, for each of TABLES, a dict with one dict per task."""
    if not isinstance(data, dict):
        return False
    for key in TABLES:
        table = data.get(key)
        if not isinstance(table, dict):
            return False
        if not all(isinstance(row, dict) for row in table.values()):
            return False
    return True


def is_complete(data: dict) -> bool:
    """Whether results cover all items, with the context used in training."""
    config = data.get("config")
    if not isinstance(config, dict):
        return True
    return config.get("context") is None and config.get("limit") is None


def newest_results(path: str | Path) -> tuple[str, dict]:
    """A results file, or a run folder -> (name of run and step, results).

    In a folder, all eval_<step>*.json of the newest step are merged, without partial ones (with
    --context or --limit). Raises BadInput if there are none.
    """
    path = Path(path)
    where = path.resolve()
    if not os.path.isdir(path):
        return f"{where.parent.name}/{where.stem}", merge([read_results(path)])
    steps = {}
    for file in path.glob("eval*.json"):
        digits = re.sub(r"eval_?(\d*).*", r"\1", file.name)
        steps[file] = int(digits or 0)
    for step in sorted(set(steps.values()), reverse=True):
        of_step = [file for file in steps if steps[file] == step]
        of_step.sort(key=lambda file: file.lstat().st_mtime)
        complete = [data for data in map(read_results, of_step) if is_complete(data)]
        if complete:
            name = f"{where.name} {step}" if step else where.name
            return name, merge(complete)
    raise BadInput(f"{path} has no eval_<step>.json (those with --context or --limit do not "
                   "count): run eval_harness.py --checkpoint on a checkpoint there first, or name "
                   "a file")


def merge(parts: Iterable[dict]) -> dict[str, dict]:
    """Merge results of different tasks; later parts replace earlier ones."""
    merged: dict[str, dict] = {key: {} for key in TABLES}
    for data in parts:
        for key in TABLES:
            merged[key].update(data[key])
    return merged


def tabulate_runs(runs: list[tuple[str, dict]]) -> tuple[list[str], list[list[str]], list[str]]:
    """Pairs of (run, results) -> (headers, rows, notes on what is not comparable).

    One row per task and metric, in ORDER, since the order of merged files means nothing.
    """
    found: dict = {}  # (task, key), in the order of the harness
    for _, data in runs:
        for task, values in data["results"].items():
            for key in values:
                if "," in key and "_stderr," not in key:
                    found[task, key] = None
    metrics = sorted(found, key=lambda pair: pair[0])  # stable: keeps the order within a task
    rows = []
    for task, key in metrics:
        name = metric_name(runs, task, key)
        rows.append([task, name, *(cell(data, task, key) for _, data in runs)])
    notes = []
    for task in dict.fromkeys(task for task, _ in metrics):
        counts = {}
        for name, data in runs:
            if task in data["n-samples"]:
                counts[name] = data["n-samples"][task].get("effective")
        if len(set(map(str, counts.values()))) > 1:
            listed = ", ".join(f"{n} ({name})" for name, n in counts.items())
            notes.append(f"{task}: not the same items, {listed}")
    return ["task", "metric", *(name for name, _ in runs)], rows, notes


def metric_name(runs: list[tuple[str, dict]], task: str, key: str) -> str:
    """The harness's key of a metric as text: its name, its filter, and whether lower is better."""
    metric, _, kind = key.partition(",")
    name = metric if kind == "none" else f"{metric} ({kind})"
    for _, data in runs:
        if data["higher_is_better"].get(task, {}).get(metric) is False:
            return f"{name} (lower is better)"
    return name


def cell(data: dict, task: str, key: str) -> str:
    """A metric and its standard error as text; "" if the run lacks it."""
    value = four_digits(number(data, task, key))
    error = four_digits(number(data, task, key.replace(",", "_stderr,", 1)))
    return f"{value} ± {error}" if value and error else value


def four_digits(x: float) -> str:
    """A number as text; "" if it is nan."""
    if math.isnan(x):
        return ""
    return f"{x:.4f}" if abs(x) < 100 else f"{x:.0f}"


def number(data: dict, task: str, key: str) -> float:
    """A float of the results; nan if the run lacks the task, or the value is "N/A"."""
    value = data["results"].get(task, {}).get(key)
    return value if isinstance(value, float) and math.isfinite(value) else math.nan


def bar_chart(runs: list[tuple[str, dict]], path: str | Path) -> None:
    """Draw the runs' accuracies (normalized by length if the task has that) with standard errors.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    headlines = {}
    for _, data in runs:
        headlines.update(harness.headlines(data))
    bars = [(task, key) for task, key in sorted(headlines.items()) if "bits" not in key]
    width = min(max(6, 0.6 * len(bars) * (len(runs) + 1)), 200)
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.add_subplot()
    bar_width = 0.8 / len(runs)
    for i, (name, data) in enumerate(runs):
        offset = (i - (len(runs) - 1) / 2) * bar_width
        heights = [number(data, task, key) for task, key in bars]
        errors = [abs(number(data, task, key.replace(",", "_stderr,"))) for task, key in bars]
        axes.bar(np.arange(len(bars)) + offset, heights, bar_width, yerr=errors, capsize=2,
                 label=name)
    labels = [f"{task}\n{key.partition(',')[0]}" for task, key in bars]
    axes.set_xticks(range(len(bars)), labels)
    axes.set_ylabel("accuracy ± standard error")
    axes.set_xlabel(f"{ORDER}, bars in the order of --compare")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format=Path(path).suffix[1:] or "png")
    files.replace(path, lambda file: file.write(image.getvalue()))


def compare(paths: tuple[str, ...], chart: str) -> None:
    """Print a table of runs as text and as Markdown, and draw their accuracies."""
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise BadInput(harness.MISSING.format(error.name)) from error
    if os.path.lexists(chart) and not os.path.isfile(chart):  # a folder, or a device
        raise BadInput(f"{chart} exists and is not a regular file: name another --chart")
    runs = [newest_results(path) for path in paths]
    names = {name for name, _ in runs}
    if len(names) < len(runs):  # folders of equal names
        runs = [(path, data) for path, (_, data) in zip(paths, runs, strict=True)]
    headers, rows, notes = tabulate_runs(runs)
    align = ["left", "left"] + ["right"] * len(runs)
    for style in ("simple", "github"):
        table = tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=align)
        print(table, end="\n\n")
    order = f"rows: {ORDER}, metrics in the harness's order; columns in the order of --compare"
    print("\n".join([order, *notes]), end="\n\n")
    try:
        bar_chart(runs, chart)
    except ImportError:
        print("no chart: for matplotlib, pip install -r requirements-dev.txt")
        return
    except (OSError, ValueError) as error:  # ValueError: not the suffix of a picture
        raise BadInput(f"cannot write {chart} ({error}): name another --chart, for instance "
                       "compare.png") from error
    print(f"chart: {chart}")


# --------------------------------------------------------------------------------------------------
# Evaluating a model


def load_hugging_face(name: str, cfg: Config, processes: Processes) -> Any:
    """The harness's own language model for a --model. Raises BadInput if it cannot be loaded."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise BadInput(harness.MISSING.format(error.name)) from error
    on_cuda = processes.device.type == "cuda"
    if processes.world_size > 1 and not on_cuda:
        raise BadInput("--model runs in one CPU process only, a limit of the harness's adapter: "
                       "start one")
    if os.path.isdir(name):
        register_custom()
    else:
        cache_only_without_network()
    batch_size = cfg.batch_size
    if batch_size == "auto" and not on_cuda:
        batch_size = 8  # the harness would try 64 sequences first, slow and large on a CPU
    try:
        lm = HFLM(pretrained=name, device=str(processes.device), batch_size=batch_size,
                  dtype=DTYPES.get(cfg.dtype, "auto"))
        if not lm.tok_encode("text"):  # transformers accepts a folder without a tokenizer
            raise ValueError("it has no tokenizer.")
    except Exception as error:  # anything that the hub and transformers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"cannot load the Hugging Face model {name}: {reason} Give a folder "
                       "written by save_pretrained, with model and tokenizer") from error
    return lm


def pick_output(cfg: Config, context: ContextConfig) -> Path:
    """The file for the results. Raises BadInput if it cannot be written."""
    remedy = "name another --output"
    suffix = partial_suffix(cfg, context)
    source = Path(checkpoint.named(cfg))
    if cfg.output:
        output = Path(cfg.output)
    elif cfg.model:
        name = os.path.basename(os.path.normpath(source))
        output = Path("log", f"hf_{name}", f"eval{suffix}.json")
    elif os.path.isdir(source):  # made by export_hf.py
        output = source / f"eval{suffix}.json"
    else:
        step = source.stem.removeprefix("ckpt_").removeprefix("weights_")
        output = source.with_name(f"eval_{step}{suffix}.json")
    if os.path.lexists(output):
        if not (cfg.output or suffix):
            another = output.with_stem(f"{output.stem}_2")
            remedy += f", such as {another}, which --compare merges with it"
        raise BadInput(f"{output} exists: {remedy}")
    if len(os.fsencode(output.name)) > LONGEST_NAME:
        raise BadInput(f"{output.name[:40]}... is too long for a file name: {remedy}")
    files.make_folder(output.parent, remedy)
    return output


def partial_suffix(cfg: Config, context: ContextConfig) -> str:
    """The suffix in the file name of partial results."""
    suffix = ""
    if context.context:
        suffix += f"_context{context.context}"
    if context.rope_scaling != "plain":
        suffix += f"_{context.rope_scaling}"
    if cfg.limit:
        suffix += f"_limit{cfg.limit}"
    return suffix


def check_flags(cfg: Config, given: set[str]) -> None:
    """Raises BadInput on flags that do not go together."""
    if cfg.compare:
        others = sorted(given - {"compare", "chart"})
        if others:
            raise BadInput(f"--compare reads existing results: leave out "
                           f"--{' and --'.join(others)}, or evaluate first")
        return
    if "chart" in given:
        raise BadInput("--chart is for --compare: leave it out")
    checkpoint.named(cfg)
    if cfg.model and {"context", "rope_scaling"} & given:
        raise BadInput("--context and --rope_scaling are for a --checkpoint: leave them out")


def main(argv: list[str]) -> None:
    (cfg, context), given = parse((Config, ContextConfig), argv, __doc__)
    check_flags(cfg, given)
    if cfg.compare:
        compare(cfg.compare, cfg.chart)
        return
    if cfg.checkpoint:
        cfg = dataclasses.replace(cfg, checkpoint=checkpoint.pick(cfg.checkpoint))
    output = pick_output(cfg, context)
    wanted = GROUPS[cfg.group] if cfg.tasks is None else cfg.tasks
    manager, names = harness.find_tasks(wanted)
    with Processes(cfg.device) as processes:
        with processes.main_first():  # rank 0 downloads, the others find the files
            step = 0
            if cfg.checkpoint:
                model, tokenizer, state = load_checkpoint(cfg.checkpoint, dtype=cfg.dtype)
                extend(model, context)
                step = state.get("step", 0)
                lm = harness.adapter(model.to(processes.device), tokenizer, processes,
                                     cfg.batch_size, progress=processes.main)
            tasks = harness.load_tasks(manager, names, cfg.data_dir)
            if cfg.model:
                lm = load_hugging_face(cfg.model, cfg, processes)
        processes.check_same(step, checkpoint.DIFFERENT)
        seed_everything(harness.FEWSHOT_SEED)
        bootstrap = harness.BOOTSTRAP if processes.main else 0
        results = harness.run_tasks(lm, tasks, cfg.limit, bootstrap, progress=processes.main)
        if processes.main:
            save(results, output, dataclasses.asdict(cfg) | dataclasses.asdict(context))


def seed_everything(seed: int) -> None:
    """Seed all random generators of tasks, with the same seed on every process."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the generator that tasks use)
    torch.manual_seed(seed)


def save(results: dict, output: Path, config: dict) -> None:
    """Print the harness's table and write its results as JSON, atomically. Raises BadInput if a
    task failed."""
    from importlib.metadata import version

    from lm_eval.utils import handle_non_serializable, make_table

    failed = results.pop("failed")
    if results:
        print(make_table(results))
        results |= {
            "config": config,
            "lm_eval_version": version("lm_eval"),
            "torch_version": torch.__version__,
            "date": datetime.datetime.now().isoformat(" ", "seconds"),
        }
        text = json.dumps(results, indent=2, default=handle_non_serializable)
        try:
            files.replace(output, lambda file: file.write(text.encode()))
        except OSError as error:
            raise BadInput(f"cannot write {output} ({error.strerror}): free some disk space, then "
                           "start again") from error
        print(f"results: {output}")
    if failed:
        tasks = ", ".join(f"{task} ({reason})" for task, reason in failed.items())
        raise BadInput(f"no results of {tasks}: fix that, or leave it out of --tasks")


if __name__ == "__main__":
    run(main)
