"""Checkpoints under EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness): its prompts, its metrics.

    python eval_harness.py --checkpoint log/<run>/ckpt_<step>.pt              # --group small: tasks that tell 124M models apart
    python eval_harness.py --checkpoint PATH --tasks hellaswag,arc_easy,wikitext --limit 200
    python eval_harness.py --model gpt2                                       # a Hugging Face model, the harness's own adapter
    torchrun --standalone --nproc_per_node=8 eval_harness.py --checkpoint PATH
    python eval_harness.py --compare log/a log/b log/hf_gpt2                  # one table of runs, and a bar chart

Results go to eval_<step>.json beside the checkpoint, or log/hf_<model>/eval.json. Needs pip install -r requirements-dev.txt.

Data come from the Hugging Face hub, or from jsonl files: --data_dir DIR reads <task>.jsonl (or <task>_test, _val, _validation)
with the columns that the harness's task reads, and <task>_train.jsonl, which few-shot tasks need for their examples. Files of arc_easy,
arc_challenge, piqa, lambada_openai and hellaswag may also hold query, choices and gold; context and continuation; or ctx alone.
"""

import dataclasses
import datetime
import difflib
import json
import logging
import math
import os
import re
import sys
import tempfile
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from hellaswag import split_context
from lib import checkpoint
from lib.cli import BadInput, RankError, flag, parse, run
from lib.decoding import draw, generate
from lib.devices import Processes, autocast
from lib.evals.scoring import score

GROUPS = {"small": "hellaswag,arc_easy,piqa,lambada_openai,sciq"}
BATCH_TOKENS = 8_192  # tokens a forward pass, padding included; in rolling tasks each of them has logits, 4 bytes an id
SEQUENCES = 32        # texts generated side by side
METRICS = ("acc_norm,none", "acc,none", "exact_match,none", "bits_per_byte,none")  # the first a task has stands for it, else any
FEWSHOT_SEED = 1234   # the harness's own
BOOTSTRAP = 1000      # resamplings for the standard error of a perplexity; the harness's 100,000 take minutes for lambada
FOLDERS = ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "super_glue/boolq", "wikitext", "winogrande")  # the
# harness's that are looked through first: reading all its 14,000 tasks takes 10 s
MISSING = "missing {}: pip install -r requirements-dev.txt"


@dataclass
class Config:
    # what is evaluated
    checkpoint: str | None = flag(None, "a ckpt_<step>.pt of this project")
    model: str | None = flag(None, "a Hugging Face model instead, by name or folder, through the harness's own adapter")
    tasks: str | None = flag(None, "names of harness tasks, groups or tags, joined by commas; * matches any letters")
    group: Literal["small"] = flag("small", "a set of tasks, where --tasks is not given")
    limit: int | None = flag(None, "score the first so many items of each task only")
    data_dir: str | None = flag(None, "folder of <task>.jsonl to read instead of the Hugging Face hub")
    # how
    batch_size: int | Literal["auto"] = flag(
        "auto", f"sequences a forward pass; auto: as many as make {BATCH_TOKENS} tokens, {SEQUENCES} when generating")
    dtype: Literal["auto", "float32"] = flag("auto", "of products; auto: bfloat16 where the GPU has it, and what a --model comes in")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")
    # what comes out
    output: str | None = flag(None, "results as json; without it, beside the checkpoint")
    compare: tuple[str, ...] | None = flag(None, "print one table of these runs (folders or results) instead, and draw it")
    chart: str = flag("compare.png", "where --compare draws its bars")


# ----------------------------------------------------------------------------------------------------------------------
# The adapter


