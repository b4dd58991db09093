"""EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a
checkpoint.

    python eval_harness.py --checkpoint log/<run>                       # --group small: tasks that tell 124M models apart
    python eval_harness.py --checkpoint PATH --tasks hellaswag,arc_easy,wikitext --limit 200
    python eval_harness.py --model gpt2                                 # a Hugging Face model, the harness's own adapter
    torchrun --standalone --nproc_per_node=8 eval_harness.py --checkpoint PATH
    python eval_harness.py --compare log/a log/b log/hf_gpt2            # one table of runs, and a bar chart

Results go to eval_<step>.json beside the checkpoint, or log/hf_<model>/eval.json. Those with
--context N or --limit N, which do not stand for the whole, go to eval_<step>_context<N>.json or
eval_<step>_limit<N>.json: --compare takes them where it is given the file, not the run. Needs
requirements-dev.txt.

Data come from the Hugging Face hub, or from jsonl files: --data_dir DIR reads <task>.jsonl (or
<task>_test, _val, _validation) with the columns that the harness's task reads, and
<task>_train.jsonl, which few-shot tasks need for their examples. Files of arc_easy, arc_challenge,
piqa, lambada_openai and hellaswag may also hold query, choices and gold; context and continuation;
or ctx alone.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lib import checkpoint, files
from lib.cli import BadInput, flag, parse, path_flag, run
from lib.devices import Processes
from lib.evals import harness
from lib.huggingface import cache_only_without_network
from lib.rope import ContextConfig, extend
from train_gpt2 import load_checkpoint

GROUPS = {"small": "hellaswag,arc_easy,piqa,lambada_openai,sciq"}
ORDER = "tasks in alphabetical order"  # of tables and charts
TABLES = ("results", "n-samples", "higher_is_better"
          )  # of the harness's results, each a dict of one per task


@dataclass
class Config(checkpoint.ModelConfig):
    # what is evaluated
    model: str | None = path_flag(
        None, "a Hugging Face model instead, by name or folder, through the harness's own adapter")
    tasks: str | None = flag(
        None, "names of harness tasks, groups or tags, joined by commas; * matches any letters")
    group: Literal["small"] = flag("small", "a set of tasks, where --tasks is not given")
    limit: int | None = flag(None, "score only the first so many items of each task", at_least=1,
                             at_most=10**9)
    data_dir: str | None = path_flag(
        None, "folder of <task>.jsonl to read instead of the Hugging Face hub")
    # how
    batch_size: int | Literal["auto"] = flag(
        "auto", f"sequences per forward pass; auto: as many as make {harness.BATCH_TOKENS} tokens, "
                f"{harness.SEQUENCES} when generating", at_least=1, at_most=65536)
    dtype: Literal["auto", "float32"] = flag(
        "auto", "of matmuls; auto: bfloat16 where the GPU has it, and what a --model comes in")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")
    # what comes out
    output: str | None = path_flag(None, "results as json; without it, beside the checkpoint")
    compare: tuple[str, ...] | None = path_flag(
        None, "print one table of these runs (folders or results) instead, and draw it")
    chart: str = path_flag("compare.png", "where --compare draws its bars")


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def read_results(path):
    """What --output wrote, a dict. Raises BadInput if it is not that."""
    data = files.read_json(path, "name a run folder, or a file that --output wrote")
    tables = [data.get(key) if isinstance(data, dict) else None for key in TABLES]
    if not all(
            isinstance(table, dict) and all(isinstance(row, dict)
                                            for row in table.values())
            for table in tables):
        raise BadInput(
            f"{path} does not hold results of eval_harness.py: name a run folder, or a file that --output wrote"
        )
    return data


def is_whole(data):
    """Whether results are of all items, in the context trained with."""
    config = data.get("config")
    config = config if isinstance(config, dict) else {}
    return config.get("context") is None and config.get("limit") is None


def newest_results(path):
    """A results file, or all eval_<step>*.json of a run folder's newest step -> (name of run and
    step, results).

    Of a folder, those with a --context or --limit of their own are left out. Raises BadInput if
    there are none.
    """
    path, found, step = Path(path), [], 0
    if is_folder := os.path.isdir(path):
        steps = {
            file: int(re.match(r"eval_?(\d*)", file.name)[1] or 0)
            for file in path.glob("eval*.json")
        }
        for step in sorted(set(steps.values()), reverse=True):
            of_step = sorted((file for file in steps if steps[file] == step),
                             key=lambda file: file.lstat().st_mtime)
            if found := [data for data in map(read_results, of_step) if is_whole(data)]:
                break
    else:
        found = [read_results(path)]
    if not found:
        raise BadInput(f"{path} holds no eval_<step>.json (those with --context or --limit do not count): run eval_harness.py "
                       "--checkpoint on a checkpoint there first, or name a file")
    merged = {
        key: {name: row for data in found for name, row in data[key].items()} for key in TABLES
    }
    where = path.resolve()
    return (where.name + (f" {step}" if step else "")
            if is_folder else f"{where.parent.name}/{where.stem}"), merged


def tabulate_runs(runs):
    """list of (run, results) -> (headers, rows of str, lines on what is not comparable).

    One row per task and metric, in ORDER: files are joined by their age, which means nothing here.
    """
    keys = dict.fromkeys((task, key)
                         for _, data in runs
                         for task, values in data["results"].items()
                         for key in values
                         if "," in key and "_stderr," not in key)
    keys = sorted(keys, key=lambda key: key[0])  # stable: metrics stay as they are
    rows, notes = [], []
    for task, key in keys:
        metric, _, kind = key.partition(",")
        smaller = any(data["higher_is_better"].get(task, {}).get(metric) is False
                      for _, data in runs)
        row = [
            task, metric + (f" ({kind})" if kind != "none" else "") +
            (" (lower is better)" if smaller else "")
        ]
        for _, data in runs:
            value, error = (number(data, task, name) for name in (key, f"{metric}_stderr,{kind}"))
            value, error = ("" if math.isnan(x) else f"{x:.{4 if abs(x) < 100 else 0}f}"
                            for x in (value, error))
            row.append(f"{value} ± {error}" if value and error else value)
        rows.append(row)
    for task in dict.fromkeys(task for task, _ in keys):
        counts = {
            name: data["n-samples"][task].get("effective")
            for name, data in runs
            if task in data["n-samples"]
        }
        if len(set(map(str, counts.values()))) > 1:
            notes.append(f"{task}: not the same items, "
                         + ", ".join(f"{n} ({name})" for name, n in counts.items()))
    return ["task", "metric", *(name for name, _ in runs)], rows, notes


def number(data, task, key):
    """A float among the results, or nan: a task that a run lacks, a standard error of "N/A"."""
    value = data["results"].get(task, {}).get(key)
    return value if isinstance(value, float) and math.isfinite(value) else math.nan


def bar_chart(runs, path):
    """Draw a bar chart of the runs' accuracies (normalized by length where the task has it) with
    standard errors."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    bars = {
        task: key
        for _, data in runs
        for task, key in harness.headlines(data).items()
        if "bits" not in key
    }
    bars = dict(sorted(bars.items()))
    figure = Figure(figsize=(min(max(6, 0.6 * len(bars) * (len(runs) + 1)), 200), 4),
                    layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(runs)
    for i, (name, data) in enumerate(runs):
        height = [number(data, task, key) for task, key in bars.items()]
        error = [
            abs(number(data, task, key.replace(",", "_stderr,"))) for task, key in bars.items()
        ]
        axes.bar(
            np.arange(len(bars)) + (i - (len(runs) - 1) / 2) * width, height, width, yerr=error,
            capsize=2, label=name)
    axes.set_xticks(range(len(bars)),
                    [f"{task}\n{key.partition(',')[0]}" for task, key in bars.items()])
    axes.set_ylabel("accuracy ± standard error")
    axes.set_xlabel(f"{ORDER}, bars in that of --compare")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=Path(path).suffix[1:] or "png")
    files.replace(path, lambda file: file.write(picture.getvalue()))


