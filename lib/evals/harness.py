"""EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on a
GPT.

    manager, names = find_tasks("hellaswag,arc_easy")
    tasks = load_tasks(manager, names, data_dir)
    results = run_tasks(adapter(model, tokenizer, processes), tasks)

Every process builds all of the harness's requests and gets all results. The adapter distributes the
forward passes over the processes.
"""

import difflib
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from lib import files, hub
from lib.cli import BadInput, RankError
from lib.decoding import Decoder, NonFinite, Text, draw, generate
from lib.devices import Processes, autocast
from lib.evals.hellaswag import check_item, clean, split_context
from lib.evals.scoring import failing_alone, score
from lib.huggingface import cache_only_without_network
from lib.tokenizers import Tokenizer

# Tokens per forward pass, padding included. In rolling tasks each token has fp32 logits.
BATCH_TOKENS = 8_192
SEQUENCES = 32  # texts per batch when generating
# A task's headline metric is the first of these that it has, else its first metric.
METRICS = ("acc_norm,none", "acc,none", "exact_match,none", "bits_per_byte,none")
FEWSHOT_SEED = 1234  # the harness's own
# Bootstrap samples for the standard error of a perplexity. The harness's 100,000 take minutes for
# lambada.
BOOTSTRAP = 1000
# Folders of the harness to search first: reading all 14,000 tasks takes 10 s.
FOLDERS = ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "sciq", "super_glue/boolq",
           "wikitext", "winogrande")
MISSING = "missing {}: pip install -r requirements-dev.txt"


# --------------------------------------------------------------------------------------------------
# The adapter


@dataclass
class Prompts:
    """Lists of token ids to continue in one batch, each by at most `limit` new tokens or up to one
    of the strings `until`."""
    ids: list[list[int]]
    limit: int
    until: list[str]
    temperature: float