def adapter(model, tokenizer, processes, batch_size="auto", dtype="auto", progress=True, stopped=lambda: False):
    """A GPT in evaluation mode and its Tokenizer as the harness's language model (lm_eval.api.model.TemplateLM).

    The harness gives each process its share of the items and gathers the results on rank 0. generate_until takes greedy
    decoding and temperature, stop strings and max_gen_toks of a task's generation settings. Once `stopped` says so, what is left of
    the items is not computed, so that all processes come to an end soon; the results are then worth nothing. progress: bars, on rank 0.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text

    window, silent = model.config.block_size, processes.rank > 0 or not progress

    class GPTLM(TemplateLM):
        eot_token_id = tokenizer.eot  # also what stands before a text without context: documents begin with it in training
        max_length, max_gen_toks = window, 256  # 256: the default of the harness's Hugging Face adapter

        def __init__(self):
            super().__init__()
            self._rank, self._world_size, self._device = processes.rank, processes.world_size, processes.device

        def precision(self):
            return nullcontext() if dtype == "float32" else autocast(self.device)

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string).tolist()

        def _encode_pair(self, context, continuation):
            ids, targets = super()._encode_pair(context, continuation)
            if not targets:  # tokens merged across the join: the continuation is scored as it is by itself
                ids, targets = self.tok_encode(context), self.tok_encode(continuation)
            return ids or [self.eot_token_id], targets  # a context of spaces moves to the continuation as a whole

        def loglikelihood(self, requests, disable_tqdm=False):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or silent)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            return self.scores([(context, targets) for _, context, targets in requests], disable_tqdm)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            pairs = [([self.eot_token_id], self.tok_encode(request.args[0])) for request in requests]
            return [nats for nats, _ in self.scores(pairs, disable_tqdm or silent)]

        def scores(self, pairs, silent):
            with self.precision():
                nats, greedy = score(model, pairs, window, self.device, BATCH_TOKENS, None if batch_size == "auto" else batch_size,
                                     not silent, stopped)
            return list(zip(nats.tolist(), greedy.tolist()))

        def generate_until(self, requests, disable_tqdm=False):
            collator = Collator([request.args for request in requests], sort_fn=lambda args: -len(args[0]),
                                group_fn=lambda args: args[1], group_by="gen_kwargs")
            texts, bar = [], tqdm(total=len(requests), desc="generating", disable=disable_tqdm or silent)
            for batch in collator.get_batched(n=SEQUENCES if batch_size == "auto" else batch_size):
                kwargs = normalize_gen_kwargs(batch[0][1], self.max_gen_toks)
                until, limit = [stop for stop in kwargs["until"] if stop], kwargs["max_gen_toks"]
                room = window - limit if limit < window else window // 2  # the harness leaves room for all that is to come
                prompts = [(self.tok_encode(context) or [self.eot_token_id])[-room:] for context, _ in batch]
                temperature = kwargs.get("temperature", 1.0) if kwargs["do_sample"] else 0.0
                texts += [postprocess_generated_text(text, until, None) for text in self.write(prompts, limit, until, temperature)]
                bar.update(len(batch))
            bar.close()
            return collator.get_original(texts)

        def write(self, prompts, limit, until, temperature):
            """Prompts (lists of ids) -> their continuations (str), up to the end of text, side by side.

            All begin together with what the shortest holds; a longer one is given its next token while it has one, instead of the
            model's. So nothing is padded, and every position is the one it would have alone.
            """
            shortest, texts = min(map(len, prompts)), [None] * len(prompts)
            idx = torch.tensor([ids[:shortest] for ids in prompts], device=self.device)
            given = torch.full((len(prompts), max(map(len, prompts)) - shortest), -1)
            for row, ids in zip(given, prompts, strict=True):
                row[:len(ids) - shortest] = torch.tensor(ids[shortest:])
            given = iter(given.T[..., None].to(self.device))  # (B, 1) each

            def choose(logits):
                new, own = draw(logits, temperature), next(given, None)
                return new if own is None else torch.where(own < 0, new, own)

            def done(idx):
                for i, (row, prompt) in enumerate(zip(idx.tolist(), prompts, strict=True)):
                    if texts[i] is None and (ids := row[len(prompt):]):
                        ended = ids[-1] == self.eot_token_id
                        text = tokenizer.decode(ids[:-1] if ended else ids)
                        if ended or len(ids) == limit or any(stop in text for stop in until):
                            texts[i] = text
                return None not in texts or stopped()

            with self.precision():
                generate(model, idx, max(map(len, prompts)) - shortest + limit, choose, done)
            return [text or "" for text in texts]

        def all_gather(self, tensor):
            parts = [torch.empty_like(tensor) for _ in range(processes.world_size)]
            dist.all_gather(parts, tensor)
            return torch.stack(parts)

        def gather_object(self, obj, dst=0):
            parts = [None] * processes.world_size if processes.rank == dst else None
            dist.gather_object(obj, parts, dst=dst)
            return parts

        def barrier(self):
            processes.barrier()

    return GPTLM()


def load_hugging_face(cfg, processes):
    """--model -> the harness's own language model for it. Raises BadInput if there is none."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise BadInput(MISSING.format(error.name)) from error
    if processes.world_size > 1 and processes.device.type != "cuda":
        raise BadInput("the harness's adapter for --model shares out nothing on a CPU: start one process")
    # the harness finds the largest batch by trying, 64 sequences first: on a CPU that would be slow and large
    batch_size = 8 if cfg.batch_size == "auto" and processes.device.type != "cuda" else cfg.batch_size
    try:
        lm = HFLM(pretrained=cfg.model, device=str(processes.device), batch_size=batch_size, dtype=cfg.dtype)
        if not lm.tok_encode("text"):  # what transformers makes of a folder without a tokenizer
            raise ValueError("it has no tokenizer.")
    except Exception as error:  # whatever the hub and the readers of its formats raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"cannot load the Hugging Face model {cfg.model}: {reason} Give a folder that save_pretrained made, model and "
                       "tokenizer") from error
    return lm


