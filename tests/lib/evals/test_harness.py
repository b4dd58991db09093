"""lib/evals/harness.py against the harness's own Hugging Face adapter on the same weights and
files: python -m pytest tests/lib/evals/test_harness.py"""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, reference, save_random_gpt2, sentences, task_items, tiny, write_lines

from lib.cli import BadInput
from lib.decoding import NonFinite
from lib.devices import Processes
from lib.evals import harness
from lib.tokenizers import load_tokenizer
from train_gpt2 import GPT

WINDOW = 48
TASKS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "lambada_openai", "boolq",
         "openbookqa", "sciq", "wikitext")

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write_lines(folder / f"{task}.jsonl", task_items(task))
    return folder


@pytest.fixture(scope="module")
def manager():
    """The harness's index, or the part of it that has these tasks."""
    manager = harness.task_manager(TASKS)
    assert len(manager.all_tasks) < 1000  # all of them take seconds
    return manager


@pytest.fixture(scope="module")
def processes():
    return Processes("cpu")


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return save_random_gpt2(tmp_path_factory.mktemp("hf") / "random-gpt2")


@pytest.fixture(scope="module")
def model(hf_folder):
    return GPT.from_pretrained(str(hf_folder)).eval()


@pytest.fixture(scope="module")
def adapters(model, hf_folder, processes):
    """(ours, the harness's own) of the same weights."""
    from lm_eval.models.huggingface import HFLM

    return (harness.adapter(model, load_tokenizer("gpt2"), processes),
            HFLM(pretrained=str(hf_folder), device="cpu", batch_size=3))


# --------------------------------------------------------------------------------------------------
# Against the harness's own adapter


def run_both(adapters, manager, names, data):
    """Both adapters on the tasks -> (results of both, requests of both), a request being (task,
    arguments, response)."""
    results = []
    requests = []
    for lm in adapters:
        tasks = harness.load_tasks(manager, names, data)
        results.append(harness.run_tasks(lm, tasks))
        made = [(task.task_name, one.args, one.resps[0])
                for task in tasks for one in task.instances]
        requests.append(made)
    return results, requests


def test_parity_with_the_harness_s_own_adapter(adapters, manager, data):
    (ours, theirs), (our_requests, their_requests) = run_both(adapters, manager, TASKS, data)
    assert len(our_requests) == len(their_requests) == 6 * (5 * 4 + 3 * 2 + 2)
    for (task, args, have), (_, same, want) in zip(our_requests, their_requests):
        assert args == same
        if task == "wikitext":
            assert have == pytest.approx(want, abs=1e-3)
        else:
            assert have[0] == pytest.approx(want[0], abs=1e-3), (task, args)
            assert have[1] == want[1], (task, args)
    # texts shorter and longer than the window
    lengths = [len(adapters[0].tok_encode("".join(args))) for _, args, _ in our_requests]
    assert min(lengths) < WINDOW / 2
    assert sum(length > WINDOW + 1 for length in lengths) > 10
    assert ours["results"].keys() == set(TASKS)
    for task in TASKS:
        for key, value in theirs["results"][task].items():
            # text: a name, or the N/A of an error that is not computed
            is_exact = key.startswith("acc") or isinstance(value, str)
            expected = value if is_exact else pytest.approx(value, rel=1e-4)
            assert ours["results"][task][key] == expected, (task, key)


@pytest.mark.parametrize("kwargs", [
    {"until": [], "max_gen_toks": 12},
    {"until": ["\n"]},
    {"max_gen_toks": 5, "do_sample": False},
    {"until": "e", "max_gen_toks": 20, "temperature": 0.0},
    {"until": [], "max_gen_toks": 40},
])
def test_generation_parity(kwargs, adapters):
    from lm_eval.api.instance import Instance

    contexts = [*sentences(4), " ".join(sentences(20)), "A"]
    kwargs = {"max_gen_toks": 20} | kwargs
    texts = []
    for lm in adapters:
        requests = [Instance("generate_until", {}, (context, dict(kwargs)), 0)
                    for context in contexts]
        texts.append(lm.generate_until(requests))
    ours, theirs = texts
    assert ours == theirs
    assert len(set(ours)) > 1


# --------------------------------------------------------------------------------------------------
# Tokens at the join of context and continuation, and at the window's edge