class Adapter:
    """Implements lm_eval.api.model.TemplateLM for a GPT; see `adapter`.

    Methods without an underscore or a docstring have the harness's names and signatures.
    """

    max_gen_toks = 256  # the default of the harness's Hugging Face adapter

    def __init__(self, model: Any, tokenizer: Tokenizer, processes: Processes,
                 batch_size: int | str, progress: bool, stopped: Callable[[], bool]):
        super().__init__()  # to the harness every process is rank 0 of 1
        self.model = model
        self.tokenizer = tokenizer
        self.processes = processes
        self.batch_size = batch_size
        self.progress = progress
        self.stopped = stopped
        self.max_length = model.config.block_size
        self._device = processes.device

    @property
    def eot_token_id(self) -> int:
        """Also the context of a text without one, since training documents start with it."""
        return self.tokenizer.eot

    def precision(self) -> AbstractContextManager:
        """The autocast context of forward passes."""
        return autocast(self.model)

    def rows(self, default: Any) -> Any:
        """Sequences per forward pass."""
        return default if self.batch_size == "auto" else self.batch_size

    # ---- scoring

    def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                   **kwargs: Any) -> list[int]:
        return self.tokenizer.encode(string).tolist()

    def _encode_pair(self, context, continuation):
        ids, targets = super()._encode_pair(context, continuation)
        if not targets:  # tokens merged across the join, so score the continuation on its own
            ids = self.tok_encode(context)
            targets = self.tok_encode(continuation)
        # a context of spaces only has moved to the continuation
        return ids or [self.eot_token_id], targets

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        return super().loglikelihood(  # type: ignore[misc]
            requests, disable_tqdm=disable_tqdm or not self.progress)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        pairs = [(context, targets) for _, context, targets in requests]
        return self.scores(pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        pairs = [([self.eot_token_id], self.tok_encode(request.args[0])) for request in requests]
        return [nats for nats, _ in self.scores(pairs, disable_tqdm)]

    def scores(self, pairs: list[tuple[list[int], list[int]]],
               disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Pairs of (context, continuation) ids -> list of (log-likelihood, is greedy)."""
        with self.precision():
            nats, greedy = score(
                self.model, pairs, self.processes, BATCH_TOKENS, batch_size=self.rows(None),
                progress=self.progress and not disable_tqdm, stopped=self.stopped)
        return list(zip(nats.tolist(), greedy.tolist()))

    # ---- generation

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        from lm_eval.models.utils import Collator, postprocess_generated_text

        collator = Collator(
            [request.args for request in requests], sort_fn=lambda args: -len(args[0]),
            group_fn=lambda args: args[1], group_by="gen_kwargs")
        batches = [self.prompts(batch) for batch in collator.get_batched(n=self.rows(SEQUENCES))]
        quiet = disable_tqdm or not self.progress
        with tqdm(total=len(requests), desc="generating", disable=quiet) as bar:
            texts = self.generate_batches(batches, bar)
        finished = []
        for batch, written in zip(batches, texts, strict=True):
            for text in written:
                finished.append(postprocess_generated_text(text, batch.until, None))
        return collator.get_original(finished)

    def generate_batches(self, batches: list[Prompts], bar: tqdm) -> list[list[str]]:
        """List of Prompts -> list of their continuations, distributed over the processes."""
        rank = self.processes.rank
        world_size = self.processes.world_size
        texts = {i: [""] * len(batch.ids) for i, batch in enumerate(batches)}
        for first in range(0, len(batches), world_size):
            if self.stopped():
                break
            together = batches[first:first + world_size]
            steps = max(batch.limit for batch in together)
            # a process without a batch of its own repeats the last one, as in scoring.score
            mine = min(first + rank, len(batches) - 1)
            texts[mine] = self.continue_prompts(batches[mine], steps, FEWSHOT_SEED + mine)
            bar.update(sum(len(batch.ids) for batch in together))
        if self.processes.distributed:
            parts: list[dict] = [{}] * world_size
            dist.all_gather_object(parts, texts)
            texts = {i: parts[i % world_size][i] for i in texts}
        return list(texts.values())

    def prompts(self, batch: list[tuple[str, dict]]) -> Prompts:
        """The harness's list of (context, generation settings), with equal settings, -> Prompts."""
        from lm_eval.models.utils import normalize_gen_kwargs

        settings = normalize_gen_kwargs(batch[0][1], self.max_gen_toks)
        limit = settings["max_gen_toks"]
        # as the harness does, leave room for all new tokens
        room = self.max_length - limit if limit < self.max_length else self.max_length // 2
        ids = []
        for context, _ in batch:
            prompt = self.tok_encode(context) or [self.eot_token_id]
            ids.append(prompt[-max(room, 1):])
        temperature = 0.0
        if settings["do_sample"]:
            temperature = settings.get("temperature", 1.0)
        until = [stop for stop in settings["until"] if stop]
        return Prompts(ids, limit, until, temperature)

    def continue_prompts(self, batch: Prompts, steps: int, seed: int) -> list[str]:
        """Prompts -> their continuations (str), up to the end of text.

        steps: the largest limit of any process. All processes make the same number of forward
        passes, unless texts outgrow the context.
        """
        texts = [Text(self.tokenizer, batch.limit, batch.until) for _ in batch.ids]
        generator = torch.Generator(device=self._device).manual_seed(seed)
        choose = partial(draw, temperature=batch.temperature, generator=generator)
        length = max(map(len, batch.ids)) + steps
        with self.precision(), failing_alone(self.processes):
            decoder = Decoder(self.model, len(texts), length)
            for tokens in generate(decoder, batch.ids, steps, choose):
                for text, token in zip(texts, tokens, strict=True):
                    text.add(max(token, 0))
                running = not all(text.ended for text in texts)
                unfinished, non_finite = self.processes.sum([running, -1 in tokens])
                if non_finite:  # on any process
                    raise NonFinite
                if not unfinished or self.stopped():
                    break
        return [text.text for text in texts]


def adapter(model: torch.nn.Module, tokenizer: Tokenizer, processes: Processes,
            batch_size: int | str = "auto", progress: bool = False,
            stopped: Callable[[], bool] = lambda: False) -> Any:
    """Wrap a GPT in eval mode and its Tokenizer as a language model of the harness.

    generate_until supports greedy decoding, temperature, stop strings and max_gen_toks. progress:
    show progress bars. stopped: as in scoring.score; once true, the remaining items are skipped and
    the results are meaningless.
    """
    from lm_eval.api.model import TemplateLM

    tokenizer.require_text("lm-evaluation-harness")

    class GPTLM(Adapter, TemplateLM):
        pass

    return GPTLM(model, tokenizer, processes, batch_size, progress, stopped)


# --------------------------------------------------------------------------------------------------
# Finding and loading tasks


def task_manager(names: list[str]) -> Any:
    """The harness's index of tasks, limited to FOLDERS if these have all `names`.

    Raises BadInput if the harness is not installed.
    """
    try:
        from lm_eval import tasks, utils
    except ImportError as error:
        raise BadInput(MISSING.format(error.name)) from error
    # the harness recompiles its templates for every item, which takes most of its own time
    if "from_string" not in vars(utils.env):
        utils.env.from_string = cache(utils.env.from_string)
    folders = [Path(tasks.__file__).parent / folder for folder in FOLDERS]
    some = tasks.TaskManager(include_defaults=False, include_path=folders)
    if set(names) <= some.task_index.keys():
        return some
    return tasks.TaskManager()


def find_tasks(names: str) -> tuple[Any, list[str]]:
    """Comma-separated names, * allowed -> (the harness's task manager, list of task names), for
    load_tasks.

    Raises BadInput on an unknown name, suggesting similar ones.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    manager = task_manager(wanted)
    found = []
    for name in wanted:
        known = manager.match_tasks([name])
        if not known:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            advice = f"did you mean {', '.join(near)}?" if near else "see lm_eval ls tasks"
            raise BadInput(f"unknown task {name!r}: {advice}")
        found += known
    if not found:
        raise BadInput("no task named: see lm_eval ls tasks")
    # the harness warns about every item that is longer than the context
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return manager, list(dict.fromkeys(found))


def load_tasks(manager: Any, names: list[str], data_dir: str | None = None) -> list:
    """Task names -> list of the harness's Task and Group objects, with data from the hub or from
    jsonl files in data_dir.

    Raises BadInput if the data is missing or does not fit the task, or the task cannot run here.
    """
    if data_dir is None:
        loaded = _load_from_hub(manager, names)
    else:
        loaded = _load_from_files(manager, names, data_dir)
    for task in single_tasks(loaded):
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise BadInput(f"{task.task_name} runs model-written code or needs images: name other "
                           "tasks")
    return loaded


def single_tasks(items: list) -> list:
    """The harness's Task and Group objects -> list of all Task objects."""
    found: list = []
    for item in items:
        found += item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]
    return found


def _load_from_hub(manager, names):
    several = ", ".join(names[:5])
    if len(names) > 5:
        several += f" and {len(names) - 5} more"
    cache_only_without_network()
    try:
        loaded = manager.load(names)
    except ImportError as error:
        raise BadInput(f"{several}: a package is missing ({str(error)[:100]}): pip install it"
                       ) from error
    except Exception as error:  # any error of the hub, the network or a dataset's code
        raise BadInput(f"cannot load the data of {several} ({type(error).__name__}): connect to "
                       "the internet once, or name a folder of <task>.jsonl with --data_dir, in "
                       "training with --eval_tasks_dir") from error
    children = set()
    for names_inside in loaded.get("group_map", {}).values():
        children.update(names_inside)
    items = {**loaded.get("groups", {}), **loaded["tasks"]}
    return [item for name, item in items.items() if name not in children]


def _load_from_files(manager, names, data_dir):
    hub.datasets_library().disable_progress_bars()  # three per jsonl file otherwise
    if not os.path.isdir(data_dir):
        raise BadInput(f"no folder {data_dir}: it should contain <task>.jsonl")
    singles = set(manager.all_subtasks)
    for name in names:
        if name not in singles:
            raise BadInput(f"--data_dir works for single tasks, and {name} is a group: name its "
                           "tasks")
    return [_load_from_file(manager, name, data_dir) for name in names]


def _load_from_file(manager, name, data_dir):
    file = find_file(data_dir, name, ("", "_test", "_val", "_validation"))
    if file is None:
        jsonl = sorted(path.name for path in Path(data_dir).glob("*.jsonl"))
        content = ", ".join(jsonl) or "no jsonl files"
        raise BadInput(f"no {name}.jsonl in {data_dir}, which contains {content}: add it, or name "
                       "other tasks")
    source = manager.task_index[name].cfg.get("dataset_path")
    remedy = f"give it the columns of {source}, one item per line"
    changes = local_config(name, file, find_file(data_dir, name, ("_train",)), remedy)
    # A task inside a group can override the harness's configuration; a task on its own cannot.
    group = {"group": "local", "task": [{"task": name, **changes}]}
    try:
        task, = manager.load(group)["tasks"].values()
        check_docs(task)
    except Exception as error:  # any error of the reader, the templates or the task's code
        raise BadInput(f"{file} does not fit the task {name} ({root_cause(error)}): {remedy}"
                       ) from error
    shots = task.config.num_fewshot
    has_examples = task.config.fewshot_split or task.fewshot_cfg.samples
    if shots and not has_examples:  # the harness would take them from the test items
        raise BadInput(f"{name} shows {shots} examples before each item: add {name}_train.jsonl to "
                       f"{data_dir}")
    return task


def root_cause(error: BaseException) -> str:
    """The first exception of a chain, as text."""
    while error.__cause__:
        error = error.__cause__
    text = str(error).splitlines()[0][:100] if str(error) else "no message"
    return f"{type(error).__name__}: {text}"


def find_file(folder: str, task: str, endings: tuple[str, ...]) -> Path | None:
    """The first <task><ending>.jsonl in the folder, or None."""
    for ending in endings:
        path = Path(folder, f"{task}{ending}.jsonl")
        if os.path.isfile(path):
            return path
    return None


def check_docs(task: Any) -> None:
    """Raises ValueError on an item that the harness would score wrongly: a null in its templates,
    or no correct choice."""
    config = task.config.to_dict()
    keys = ("doc_to_text", "doc_to_target", "doc_to_choice")
    templates = " ".join(str(config.get(key)) for key in keys)
    used = [column for column in task.features if re.search(rf"\b{re.escape(column)}\b", templates)]
    has_choices = task.OUTPUT_TYPE == "multiple_choice" and hasattr(task, "multiple_input")
    for number, doc in enumerate(task.eval_docs, 1):
        for column in used:
            if doc.get(column) is None:
                raise ValueError(f"item {number} has no {column}")
        if has_choices:
            check_answers(task, doc, number)


def check_answers(task: Any, doc: dict, number: int) -> None:
    """Raises ValueError if a correct answer is not among the choices."""
    answers = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    if not isinstance(answers, list):
        answers = [answers]
    for answer in answers:
        is_index = isinstance(answer, int) and 0 <= answer < len(choices)
        is_choice = isinstance(answer, str) and answer in choices
        if not (is_index or is_choice):
            raise ValueError(f"item {number}: the correct answer is {answer!r}, of {len(choices)} "
                             "choices")


# --------------------------------------------------------------------------------------------------
# Items from jsonl files


def local_config(task: str, file: Path, train: Path | None, remedy: str) -> dict:
    """Overrides of the harness's configuration that make a task read its items from a jsonl file.

    train: a jsonl file of few-shot examples, or None. Raises BadInput, ending in `remedy`, on a row
    that does not fit.
    """
    paths = {"test": str(file)}
    examples = None
    if train:
        paths["train"] = str(train)
        examples = "train"
    config: dict = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": paths},
        "test_split": "test",
        "validation_split": None,
        "training_split": examples,
        "fewshot_split": examples,
    }
    rows = []
    for path in paths.values():
        rows += files.read_rows(path, remedy, _check_row)
    if not rows:
        raise BadInput(f"{file} contains no items: {remedy}")
    column, convert = COLUMNS.get(task, (None, None))
    if column in rows[0]:
        convert = None  # the file already has the harness's columns
    if convert is None and task != "hellaswag":
        return config
    if convert:
        for path in paths.values():
            files.read_rows(path, remedy, partial(_convert_row, convert))

    def process_docs(dataset):
        if convert:
            dataset = dataset.map(convert, remove_columns=dataset.column_names)
        if task == "hellaswag":  # the only one of these tasks with its own process_docs
            from lm_eval.tasks.hellaswag import utils

            utils.preprocess = clean  # the same result in linear time
            dataset = utils.process_docs(dataset)
        return dataset

    config["process_docs"] = process_docs
    return config