# ----------------------------------------------------------------------------------------------------------------------
# Tasks


def task_manager(names):
    """The harness's index of tasks, with these names if it has them. Raises BadInput where the harness is not installed."""
    try:
        from lm_eval import tasks
    except ImportError as error:
        raise BadInput(MISSING.format(error.name)) from error
    folders = [Path(tasks.__file__).parent / folder for folder in FOLDERS]
    some = tasks.TaskManager(include_defaults=False, include_path=folders)
    return some if set(names) <= some.task_index.keys() else tasks.TaskManager()


def find_tasks(names):
    """Names joined by commas, with * -> (the harness's task manager, list of the names it knows).

    Raises BadInput on an unknown one, with the nearest known ones.
    """
    names, found = [name.strip() for name in names.split(",") if name.strip()], []
    manager = task_manager(names)
    for name in names:
        known = manager.match_tasks([name])
        if not known:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise BadInput(f"unknown task {name!r}: " + (f"did you mean {', '.join(near)}?" if near else "see lm_eval ls tasks"))
        found += known
    if not found:
        raise BadInput("no task is named: see lm_eval ls tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every item that is longer than the window
    return manager, list(dict.fromkeys(found))


def load_tasks(manager, names, data_dir=None):
    """Names the harness knows -> its Task and Group objects with their data, from the hub or from jsonl files in data_dir.

    Raises BadInput where the data cannot be had or do not fit the task.
    """
    if data_dir is None:
        several = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        try:
            loaded = manager.load(names)
        except ImportError as error:
            raise BadInput(f"{several}: something is missing ({str(error)[:100]}): pip install it") from error
        except Exception as error:  # whatever the hub, the network and the data's own code raise
            raise BadInput(f"cannot load the data of {several} ({type(error).__name__}): connect to the internet once, or give a folder of "
                           "<task>.jsonl by --data_dir, in training by --eval_tasks_dir") from error
        inside = {child for children in loaded.get("group_map", {}).values() for child in children}
        return [item for name, item in {**loaded.get("groups", {}), **loaded["tasks"]}.items() if name not in inside]
    import datasets

    datasets.disable_progress_bars()  # each jsonl file would draw three
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said below
    if not os.path.isdir(data_dir):
        raise BadInput(f"no folder {data_dir}: it should hold <task>.jsonl")
    singles, tasks = set(manager.all_subtasks), []
    for name in names:
        if name not in singles:
            raise BadInput(f"--data_dir takes single tasks, and {name} is a set of them: name its tasks")
        file = find_file(data_dir, name, ("", "_test", "_val", "_validation"))
        if file is None:
            there = ", ".join(sorted(path.name for path in Path(data_dir).glob("*.jsonl"))) or "no jsonl files"
            raise BadInput(f"no {name}.jsonl in {data_dir}, which holds {there}: add it, or name other tasks")
        try:  # a task by reference takes the harness's configuration and changes what stands here; only groups hold references
            local = {"group": "local", "task": [{"task": name, **local_config(name, file, find_file(data_dir, name, ("_train",)))}]}
            tasks += manager.load(local)["tasks"].values()
        except Exception as error:  # whatever the data's reader, the task's templates and its code raise
            while error.__cause__:
                error = error.__cause__
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else 'nothing in it'}"
            raise BadInput(f"{file} does not fit the task {name} ({reason}): give it the columns of "
                           f"{manager.task_index[name].cfg.get('dataset_path')}, one item a line") from error
        task = tasks[-1]
        if task.config.num_fewshot and not task.config.fewshot_split and not task.fewshot_cfg.samples:  # from the items themselves
            raise BadInput(f"{name} shows {task.config.num_fewshot} examples before each item: add {name}_train.jsonl to {data_dir}")
    return tasks