@pytest.mark.parametrize("context, continuation, want", [
    ("A cat", " sat", ("A cat", " sat")),
    # the trailing space moves to the continuation, as words are encoded with theirs
    ("A cat ", "sat", ("A cat", " sat")),
    ("A cat  ", "sat", ("A cat", "  sat")),
    ("A cat\n", " sat", ("A cat", "\n sat")),  # the harness moves any white space
    ("a", "b", ("a", "b")),  # "ab" is one token: nothing would be left to score
    ("  ", "sat", ("<|endoftext|>", "  sat")),  # the whole context moves
    ("<|endoftext|>", " sat", ("<|endoftext|>" + "as text", " sat")),
])
def test_boundaries(context, continuation, want, adapters):
    tokenizer = load_tokenizer("gpt2")
    expected_context, expected_continuation = want
    ids, targets = adapters[0]._encode_pair(context, continuation)
    if expected_context == "<|endoftext|>":
        assert ids == [tokenizer.eot]
    elif expected_context.endswith("as text"):
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == context
    else:
        assert tokenizer.decode(ids) == expected_context
    assert targets
    assert tokenizer.decode(targets) == expected_continuation


def test_the_split_is_where_the_context_alone_would_end(adapters):
    # encoded together, " m" + "at" is " mat": the harness splits at len(encode(context)) anyway
    tokenizer = load_tokenizer("gpt2")
    context, continuation = "the cat on the m", "at and more"
    ids, targets = adapters[0]._encode_pair(context, continuation)
    assert ids == tokenizer.encode(context).tolist()
    assert targets == tokenizer.encode(context + continuation).tolist()[len(ids):]
    assert (ids, targets) == adapters[1]._encode_pair(context, continuation)


def request(kind, *args):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, args, 0)


def test_a_text_without_context_follows_the_end_of_text(adapters, model):
    lm = adapters[0]
    tokenizer = load_tokenizer("gpt2")
    (have, _), = lm.loglikelihood([request("loglikelihood", "", "The cat sat")], disable_tqdm=True)
    want = reference(model, [tokenizer.eot], tokenizer.encode("The cat sat").tolist())
    assert have == pytest.approx(want, abs=1e-4)
    rolling, empty = lm.loglikelihood_rolling(
        [request("loglikelihood_rolling", text) for text in ("The cat sat", "")], disable_tqdm=True)
    assert rolling == pytest.approx(want, abs=1e-4)
    assert empty == 0


def test_rolling_windows_are_the_harness_s(adapters):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    lm = adapters[0]
    tokenizer = load_tokenizer("gpt2")
    for n in (1, 7, 20):
        text = " ".join(sentences(n))
        ids = tokenizer.encode(text).tolist()
        windows = get_rolling_token_windows(ids, tokenizer.eot, WINDOW, context_len=1)
        pairs = [make_disjoint_window(window) for window in windows]
        expected = sum(nats for nats, _ in lm.scores(pairs))
        (nats,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)],
                                           disable_tqdm=True)
        assert nats == pytest.approx(expected, abs=1e-3)


# --------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("settings, temperature", [
    ({}, 0.0),
    ({"do_sample": True}, 1.0),
    ({"temperature": 0.7}, 0.7),
    ({"do_sample": True, "temperature": 0.7}, 0.7),
    ({"do_sample": False, "temperature": 0.7}, 0.0),
])
def test_a_task_s_settings_decide_whether_it_samples(settings, temperature, adapters):
    prompts = adapters[0].prompts([("a", {"until": ["."], **settings})])
    assert prompts.temperature == temperature


class Spelling(torch.nn.Module):
    """A model that generates the given ids in order, then repeats the last one."""

    def __init__(self, ids, vocab_size, block_size):
        super().__init__()
        self.config = tiny(block_size=block_size)
        self.ids = ids
        self.vocab_size = vocab_size
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, idx, kv_cache, logits_at):
        kv_cache.calls = getattr(kv_cache, "calls", -1) + 1
        token = torch.tensor(self.ids[min(kv_cache.calls, len(self.ids) - 1)])
        logits = torch.nn.functional.one_hot(token, self.vocab_size).float()
        return logits.expand(len(idx), -1)


@pytest.mark.parametrize("until, max_gen_toks, want", [
    ([], 99, "the cat sat on the mat."),       # ends at the end of text, which is not part of it
    ([" on"], 99, "the cat sat"),
    (["on th"], 99, "the cat sat "),           # across tokens
    (["mat", "sat"], 99, "the cat "),          # the earliest
    ("cat", 99, "the "),                       # a string by itself
    (["", "dog"], 99, "the cat sat on the mat."),
    (["the"], 99, ""),
])
def test_stop_strings(until, max_gen_toks, want, tokenizer, processes):
    ids = tokenizer.encode("the cat sat on the mat.").tolist()
    model = Spelling([*ids, tokenizer.eot], tokenizer.vocab_size, 200)
    lm = harness.adapter(model, tokenizer, processes)

    def generate(**kwargs):
        (text,) = lm.generate_until([request("generate_until", "a", kwargs)], disable_tqdm=True)
        return text

    assert generate(until=until, max_gen_toks=max_gen_toks) == want
    assert generate(until=[], max_gen_toks=3) == tokenizer.decode(ids[:3])