def _check_row(row):
    if not isinstance(row, dict):
        raise ValueError("not an item: {...}")
    return row


def _convert_row(convert, row):
    try:
        return convert(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"does not fit the task ({type(error).__name__}: {error})") from error


def read_question(item: dict, fewest: int, most: int) -> str:
    """The question of an item with query, choices and gold. Raises ValueError unless it has
    `fewest` to `most` choices and gold is the index of one of them."""
    choices = item["choices"]
    is_list = isinstance(choices, list) and all(isinstance(text, str) for text in choices)
    if not is_list or not fewest <= len(choices) <= most:
        raise ValueError(f"does not fit the task: choices must be {fewest} to {most} texts")
    gold = item["gold"]
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"does not fit the task: gold must be from 0 to {len(choices) - 1}")
    return item["query"].removeprefix("Question:").strip()


def arc(item: dict) -> dict:
    question = read_question(item, 2, 8)
    texts = item["choices"]
    letters = "ABCDEFGH"[:len(texts)]
    return {
        "question": question,
        "choices": {"text": texts, "label": list(letters)},
        "answerKey": letters[item["gold"]],
    }


def piqa(item: dict) -> dict:
    goal = read_question(item, 2, 2)
    first, second = item["choices"]
    return {"goal": goal, "sol1": first, "sol2": second, "label": item["gold"]}