def find_file(folder, task, endings):
    """The first <task><ending>.jsonl there is in the folder, or None."""
    return next((path for ending in endings if (path := Path(folder) / f"{task}{ending}.jsonl").is_file()), None)


def local_config(task, file, train=None):
    """What changes in the harness's configuration of a task so that its items come from a jsonl file: a dict of fields."""
    files = {"test": str(file)} | ({"train": str(train)} if train else {})
    config = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "test_split": "test",
              "validation_split": None, "training_split": "train" if train else None, "fewshot_split": "train" if train else None}
    with open(file, encoding="utf-8") as lines:
        first = json.loads(next(filter(str.strip, lines), "{}"))
    column, convert = COLUMNS.get(task, (None, None))
    if convert is None or column in first:
        return config

    def process_docs(dataset):
        dataset = dataset.map(convert, remove_columns=dataset.column_names)
        if task == "hellaswag":
            from lm_eval.tasks.hellaswag import utils  # the one of these tasks with processing of its own
            return utils.process_docs(dataset)
        return dataset

    return config | {"process_docs": process_docs}


def question(item):
    return item["query"].removeprefix("Question:").strip()


def arc(item):
    letters = "ABCDEFGH"[:len(item["choices"])]
    return {"question": question(item), "choices": {"text": item["choices"], "label": list(letters)}, "answerKey": letters[item["gold"]]}


def piqa(item):
    return {"goal": question(item), "sol1": item["choices"][0], "sol2": item["choices"][1], "label": item["gold"]}


def lambada(item):
    return {"text": f"{item['context']} {item['continuation']}"}


def hellaswag(item):
    return {**item, **dict(zip(("ctx_a", "ctx_b"), split_context(item["ctx"]), strict=True))}


# task -> (a column the harness's data have, an item of common jsonl collections (llm-foundry's) -> the harness's columns)
COLUMNS = {"arc_easy": ("question", arc), "arc_challenge": ("question", arc), "piqa": ("goal", piqa),
           "lambada_openai": ("text", lambada), "hellaswag": ("ctx_a", hellaswag)}


def check_tasks(tasks, world, limit=None):
    """Raises BadInput if the harness could not run what load_tasks returned on `world` processes."""
    for item in tasks:
        for task in item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]:
            if world > 1 and (n := min(len(task.eval_docs), limit or math.inf)) < world:  # one without items would not be survived
                raise BadInput(f"{task.task_name}: {n} items for {world} processes: raise the limit or start fewer processes")
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise BadInput(f"{task.task_name} runs code that a model wrote, or shows it pictures: name other tasks")