def compare(paths, chart):
    """Print one table of runs as text and as markdown, and draw their accuracies."""
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise BadInput(harness.MISSING.format(error.name)) from error
    if os.path.lexists(chart) and not os.path.isfile(chart):  # a folder, or a device as /dev/null
        raise BadInput(f"{chart} exists and is not a regular file: name another --chart")
    runs = [newest_results(path) for path in paths]
    if len({name for name, _ in runs}) < len(runs):  # folders of one name
        runs = [(path, data) for path, (_, data) in zip(paths, runs, strict=True)]
    headers, rows, notes = tabulate_runs(runs)
    for style in ("simple", "github"):
        align = ["left"] * 2 + ["right"] * len(runs)
        print(tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=align),
              end="\n\n")
    order = f"rows: {ORDER}, metrics as the harness lists them; columns as given to --compare"
    print("\n".join([order, *notes]), end="\n\n")
    try:
        bar_chart(runs, chart)
    except ImportError:
        print("no chart: pip install -r requirements-dev.txt has matplotlib")
        return
    except (OSError, ValueError) as error:  # ValueError: not the ending of a picture
        raise BadInput(
            f"cannot write {chart} ({error}): name another --chart, for instance compare.png"
        ) from error
    print(f"chart: {chart}")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def load_hugging_face(cfg, processes):
    """--model -> the harness's own language model for it. Raises BadInput if it cannot be loaded.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise BadInput(harness.MISSING.format(error.name)) from error
    if processes.world_size > 1 and processes.device.type != "cuda":
        raise BadInput("the harness's adapter for --model runs on one CPU process only: start one")
    if not os.path.isdir(cfg.model):
        cache_only_without_network()
    # the harness finds the largest batch by trying, 64 sequences first: on a CPU that would be slow
    # and large
    batch_size = 8 if cfg.batch_size == "auto" and processes.device.type != "cuda" else cfg.batch_size
    try:
        lm = HFLM(pretrained=cfg.model, device=str(processes.device), batch_size=batch_size,
                  dtype=cfg.dtype)
        if not lm.tok_encode("text"):  # what transformers makes of a folder without a tokenizer
            raise ValueError("it has no tokenizer.")
    except Exception as error:  # whatever the hub and the readers of its formats raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"cannot load the Hugging Face model {cfg.model}: {reason} Give a folder that save_pretrained made, "
                       "model and tokenizer") from error
    return lm


def pick_output(cfg, context):
    """Settings -> where the results go. Raises BadInput if they cannot go there."""
    remedy = "name another --output"
    part = f"_context{context.context}" if context.context else ""
    part += f"_{context.rope_scaling}" if context.rope_scaling != "plain" else ""
    part += f"_limit{cfg.limit}" if cfg.limit else ""
    if cfg.output:
        output = Path(cfg.output)
    elif cfg.model:
        name = os.path.basename(os.path.normpath(cfg.model))
        output = Path("log", f"hf_{name}", f"eval{part}.json")
    elif os.path.isdir(cfg.checkpoint):  # one that export_hf.py made
        output = Path(cfg.checkpoint, f"eval{part}.json")
    else:
        path = Path(cfg.checkpoint)
        output = path.with_name(f"eval_{path.stem.removeprefix('ckpt_')}{part}.json")
    if os.path.lexists(output):
        more = "" if cfg.output or part else f", as {output.with_stem(f'{output.stem}_2')}, which --compare joins with it"
        raise BadInput(f"{output} exists: {remedy}{more}")
    if len(os.fsencode(output.name)) > 242:  # 255 with the ending of the temporary name
        raise BadInput(f"{output.name[:40]}... is too long for the name of a file: {remedy}")
    files.make_folder(output.parent, remedy)
    return output


def main(argv):
    (cfg, context), given = parse((Config, ContextConfig), argv, __doc__)
    if cfg.compare:
        if others := sorted(given - {"compare", "chart"}):
            raise BadInput(
                f"--compare reads results that are there: leave out --{' and --'.join(others)}, or evaluate first"
            )
        return compare(cfg.compare, cfg.chart)
    if "chart" in given:
        raise BadInput("--chart is for --compare: leave it out")
    checkpoint.named(cfg)
    if cfg.model and {"context", "rope_scaling"} & given:
        raise BadInput("--context and --rope_scaling are for a --checkpoint: leave them out")
    if cfg.checkpoint:
        cfg.checkpoint = checkpoint.pick(cfg.checkpoint)
    output = pick_output(cfg, context)
    manager, names = harness.find_tasks(GROUPS[cfg.group] if cfg.tasks is None else cfg.tasks)
    with Processes(cfg.device) as processes:
        with processes.main_first():  # the first to load downloads, the others find
            step = 0
            if cfg.checkpoint:
                model, tokenizer, state = load_checkpoint(cfg.checkpoint)
                extend(model, context)
                step = state.get("step", 0)
            tasks = harness.load_tasks(manager, names, cfg.data_dir)
            lm = (harness.adapter(model.to(processes.device), tokenizer, processes, cfg.batch_size,
                                  cfg.dtype, processes.main)
                  if cfg.checkpoint else load_hugging_face(cfg, processes))
        processes.check_same(step, checkpoint.DIFFERENT)
        for seed in (random.seed, np.random.seed,
                     torch.manual_seed):  # for tasks that draw, the same on every process
            seed(harness.FEWSHOT_SEED)
        results = harness.run_tasks(lm, tasks, cfg.limit, harness.BOOTSTRAP if processes.main else 0,
                                   processes.main)
        if processes.main:
            save(results, output, dataclasses.asdict(cfg) | dataclasses.asdict(context))
    return None


def save(results, output, config):
    """Print the harness's table and write its results as JSON, whole or not at all. Raises BadInput
    where a task failed."""
    from importlib.metadata import version

    from lm_eval.utils import handle_non_serializable, make_table

    failed = results.pop("failed")
    if results:
        print(make_table(results))
        results |= {
            "config": config, "lm_eval_version": version("lm_eval"),
            "torch_version": torch.__version__,
            "date": datetime.datetime.now().isoformat(" ", "seconds")
        }
        text = json.dumps(results, indent=2, default=handle_non_serializable)
        try:
            files.replace(output, lambda file: file.write(text.encode()))
        except OSError as error:
            raise BadInput(
                f"cannot write {output} ({error.strerror}): free some disk space, then start again"
            ) from error
        print(f"results: {output}")
    if failed:
        tasks = ", ".join(f"{task} ({reason})" for task, reason in failed.items())
        raise BadInput(f"no results of {tasks}: mend that, or leave it out of --tasks")


if __name__ == "__main__":
    run(main)