def lambada(item: dict) -> dict:
    return {"text": " ".join((item["context"], item["continuation"]))}


def hellaswag(item: dict) -> dict:
    item = check_item(dict(item))
    ctx_a, ctx_b = split_context(item["ctx"])
    return item | {"ctx_a": ctx_a, "ctx_b": ctx_b}


# task -> (a column of the harness's data, a function from an item of common jsonl collections
# (llm-foundry's) to the harness's columns)
COLUMNS: dict = {
    "arc_easy": ("question", arc),
    "arc_challenge": ("question", arc),
    "piqa": ("goal", piqa),
    "lambada_openai": ("text", lambada),
    "hellaswag": ("ctx_a", hellaswag),
}


# --------------------------------------------------------------------------------------------------
# Results


def run_tasks(lm: Any, tasks: list, limit: int | None = None, bootstrap: int = BOOTSTRAP,
              progress: bool = False) -> dict:
    """Evaluate a language model on the tasks of load_tasks -> the harness's results, on every
    process.

    limit: items per task. bootstrap: samples for standard errors that need them; 0: no standard
    errors. progress: show the harness's progress bar over its prompts. If a task fails, the others
    keep their results, and "failed" has the reason. With the harness's own adapter on several
    processes, only rank 0 has results. Raises NonFinite, and RankError if one process of several
    may have failed alone.
    """
    from lm_eval import tasks as index
    from lm_eval.api import task as building

    # otherwise a bootstrap forks and signals one process per core for a second of work
    os.environ["DISABLE_MULTIPROC"] = "1"
    # otherwise every process draws a bar, in training too
    building.tqdm = partial(tqdm, disable=not progress)
    for task in single_tasks(tasks):
        n = min(len(task.eval_docs), limit or math.inf)
        if n < lm.world_size:  # the harness's own adapter fails on a process without items
            raise BadInput(f"{task.task_name}: {n} items for {lm.world_size} processes: raise "
                           "--limit or start fewer processes")
    results: dict = {"failed": {}}
    manager = index.TaskManager(include_defaults=False)
    for item in tasks:
        loaded = manager.load([item])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        for key, value in run_task(lm, loaded, limit, bootstrap).items():
            if isinstance(value, dict):
                value = results.get(key, {}) | value
            results[key] = value
    return results


