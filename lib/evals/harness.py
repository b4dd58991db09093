"""EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a
GPT.

    tasks = load_tasks(*find_tasks("hellaswag,arc_easy"), data_dir)
    results = evaluate(adapter(model, tokenizer, processes), tasks)

Every process builds all of the harness's requests and has all results; the adapter shares out the
forward passes.
"""

import difflib
import logging
import math
import os
import re
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from lib import files, hub
from lib.cli import BadInput, RankError
from lib.decoding import Decoder, NonFinite, Text, draw, generate
from lib.devices import autocast
from lib.evals.hellaswag import check_item, clean, split_context
from lib.evals.scoring import failing_alone, score
from lib.huggingface import cache_only_without_network

BATCH_TOKENS = 8_192  # tokens per forward pass, padding included; in rolling tasks each of them has logits, 4 bytes per id
SEQUENCES = 32        # texts generated side by side
METRICS = ("acc_norm,none", "acc,none", "exact_match,none", "bits_per_byte,none"
           )  # headline: the first a task has, else any
FEWSHOT_SEED = 1234   # the harness's own
BOOTSTRAP = 1000  # resamplings for the standard error of a perplexity; the harness's 100,000 take minutes for lambada
FOLDERS = ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "super_glue/boolq",
           "wikitext", "winogrande")  # the
# harness's that are searched first: reading all its 14,000 tasks takes 10 s
MISSING = "missing {}: pip install -r requirements-dev.txt"


# ----------------------------------------------------------------------------------------------------------------------
# The adapter


@dataclass
class Prompts:
    """Lists of token ids to continue side by side, up to `limit` new tokens each or the first of
    the strings `until`."""
    ids: list
    limit: int
    until: list
    temperature: float