def evaluate(lm, manager, tasks, limit=None, bootstrap=BOOTSTRAP, progress=True):
    """The harness's results (dict; None but on rank 0) of a language model on what load_tasks returned and check_tasks let pass.

    bootstrap: resamplings for the standard errors that need them; 0: no standard errors. progress: the harness's bar over its prompts,
    on rank 0. A task that fails loses no other's results: why it did stands under "failed". Of several processes one may fail while
    the others wait for its results: then it raises RankError.
    """
    from lm_eval import evaluator, utils
    from lm_eval.api import task as building

    os.environ["DISABLE_MULTIPROC"] = "1"  # or a metric's bootstrap forks a process a core, for a second of work, and signals them
    if "from_string" not in vars(utils.env):  # the harness compiles its templates for every item anew, most of its own time
        utils.env.from_string = cache(utils.env.from_string)
    building.tqdm = partial(tqdm, disable=lm.rank > 0 or not progress)  # else it draws one in every process, training or not
    results, gather, gathered = {"failed": {}}, lm.gather_object, []

    def note(*args, **kwargs):  # up to here, in each task, the others wait for what a process that failed would bring
        parts = gather(*args, **kwargs)
        gathered.append(True)
        return parts

    lm.gather_object = note
    for item in tasks:
        loaded = manager.load([item])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        gathered.clear()
        try:
            with redirect_stdout(sys.stderr):  # it announces bootstraps
                part = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=bootstrap, log_samples=False) or {}
        except Exception as error:  # an item that does not fit, too little memory, what a metric makes of a strange model
            name = next(iter(loaded["groups"] or loaded["tasks"]))
            reason = f"{type(error).__name__}: {str(error)[:100]}"
            if isinstance(error, torch.OutOfMemoryError):
                reason = "out of memory: eval_harness.py with a smaller --batch_size takes less"
            if lm.world_size > 1 and not gathered:
                raise RankError(f"no result of {name} ({reason}): mend that, or leave {name} out") from error
            part = {"failed": {name: reason}}
        for key, value in part.items():
            results[key] = results.get(key, {}) | value if isinstance(value, dict) else value
    lm.gather_object = gather
    return results if lm.rank == 0 else None


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def newest_results(path):
    """A results file, or all eval_<step>*.json of a run folder's newest step together -> (name of the run and step, results).

    Raises BadInput if it is none.
    """
    path, files, step = Path(path), [Path(path)], 0
    if path.is_dir():
        steps = {file: int(re.match(r"eval_?(\d*)", file.name)[1] or 0) for file in path.glob("eval*.json")}
        step = max(steps.values(), default=0)
        files = sorted((file for file in steps if steps[file] == step), key=lambda file: file.stat().st_mtime)
    if not files:
        raise BadInput(f"no eval_<step>.json in {path}: run eval_harness.py --checkpoint on a checkpoint there first")
    merged = {}
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            for key in ("results", "n-samples", "higher_is_better"):
                merged[key] = merged.get(key, {}) | data[key]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{file} holds no results of eval_harness.py ({type(error).__name__}): name a run folder, or a file that "
                           "--output wrote") from error
    where = path.resolve()
    return (where.name + (f" {step}" if step else "") if path.is_dir() else f"{where.parent.name}/{where.stem}"), merged


def headlines(results):
    """The harness's results -> dict task -> the key of the metric that stands for it."""
    keys = {task: next((key for key in (*METRICS, *values) if isinstance(values.get(key), float) and "_stderr" not in key), None)
            for task, values in results.get("results", {}).items()}
    return {task: key for task, key in keys.items() if key}


def tabulate_runs(runs):
    """list of (run, results) -> (headers, rows of str), a row a task and metric, and lines on what is not comparable."""
    keys = dict.fromkeys((task, key) for _, data in runs for task, values in data["results"].items() for key in values
                         if "," in key and "_stderr," not in key)
    rows, notes = [], []
    for task, key in keys:
        metric, _, kind = key.partition(",")
        smaller = any(data["higher_is_better"].get(task, {}).get(metric) is False for _, data in runs)
        row = [task, metric + (f" ({kind})" if kind != "none" else "") + (" (lower is better)" if smaller else "")]
        for _, data in runs:
            value, error = (data["results"].get(task, {}).get(name) for name in (key, f"{metric}_stderr,{kind}"))
            value, error = (f"{number:.{4 if abs(number) < 100 else 0}f}" if isinstance(number, float) else "" for number in (value, error))
            row.append(f"{value} ± {error}" if value and error else value)
        rows.append(row)
    for task in dict.fromkeys(task for task, _ in keys):
        counts = {name: data["n-samples"][task]["effective"] for name, data in runs if task in data["n-samples"]}
        if len(set(counts.values())) > 1:
            notes.append(f"{task}: not the same items, " + ", ".join(f"{n} ({name})" for name, n in counts.items()))
    return ["task", "metric", *(name for name, _ in runs)], rows, notes