def run_task(lm: Any, loaded: dict, limit: int | None, bootstrap: int) -> dict:
    """The harness's results on one task or group, or {"failed": {name: reason}}."""
    from lm_eval import evaluator

    try:
        with redirect_stdout(sys.stderr):  # the harness announces bootstraps
            return evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=bootstrap,
                                      log_samples=False) or {}
    except (NonFinite, RankError, dist.DistBackendError):
        raise
    except Exception as error:  # a bad item, out of memory, a metric that overflows
        name = next(iter(loaded["groups"] or loaded["tasks"]))
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        if isinstance(error, torch.OutOfMemoryError):
            reason = "out of memory: run eval_harness.py with a smaller --batch_size"
        if lm.world_size > 1:
            raise RankError(f"no result of {name} ({reason}): fix that, or leave {name} out"
                            ) from error
        return {"failed": {name: reason}}


def headlines(results: dict) -> dict[str, str]:
    """The harness's results -> {task: key of its headline metric}."""
    found = {}
    for task, values in results.get("results", {}).items():
        for key in (*METRICS, *values):
            if isinstance(values.get(key), float) and "_stderr" not in key:
                found[task] = key
                break
    return found


def found_evaluations(path: str, step: int | None) -> list[tuple[str, str, str]]:
    """(task, metric, value) of what eval_harness.py wrote next to a checkpoint."""
    rows = []
    pattern = f"eval_{step or 0:05d}*.json"
    for file in sorted(Path(path).parent.glob(pattern)):
        data = files.read_json(file, "move it away")
        if not isinstance(data, dict) or not isinstance(data.get("results"), dict):
            raise BadInput(f"{file} has no results of eval_harness.py: move it away")
        for task, key in headlines(data).items():
            metric = key.partition(",")[0]
            limit = (data.get("config") or {}).get("limit")
            items = f", first {limit} items" if limit else ""
            rows.append((task, f"{metric}{items}", f"{data['results'][task][key]:.4f}"))
    return rows


def tracked(cfg: Any, tokenizer: Tokenizer, processes: Processes) -> Callable:
    """The tasks of --eval_tasks during training: a function (model, micro_batch, stopped) ->
    {tag: headline metric, or the reason why it is missing}."""
    tasks = []
    if cfg.eval_tasks:
        tokenizer.require_text("--eval_tasks")
    with processes.main_first():
        if cfg.eval_tasks:
            manager, names = find_tasks(cfg.eval_tasks)
            tasks = load_tasks(manager, names, cfg.eval_tasks_dir)

    def tag(task):
        # eval/hellaswag is lib/evals/hellaswag.py's accuracy
        return "eval/hellaswag_lm_eval" if task == "hellaswag" else f"eval/{task}"

    def run(model, micro_batch, stopped):
        lm = adapter(model, tokenizer, processes, stopped=stopped)
        results = run_tasks(lm, tasks, cfg.eval_tasks_limit, bootstrap=0)
        scalars = {}
        for task, key in headlines(results).items():
            scalars[tag(task)] = results["results"][task][key]
        for task, reason in results["failed"].items():
            scalars[tag(task)] = [f"{task} has no result: {reason}"]
        return scalars

    return run