def adapter(model, tokenizer, processes, batch_size="auto", dtype="auto", progress=False,
            stopped=lambda: False):
    """A GPT in eval mode and its Tokenizer as the harness's language model
    (lm_eval.api.model.TemplateLM).

    To the harness every process is the only one. generate_until supports greedy decoding and
    temperature, stop strings and max_gen_toks of a task's generation settings. stopped: as
    scoring.score takes it; once true, what is left of the items is not computed, and the results
    are meaningless. progress: bars.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text

    window = model.config.block_size

    class GPTLM(TemplateLM):
        eot_token_id = tokenizer.eot  # also what precedes a text without context: documents begin with it in training
        max_length, max_gen_toks = window, 256  # 256: the default of the harness's Hugging Face adapter

        def __init__(self):
            super().__init__()  # rank 0 of 1
            self._device = processes.device

        def precision(self):
            return nullcontext() if dtype == "float32" else autocast(self.device)

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode(string).tolist()

        def _encode_pair(self, context, continuation):
            ids, targets = super()._encode_pair(context, continuation)
            if not targets:  # tokens merged across the join: the continuation is scored as it is by itself
                ids, targets = self.tok_encode(context), self.tok_encode(continuation)
            return ids or [self.eot_token_id
                           ], targets  # a context of spaces moves to the continuation as a whole

        def loglikelihood(self, requests, disable_tqdm=False):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not progress)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
            return self.scores([(context, targets) for _, context, targets in requests],
                               disable_tqdm)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            pairs = [([self.eot_token_id], self.tok_encode(request.args[0]))
                     for request in requests]
            return [nats for nats, _ in self.scores(pairs, disable_tqdm)]

        def scores(self, pairs, disable_tqdm=False):
            rows = None if batch_size == "auto" else batch_size
            with self.precision():
                nats, greedy = score(model, pairs, processes, BATCH_TOKENS, rows, progress
                                     and not disable_tqdm, stopped)
            return list(zip(nats.tolist(), greedy.tolist()))

        def generate_until(self, requests, disable_tqdm=False):
            collator = Collator([request.args for request in requests],
                                sort_fn=lambda args: -len(args[0]), group_fn=lambda args: args[1],
                                group_by="gen_kwargs")
            rows = SEQUENCES if batch_size == "auto" else batch_size
            batches = [self.prompts(batch) for batch in collator.get_batched(n=rows)]
            texts = {i: [""] * len(batch.ids) for i, batch in enumerate(batches)}
            bar = tqdm(total=len(requests), desc="generating", disable=disable_tqdm or not progress)
            for first in range(0, len(batches),
                               processes.world_size):  # equal work, as in scoring.score
                if stopped():
                    break
                together = batches[first:first + processes.world_size]
                mine = min(first + processes.rank, len(batches) - 1)
                texts[mine] = self.write(batches[mine], max(batch.limit for batch in together),
                                         FEWSHOT_SEED + mine)
                bar.update(sum(len(batch.ids) for batch in together))
            bar.close()
            if processes.distributed:
                parts = [None] * processes.world_size
                dist.all_gather_object(parts, texts)
                texts = {i: parts[i % processes.world_size][i] for i in texts}
            return collator.get_original([postprocess_generated_text(text, batch.until, None)
                                          for i, batch in enumerate(batches) for text in texts[i]])

        def prompts(self, batch):
            """The harness's (context, generation settings), the same settings throughout ->
            Prompts."""
            kwargs = normalize_gen_kwargs(batch[0][1], self.max_gen_toks)
            limit = kwargs["max_gen_toks"]
            room = window - limit if limit < window else window // 2  # the harness leaves room for all that is to come
            ids = [(self.tok_encode(context) or [self.eot_token_id])[-max(room, 1):]
                   for context, _ in batch]
            temperature = kwargs.get("temperature", 1.0) if kwargs["do_sample"] else 0.0
            return Prompts(ids, limit, [stop for stop in kwargs["until"] if stop], temperature)

        def write(self, batch, steps, seed):
            """Prompts -> their continuations (str), up to the end of text. steps: the most tokens,
            on every process.

            Every process makes as many forward passes, but for texts that outgrow the window, where
            a task asks for as much.
            """
            texts = [Text(tokenizer, batch.limit, batch.until) for _ in batch.ids]
            choose = partial(draw, temperature=batch.temperature,
                             generator=torch.Generator(device=self.device).manual_seed(seed))
            with self.precision(), failing_alone(processes):
                decoder = Decoder(model, len(texts), max(map(len, batch.ids)) + steps)
                for tokens in generate(decoder, batch.ids, steps, choose):
                    for text, token in zip(texts, tokens, strict=True):
                        text.add(max(token, 0))
                    unfinished, non_finite = processes.sum(
                        [not all(text.ended for text in texts), -1 in tokens])
                    if non_finite:  # perhaps on another process alone
                        raise NonFinite
                    if not unfinished or stopped():
                        break
            return [text.text for text in texts]

    return GPTLM()


# ----------------------------------------------------------------------------------------------------------------------
# Tasks


def task_manager(names):
    """The harness's index of tasks, with these names if it has them. Raises BadInput where the
    harness is not installed."""
    try:
        from lm_eval import tasks, utils
    except ImportError as error:
        raise BadInput(MISSING.format(error.name)) from error
    if "from_string" not in vars(
            utils.env
    ):  # the harness compiles its templates anew for every item, most of its own time
        utils.env.from_string = cache(utils.env.from_string)
    folders = [Path(tasks.__file__).parent / folder for folder in FOLDERS]
    some = tasks.TaskManager(include_defaults=False, include_path=folders)
    return some if set(names) <= some.task_index.keys() else tasks.TaskManager()


def find_tasks(names):
    """Names joined by commas, with * -> (the harness's task manager, list of the names it knows):
    what load_tasks takes.

    Raises BadInput on an unknown one, with the nearest known ones.
    """
    names, found = [name.strip() for name in names.split(",") if name.strip()], []
    manager = task_manager(names)
    for name in names:
        known = manager.match_tasks([name])
        if not known:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            advice = f"did you mean {', '.join(near)}?" if near else "see lm_eval ls tasks"
            raise BadInput(f"unknown task {name!r}: {advice}")
        found += known
    if not found:
        raise BadInput("no task is named: see lm_eval ls tasks")
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR)  # it warns of every item that is longer than the window
    return manager, list(dict.fromkeys(found))


def load_tasks(manager, names, data_dir=None):
    """Names the harness knows -> list of its Task and Group objects with their data, from the hub
    or jsonl files in data_dir.

    Raises BadInput where the data cannot be had or do not fit the task, or the task cannot be run
    here.
    """
    loaded = _load_hub(manager, names) if data_dir is None else _load_files(
        manager, names, data_dir)
    for item in loaded:
        for task in _single(item):
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise BadInput(
                    f"{task.task_name} runs code that a model wrote, or shows it pictures: name other tasks"
                )
    return loaded


def _single(item):
    return item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


def _load_hub(manager, names):
    several = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    cache_only_without_network()
    try:
        loaded = manager.load(names)
    except ImportError as error:
        raise BadInput(
            f"{several}: something is missing ({str(error)[:100]}): pip install it") from error
    except Exception as error:  # whatever the hub, the network and the data's own code raise
        raise BadInput(f"cannot load the data of {several} ({type(error).__name__}): connect to the internet once, or give "
                       "a folder of <task>.jsonl by --data_dir, in training by --eval_tasks_dir") from error
    inside = {child for children in loaded.get("group_map", {}).values() for child in children}
    return [
        item for name, item in {**loaded.get("groups", {}), **loaded["tasks"]}.items()
        if name not in inside
    ]


def _load_files(manager, names, data_dir):
    hub.datasets_library().disable_progress_bars()  # each jsonl file would draw three
    if not os.path.isdir(data_dir):
        raise BadInput(f"no folder {data_dir}: it should hold <task>.jsonl")
    singles, tasks = set(manager.all_subtasks), []
    for name in names:
        if name not in singles:
            raise BadInput(
                f"--data_dir takes single tasks, and {name} is a set of them: name its tasks")
        file = find_file(data_dir, name, ("", "_test", "_val", "_validation"))
        if file is None:
            there = ", ".join(sorted(
                path.name for path in Path(data_dir).glob("*.jsonl"))) or "no jsonl files"
            raise BadInput(
                f"no {name}.jsonl in {data_dir}, which holds {there}: add it, or name other tasks")
        remedy = f"give it the columns of {manager.task_index[name].cfg.get('dataset_path')}, one item per line"
        config = local_config(name, file, find_file(data_dir, name, ("_train",)), remedy)
        try:  # a reference takes the harness's configuration and changes what stands here; only groups hold references
            tasks += manager.load({"group": "local", "task": [{"task": name,
                                                               **config}]})["tasks"].values()
            check_docs(tasks[-1])
        except Exception as error:  # whatever the data's reader, the task's templates and its code raise
            while error.__cause__:
                error = error.__cause__
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else 'nothing in it'}"
            raise BadInput(f"{file} does not fit the task {name} ({reason}): {remedy}") from error
        task, shots = tasks[-1], tasks[-1].config.num_fewshot
        if shots and not task.config.fewshot_split and not task.fewshot_cfg.samples:  # they would be items of the test
            raise BadInput(
                f"{name} shows {shots} examples before each item: add {name}_train.jsonl to {data_dir}"
            )
    return tasks


def find_file(folder, task, endings):
    """The first <task><ending>.jsonl there is in the folder, or None."""
    return next((path for ending in endings
                 if os.path.isfile(path := Path(folder) / f"{task}{ending}.jsonl")), None)


def check_docs(task):
    """Raises ValueError at an item that the harness would count wrong: a null in its templates, or
    no right choice."""
    templates = " ".join(
        str(task.config.to_dict().get(key))
        for key in ("doc_to_text", "doc_to_target", "doc_to_choice"))
    used = [column for column in task.features if re.search(rf"\b{re.escape(column)}\b", templates)]
    for number, doc in enumerate(task.eval_docs, 1):
        if missing := [column for column in used if doc.get(column) is None]:
            raise ValueError(f"item {number} has no {missing[0]}")
        if task.OUTPUT_TYPE == "multiple_choice" and hasattr(task, "multiple_input"):
            right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            choices = task.doc_to_choice(doc)
            for answer in right if isinstance(right, list) else [right]:
                index = isinstance(answer, int) and 0 <= answer < len(choices)
                if not (index or (isinstance(answer, str) and answer in choices)):
                    raise ValueError(
                        f"item {number}: the right answer is {answer!r}, of {len(choices)} choices")


def local_config(task, file, train, remedy):
    """What changes in the harness's configuration of a task so that its items come from a jsonl
    file: a dict of fields.

    train: the jsonl file of its few-shot examples, or None. Raises BadInput, ending in `remedy`, at
    a row that does not fit.
    """
    paths, examples = {"test": str(file)
                       } | ({"train": str(train)} if train else {}), "train" if train else None
    config = {
        "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": paths},
        "test_split": "test", "validation_split": None, "training_split": examples,
        "fewshot_split": examples
    }
    rows = files.read_rows(
        file, remedy, _check_row) + (files.read_rows(train, remedy, _check_row) if train else [])
    if not rows:
        raise BadInput(f"{file} holds no items: {remedy}")
    column, convert = COLUMNS.get(task, (None, None))
    convert = convert if column not in rows[0] else None
    if convert is None and task != "hellaswag":
        return config
    for path in filter(None, (file, train) if convert else ()):
        files.read_rows(path, remedy, partial(_convert_row, convert))

    def process_docs(dataset):
        if convert:
            dataset = dataset.map(convert, remove_columns=dataset.column_names)
        if task == "hellaswag":  # the one of these tasks with processing of its own
            from lm_eval.tasks.hellaswag import utils

            utils.preprocess = clean  # the same in linear time
            dataset = utils.process_docs(dataset)
        return dataset

    return config | {"process_docs": process_docs}


def _check_row(row):
    if not isinstance(row, dict):
        raise ValueError("not an item: {...}")
    return row


def _convert_row(convert, row):
    try:
        return convert(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"does not fit the task ({type(error).__name__}: {error})") from error


def _question(item, choices):
    """The question of an item of query, choices and gold. Raises ValueError if it lacks so many
    choices, or gold is not one."""
    texts = item["choices"]
    if not (isinstance(texts, list) and len(texts) in choices
            and all(isinstance(text, str) for text in texts)):
        raise ValueError(
            f"does not fit the task: choices must be {choices[0]} to {choices[-1]} texts")
    if type(item["gold"]) is not int or not 0 <= item["gold"] < len(texts):
        raise ValueError(f"does not fit the task: gold must be from 0 to {len(texts) - 1}")
    return item["query"].removeprefix("Question:").strip()


def arc(item):
    question, texts, letters = _question(item, range(
        2, 9)), item["choices"], "ABCDEFGH"[:len(item["choices"])]
    return {
        "question": question, "choices": {"text": texts, "label": list(letters)},
        "answerKey": letters[item["gold"]]
    }


def piqa(item):
    return {
        "goal": _question(item, [2]), "sol1": item["choices"][0], "sol2": item["choices"][1],
        "label": item["gold"]
    }


def lambada(item):
    return {"text": " ".join((item["context"], item["continuation"]))}


def hellaswag(item):
    return {
        **check_item(dict(item)),
        **dict(zip(("ctx_a", "ctx_b"), split_context(item["ctx"]), strict=True))
    }


# task -> (a column the harness's data have, an item of common jsonl collections (llm-foundry's) ->
# the harness's columns)
COLUMNS = {
    "arc_easy": ("question", arc), "arc_challenge": ("question", arc), "piqa": ("goal", piqa),
    "lambada_openai": ("text", lambada), "hellaswag": ("ctx_a", hellaswag)
}


# ----------------------------------------------------------------------------------------------------------------------
# Results


def evaluate(lm, tasks, limit=None, bootstrap=BOOTSTRAP, progress=False):
    """The harness's results of a language model on what load_tasks returned: dict, on every
    process.

    limit: items per task. bootstrap: resamplings for the standard errors that need them; 0: no
    standard errors. progress: the harness's bar over its prompts. A task that fails loses no
    other's results: why it failed stands under "failed". With the harness's own adapter on several
    processes, results are rank 0's alone. Raises NonFinite, and RankError where one process of
    several may have failed alone.
    """
    from lm_eval import evaluator
    from lm_eval import tasks as index
    from lm_eval.api import task as building

    os.environ[
        "DISABLE_MULTIPROC"] = "1"  # or a bootstrap forks a process per core, for a second of work, and signals them
    building.tqdm = partial(
        tqdm, disable=not progress)  # else it draws one in every process, training or not
    for task in (task for item in tasks for task in _single(item)):
        n = min(len(task.eval_docs), limit or math.inf)
        if n < lm.world_size:  # the harness's own adapter does not survive a process without items
            raise BadInput(
                f"{task.task_name}: {n} items for {lm.world_size} processes: raise --limit or start fewer processes"
            )
    results, manager = {"failed": {}}, index.TaskManager(include_defaults=False)
    for item in tasks:
        loaded = manager.load([item])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        try:
            with redirect_stdout(sys.stderr):  # it announces bootstraps
                part = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=bootstrap,
                                          log_samples=False) or {}
        except (NonFinite, RankError, torch.distributed.DistBackendError):
            raise
        except Exception as error:  # an item that does not fit, too little memory, what a metric makes of a strange model
            name = next(iter(loaded["groups"] or loaded["tasks"]))
            reason = f"{type(error).__name__}: {str(error)[:100]}"
            if isinstance(error, torch.OutOfMemoryError):
                reason = "out of memory: eval_harness.py with a smaller --batch_size takes less"
            if lm.world_size > 1:
                raise RankError(
                    f"no result of {name} ({reason}): mend that, or leave {name} out") from error
            part = {"failed": {name: reason}}
        for key, value in part.items():
            results[key] = results.get(key, {}) | value if isinstance(value, dict) else value
    return results


def headlines(results):
    """The harness's results -> dict task -> the key of the metric that stands for it."""
    found = {}
    for task, values in results.get("results", {}).items():
        keys = (key for key in (*METRICS, *values)
                if isinstance(values.get(key), float) and "_stderr" not in key)
        if key := next(keys, None):
            found[task] = key
    return found


def tracked(cfg, tokenizer, processes):
    """The tasks of --eval_tasks along a training run, by its flags:
    (model, micro_batch, stopped) -> {tag: headline, or why there is none}."""
    with processes.main_first():
        tasks = load_tasks(*find_tasks(cfg.eval_tasks),
                           cfg.eval_tasks_dir) if cfg.eval_tasks else []

    def run(model, micro_batch, stopped):
        lm = adapter(model, tokenizer, processes, stopped=stopped)
        results = evaluate(lm, tasks, cfg.eval_tasks_limit, bootstrap=0)
        tags = {task: "eval/hellaswag_lm_eval" if task == "hellaswag" else f"eval/{task}"
                for task in (*results.get("results", ()), *results["failed"])}
        return (
            {tags[task]: results["results"][task][key]
             for task, key in headlines(results).items()} | {
                 tags[task]: [f"{task} has no result: {reason}"]
                 for task, reason in results["failed"].items()
             })

    return run