def bar_chart(runs, path):
    """A bar chart of the runs' accuracies (normalized by length where the task has it) with standard errors."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    bars = {task: key for _, data in runs for task, key in headlines(data).items() if "bits" not in key}
    figure = Figure(figsize=(max(6, 0.6 * len(bars) * (len(runs) + 1)), 4), layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(runs)
    for i, (name, data) in enumerate(runs):
        values = [[data["results"].get(task, {}).get(k) for k in (key, key.replace(",", "_stderr,"))] for task, key in bars.items()]
        height, error = ([v if isinstance(v, float) else float("nan") for v in column] for column in zip(*values)) if values else ([], [])
        axes.bar(np.arange(len(bars)) + (i - (len(runs) - 1) / 2) * width, height, width, yerr=error, capsize=2, label=name)
    axes.set_xticks(range(len(bars)), [f"{task}\n{key.partition(',')[0]}" for task, key in bars.items()])
    axes.set_ylabel("accuracy ± standard error")
    axes.legend()
    figure.savefig(path, dpi=150)


def compare(paths, chart):
    """Print one table of runs as text and as markdown, and draw their accuracies."""
    try:
        import matplotlib  # noqa: F401, bar_chart needs it
        from tabulate import tabulate
    except ImportError as error:
        raise BadInput(MISSING.format(error.name)) from error
    runs = [newest_results(path) for path in paths]
    if len({name for name, _ in runs}) < len(runs):  # folders of one name
        runs = [(path, data) for path, (_, data) in zip(paths, runs, strict=True)]
    headers, rows, notes = tabulate_runs(runs)
    for style in ("simple", "github"):
        print(tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=["left"] * 2 + ["right"] * len(runs)), end="\n\n")
    print("\n".join(notes), end="\n\n" if notes else "")
    try:
        bar_chart(runs, chart)
    except (OSError, ValueError) as error:  # ValueError: an ending that is no picture's
        raise BadInput(f"cannot write {chart} ({error}): name another --chart, for instance compare.png") from error
    print(f"chart: {chart}")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def check(cfg):
    """Settings -> where the results go. Raises BadInput on what cannot work."""
    if (cfg.checkpoint is None) == (cfg.model is None):
        raise BadInput("name either --checkpoint or --model, or runs to --compare")
    if cfg.checkpoint:
        checkpoint.require(cfg.checkpoint)
    for name in ("limit", "batch_size"):
        if isinstance(value := getattr(cfg, name), int) and value < 1:
            raise BadInput(f"--{name} must be at least 1, not {value}")
    beside = Path(cfg.checkpoint or "")
    output = Path(cfg.output) if cfg.output else (
        beside.with_name(f"eval_{beside.stem.removeprefix('ckpt_')}.json") if cfg.checkpoint else
        Path("log", f"hf_{os.path.basename(os.path.normpath(cfg.model))}", "eval.json"))
    if output.exists():
        raise BadInput(f"{output} exists: delete it, or name another --output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise BadInput(f"cannot write {output} ({error.strerror}): name another --output") from error
    return output


def main(argv):
    (cfg,), given = parse((Config,), argv, __doc__)
    if cfg.compare:
        if others := sorted(given - {"compare", "chart"}):
            raise BadInput(f"--compare reads results that are there: leave out --{' and --'.join(others)}, or evaluate first")
        return compare(cfg.compare, cfg.chart)
    if "chart" in given:
        raise BadInput("--chart is for --compare: leave it out")
    from train_gpt2 import load_checkpoint  # imports this file for --eval_tasks; only the command line needs it back

    output = check(cfg)
    manager, names = find_tasks(GROUPS[cfg.group] if cfg.tasks is None else cfg.tasks)
    with Processes(cfg.device) as processes:
        with processes.main_first():  # the first to load downloads, the others find
            model, tokenizer, _ = load_checkpoint(cfg.checkpoint) if cfg.checkpoint else (None, None, None)
            tasks = load_tasks(manager, names, cfg.data_dir)
            check_tasks(tasks, processes.world_size, cfg.limit)
            lm = (adapter(model.to(processes.device), tokenizer, processes, cfg.batch_size, cfg.dtype) if cfg.checkpoint else
                  load_hugging_face(cfg, processes))
        torch.manual_seed(FEWSHOT_SEED)  # for tasks that draw
        results = evaluate(lm, manager, tasks, cfg.limit)
        if processes.main:
            save(results, output, cfg)
    return None


def save(results, output, cfg):
    """Print the harness's table and write its results as json, whole or not at all. Raises BadInput where a task failed."""
    from importlib.metadata import version

    from lm_eval.utils import handle_non_serializable, make_table

    failed = results.pop("failed")
    if results:
        print(make_table(results))
        results |= {"config": dataclasses.asdict(cfg), "lm_eval_version": version("lm_eval"), "torch_version": torch.__version__,
                    "date": datetime.datetime.now().isoformat(" ", "seconds")}
        text = json.dumps(results, indent=2, default=handle_non_serializable)
        try:
            checkpoint.replace(output, lambda file: file.write(text.encode()))
        except OSError as error:
            raise BadInput(f"cannot write {output} ({error.strerror}): make room, then start again") from error
        print(f"results: {output}")
    if failed:
        raise BadInput(f"no results of {', '.join(f'{task} ({reason})' for task, reason in failed.items())}: mend that, or leave it out of --tasks")


if __name__ == "__main__":
    run(main)