TOGETHER = """
import json, sys
from helpers import sentences
from lib.devices import Processes
from lib.evals import harness
from lib.tokenizers import load_tokenizer
from lm_eval.api.instance import Instance
from train_gpt2 import GPT
model, calls = GPT.from_pretrained(sys.argv[1]).eval(), []
model.register_forward_hook(lambda *args: calls.append(1))
with Processes("cpu") as processes:
    lm = harness.adapter(model, load_tokenizer("gpt2"), processes, batch_size=2)
    asked = [(text, {"until": ["e"], "max_gen_toks": 5 + i // 3, "temperature": i % 2 * 0.5})
             for i, text in enumerate(sentences(9))]
    texts = lm.generate_until([Instance("generate_until", {}, args, 0) for args in asked])
    with open(f"{processes.rank}_of_{processes.world_size}.json", "w") as file:
        json.dump([texts, len(calls)], file)
"""


def test_two_processes_share_the_work_and_generate_the_same(launch, hf_folder, tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    env = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    for processes in (1, 2):
        result = launch(script, hf_folder, processes=processes, env=env)
        assert result.returncode == 0, result.stderr

    def read(name):
        return json.loads((tmp_path / f"{name}.json").read_text())

    texts, calls = read("0_of_1")
    shared_texts, shared_calls = read("0_of_2")
    assert read("1_of_2") == [shared_texts, shared_calls]
    assert shared_texts == texts
    assert shared_calls < calls
    assert len(set(texts)) > 3


# --------------------------------------------------------------------------------------------------
# Local files


def foundry(task, item):
    """An item in the harness's columns -> in those of llm-foundry's files."""
    if task in ("arc_easy", "arc_challenge"):
        return {
            "query": f"Question: {item['question']}",
            "choices": item["choices"]["text"],
            "gold": "ABCD".index(item["answerKey"]),
        }
    if task == "piqa":
        return {
            "query": f"Question: {item['goal']}\n",
            "choices": [item["sol1"], item["sol2"]],
            "gold": item["label"],
        }
    if task == "lambada_openai":
        context, _, word = item["text"].rpartition(" ")
        return {"context": context, "continuation": word}
    return {
        "ctx": f"{item['ctx_a']} {item['ctx_b']}".strip(),
        "label": int(item["label"]),
        "activity_label": item["activity_label"],
        "endings": item["endings"],
    }


def prompts(task):
    task.build_all_requests(rank=0, world_size=1)
    return [(one.args, one.doc_id, task.doc_to_target(one.doc)) for one in task.instances]


def first_prompt(task, item):
    """The harness's first prompt for an item: (context, continuation)."""
    if task in ("arc_easy", "arc_challenge"):
        return f"Question: {item['question']}\nAnswer:", f" {item['choices']['text'][0]}"
    if task == "piqa":
        return f"Question: {item['goal']}\nAnswer:", f" {item['sol1']}"
    if task == "lambada_openai":
        context, _, word = item["text"].rpartition(" ")
        return context, f" {word}"
    return f"Sitting: {item['ctx_a']} The fly", f" {item['endings'][0]}"


@pytest.mark.parametrize("task", [
    "arc_easy", "arc_challenge", "piqa", "lambada_openai", "hellaswag",
])
def test_both_kinds_of_files_have_the_harness_s_prompts(task, manager, tmp_path):
    items = task_items(task)
    if task == "hellaswag":
        items[1] |= {"ctx_a": 'Fold the "egg whites". Bake.', "ctx_b": ""}  # as WikiHow's
    own = tmp_path / "own"
    own.mkdir()
    write_lines(own / f"{task}.jsonl", items)
    write_lines(tmp_path / f"{task}_val.jsonl", [foundry(task, item) for item in items])
    (own_task,) = harness.load_tasks(manager, [task], own)
    (foundry_task,) = harness.load_tasks(manager, [task], tmp_path)
    expected = prompts(own_task)
    assert prompts(foundry_task) == expected
    first, _, _ = expected[0]
    assert first == first_prompt(task, items[0])


def test_the_configuration_is_the_harness_s(manager, data):
    task, = harness.load_tasks(manager, ["arc_easy"], data)
    theirs = manager.task_index["arc_easy"].cfg
    ours = task.config.to_dict()
    keys = theirs.keys() - {"tag", "metadata"}
    assert {key for key in keys if theirs[key] != ours.get(key)} <= {
        "dataset_path", "dataset_name", "dataset_kwargs", "test_split", "validation_split",
        "training_split", "fewshot_split",
    }
    assert task.config.dataset_path == "json"
    assert len(task.eval_docs) == 6


def test_few_shot_examples_are_not_test_items(tmp_path):
    """Otherwise the items of the test, with their answers, would be among the examples."""
    from lm_eval import tasks

    manager = tasks.TaskManager(include_defaults=False,
                                include_path=Path(tasks.__file__).parent / "gsm8k")

    def write(name, n):
        items = [{"question": f"{name} {i}", "answer": f"#### {i}"} for i in range(n)]
        write_lines(tmp_path / f"{name}.jsonl", items)

    write("gsm8k", 9)
    says = r"gsm8k shows 5 examples before each item: add gsm8k_train\.jsonl to"
    with pytest.raises(BadInput, match=says):
        harness.load_tasks(manager, ["gsm8k"], tmp_path)
    write("gsm8k_train", 7)
    task, = harness.load_tasks(manager, ["gsm8k"], tmp_path)
    task.set_fewshot_seed(0)
    task.build_all_requests()
    assert [one.args[0].count("gsm8k_train") for one in task.instances] == [5] * 9
    write_lines(tmp_path / "gsm8k_cot.jsonl", [{"question": "a", "answer": "#### 1"}])
    assert len(harness.load_tasks(manager, ["gsm8k_cot"], tmp_path)) == 1  # has its own examples


@pytest.mark.parametrize("text, says", [
    ('{"query": "a"}\n', "arc_easy.jsonl, line 1: does not fit the task (KeyError: 'choices')"),
    ('{"question": "a"}\n', "allenai/ai2_arc"),
    ('{"question": "a\n', "arc_easy.jsonl, line 1"),
    ("", "arc_easy.jsonl contains no items"),
    ("[1]\n", "line 1: not an item"),
    (None, "no arc_easy.jsonl in"),
])
def test_files_that_do_not_fit(text, says, manager, tmp_path):
    write_lines(tmp_path / "other.jsonl", [{}])
    if text is not None:
        (tmp_path / "arc_easy.jsonl").write_text(text)
    with pytest.raises(BadInput) as error:
        harness.load_tasks(manager, ["arc_easy"], tmp_path)
    assert says in str(error.value)
    if text is None:
        assert "other.jsonl" in str(error.value)


def test_local_files_need_no_network(manager, data, monkeypatch):
    """`datasets` reports each load of its readers by a HEAD request, which hangs if packets are
    dropped."""
    import datasets

    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(datasets.load, "get_session", lambda: asked.append("the hub"))
    harness.load_tasks(manager, ["arc_easy"], data)
    assert asked == []


def test_local_files_are_of_single_tasks(manager, data):
    with pytest.raises(BadInput, match="ai2_arc is a group"):
        harness.load_tasks(manager, ["ai2_arc"], data)


def test_without_network_and_data_the_remedy_is_named(manager):
    says = r"cannot load the data of arc_easy \(\w+\): connect .* or .*--data_dir"
    with pytest.raises(BadInput, match=says):
        harness.load_tasks(manager, ["arc_easy"])  # HF_HUB_OFFLINE here


GOLD = {"query": "Question: a", "choices": ["b", "c"], "gold": 0}


@pytest.mark.parametrize("task, row", [
    *(("arc_easy", GOLD | {"gold": gold}) for gold in (-1, 2, "x", "0", 1.0, True, None)),
    ("arc_easy", GOLD | {"choices": list("abcdefghi")}),
    ("arc_easy", GOLD | {"choices": ["b", 3]}),
    ("arc_easy", GOLD | {"query": 3}),
    ("piqa", GOLD | {"choices": ["a", "b", "c"]}),
    ("lambada_openai", {"context": "a", "continuation": ["b"]}),
    ("hellaswag", {"ctx": "a", "endings": ["b"] * 4, "label": -1, "activity_label": "c"}),
    # in the harness's own columns
    ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": -1}),
    ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": 2}),
    ("piqa", {"goal": "a", "sol1": "b", "sol2": "c", "label": "x"}),
    ("piqa", {"goal": None, "sol1": "b", "sol2": "c", "label": 1}),
    ("hellaswag", {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d"] * 4,
                   "label": "7"}),
    ("winogrande", {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "3"}),
])
def test_a_row_without_a_correct_answer_is_refused(task, row, manager, tmp_path):
    good = task_items(task)[0]
    if row.keys() & {"gold", "ctx", "context"}:
        good = foundry(task, good)
    write_lines(tmp_path / f"{task}.jsonl", [good, row])
    with pytest.raises(BadInput, match=rf"{task}\.jsonl.*: give it the columns of"):
        harness.load_tasks(manager, [task], tmp_path)


def test_a_row_without_ctx_is_checked_before_it_is_split():
    with pytest.raises(ValueError, match="not a HellaSwag item"):
        harness.hellaswag({"endings": ["b"] * 4, "label": 0})


def test_brackets_that_never_close_are_cleaned_in_linear_time(manager, tmp_path):
    item = task_items("hellaswag")[0] | {"ctx_a": "[" * 300_000}
    write_lines(tmp_path / "hellaswag.jsonl", [item])
    assert len(harness.load_tasks(manager, ["hellaswag"], tmp_path)) == 1


def test_names(manager, monkeypatch):
    monkeypatch.setattr(harness, "task_manager", lambda names: manager)
    assert harness.find_tasks("piqa, arc_eas*,piqa") == (manager, ["piqa", "arc_easy"])
    for names, says in (
        ("piqa,helaswag", "unknown task 'helaswag': did you mean hellaswag"),
        (" ,", "no task named"),
    ):
        with pytest.raises(BadInput, match=says):
            harness.find_tasks(names)


@pytest.mark.slow
def test_tasks_outside_the_folders_searched_first_are_found():
    """Also if their names start like one of the folders."""
    assert harness.find_tasks("hellaswag_fr,arc_easy")[1] == ["hellaswag_fr", "arc_easy"]


# --------------------------------------------------------------------------------------------------
# Results


def test_too_little_memory_has_its_own_remedy(adapters, manager, data, monkeypatch):
    def score(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(harness, "score", score)
    results = harness.run_tasks(adapters[0], harness.load_tasks(manager, ["piqa"], data))
    reason = "out of memory: run eval_harness.py with a smaller --batch_size"
    assert results == {"failed": {"piqa": reason}}


def test_a_lost_connection_is_not_a_failed_task(adapters, manager, data, monkeypatch):
    def score(*args, **kwargs):
        raise torch.distributed.DistBackendError("NCCL error")

    monkeypatch.setattr(harness, "score", score)
    with pytest.raises(torch.distributed.DistBackendError):
        harness.run_tasks(adapters[0], harness.load_tasks(manager, ["piqa"], data))


def test_when_a_task_fails_the_others_keep_their_results(adapters, manager, data, tmp_path):
    # exp(nats / words) overflows
    write_lines(tmp_path / "wikitext.jsonl", [{"page": "one_word_of_very_many_letters" * 90}])
    shutil.copy(data / "piqa.jsonl", tmp_path)
    tasks = harness.load_tasks(manager, ["wikitext", "piqa"], tmp_path)
    results = harness.run_tasks(adapters[0], tasks)
    assert results["results"].keys() == harness.headlines(results).keys() == {"piqa"}
    assert results["failed"]["wikitext"].startswith("OverflowError")


def test_a_diverged_model_has_no_results(model, manager, data, processes):
    broken = GPT(model.config).eval()
    broken.lm_head.weight.data.fill_(math.nan)
    lm = harness.adapter(broken, load_tokenizer("gpt2"), processes)
    with pytest.raises(NonFinite):
        harness.run_tasks(lm, harness.load_tasks(manager, ["piqa"], data))
    with pytest.raises(NonFinite):
        lm.generate_until([request("generate_until", "a", {"until": ["."]})])


def test_once_stopped_no_forward_pass_is_made(model, manager, data, processes):
    silent = torch.nn.Module()  # cannot be called
    silent.config = model.config
    lm = harness.adapter(silent, load_tokenizer("gpt2"), processes, stopped=lambda: True)
    assert harness.run_tasks(lm, harness.load_tasks(manager, ["piqa"], data))["failed"] == {}
    assert lm.generate_until([request("generate_until", "a", {"until": ["."]})]) == [""]


def test_tasks_that_cannot_run(adapters, manager, data, monkeypatch):
    tasks = harness.load_tasks(manager, ["piqa"], data)
    # the harness's own adapter divides the items among the processes
    several = SimpleNamespace(world_size=7)
    with pytest.raises(BadInput, match="piqa: 6 items for 7 processes: raise --limit"):
        harness.run_tasks(several, tasks)
    monkeypatch.setattr(type(tasks[0]), "UNSAFE_CODE", True, raising=False)
    with pytest.raises(BadInput, match="piqa runs model-written code"):
        harness.load_tasks(manager, ["piqa"], data)
