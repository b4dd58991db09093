"""eval_harness.py against the harness's own Hugging Face adapter on the same weights and files, and launched for real:
python -m pytest tests/test_eval_harness.py -n 2"""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import TINY_FLAGS, reference, sentences, tiny, tiny_checkpoint, write_data, write_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_harness
import train_gpt2
from benchmarks import harness_parity
from lib import checkpoint as checkpoints
from lib.cli import BadInput
from lib.devices import Processes
from lib.tokenizers import load_tokenizer, train_bpe
from train_gpt2 import GPT, TrainConfig, load_checkpoint

WINDOW = 48
TASKS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "lambada_openai", "boolq", "openbookqa", "sciq", "wikitext")


def items(task, n=6):
    """n items of a task with the columns that the harness reads, some longer than the window."""
    rng = random.Random(task)
    texts = sentences(4 * n, task)

    def one(i):
        short, long = texts[4 * i], f"{texts[4 * i + 1]} " * rng.choice((1, 12))
        answers = [text[:rng.randint(9, 40)].strip() for text in texts[4 * i:4 * i + 4]]
        choice = {"choices": {"text": answers, "label": list("ABCD")}, "answerKey": "ABCD"[i % 4]}
        return {
            "hellaswag": {"activity_label": "Sitting", "ctx_a": long.strip(), "ctx_b": "the fly", "endings": answers, "label": str(i % 4)},
            "arc_easy": {"question": long.strip(), **choice}, "arc_challenge": {"question": short, **choice},
            "piqa": {"goal": short, "sol1": answers[0], "sol2": answers[1], "label": i % 2},
            "winogrande": {"sentence": f"{short} So _ was on it.", "option1": "the cat", "option2": "a dog", "answer": "12"[i % 2]},
            "lambada_openai": {"text": f"{long}It was the {rng.choice(('cat', 'mat', 'tabletop'))}"},
            "boolq": {"passage": long, "question": short, "label": i % 2},
            "openbookqa": {"question_stem": short, **choice},
            "sciq": {"support": long, "question": short, "correct_answer": "mat", "distractor1": "cat", "distractor2": "a dog",
                     "distractor3": "roof"},
            "wikitext": {"page": f" = Title = \n {long * (i % 3)} "},
        }[task]

    return [one(i) for i in range(n)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What datasets stores of the files of these tests goes with them."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write_lines(folder / f"{task}.jsonl", items(task))
    return folder


@pytest.fixture(scope="module")
def manager():
    """The harness's index, or the part of it that has these tasks."""
    manager = eval_harness.task_manager(TASKS)
    assert len(manager.all_tasks) < 1000  # all of them take seconds
    return manager


@pytest.fixture(scope="module")
def processes():
    return Processes("cpu")


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A Hugging Face GPT-2 of two layers with random weights and opinions, and GPT-2's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("hf") / "random-gpt2"
    torch.manual_seed(7)
    # large weights, but a head not so sure of itself that float32's rounding of a log-likelihood would show
    hf = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=WINDOW, initializer_range=0.2)).eval()
    hf.save_pretrained(folder)
    harness_parity.save_gpt2_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(hf_folder):
    return GPT.from_pretrained(str(hf_folder)).eval()


@pytest.fixture(scope="module")
def adapters(model, hf_folder, processes):
    """(ours, the harness's own) of the same weights."""
    from lm_eval.models.huggingface import HFLM

    return (eval_harness.adapter(model, load_tokenizer("gpt2"), processes),
            HFLM(pretrained=str(hf_folder), device="cpu", batch_size=3))


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(sentences(200), 280)


@pytest.fixture
def checkpoint(bpe, tmp_path):
    """(path, model) of an untrained model with opinions and a tokenizer of its own."""
    (tmp_path / "log" / "a").mkdir(parents=True)
    path = tmp_path / "log" / "a" / "ckpt_00020.pt"
    return path, tiny_checkpoint(path, bpe, init="xavier", block_size=WINDOW, pos="rope", norm="rmsnorm", mlp="swiglu")


# ----------------------------------------------------------------------------------------------------------------------
# Against the harness's own adapter


def test_what_the_benchmark_hands_to_transformers_is_the_model(model, tmp_path):
    padded = GPT(dataclasses.replace(model.config, vocab_multiple=128))  # as training pads the vocabulary
    harness_parity.save_as_hugging_face(padded, tmp_path)
    idx = torch.randint(model.config.vocab_size, (2, 9))
    torch.testing.assert_close(GPT.from_pretrained(str(tmp_path))(idx), padded(idx))


def run_both(adapters, manager, names, data):
    """Both adapters on the tasks -> (results of both, requests of both), requests being (task, arguments, response)."""
    results, requests = [], []
    for lm in adapters:
        tasks = eval_harness.load_tasks(manager, names, data)
        results.append(eval_harness.evaluate(lm, manager, tasks))
        requests.append([(task.task_name, one.args, one.resps[0]) for task in tasks for one in task.instances])
    return results, requests


def test_parity_with_the_harness_s_own_adapter(adapters, manager, data):
    (ours, theirs), (our_requests, their_requests) = run_both(adapters, manager, TASKS, data)
    assert len(our_requests) == len(their_requests) == 6 * (5 * 4 + 3 * 2 + 2)
    for (task, args, have), (_, same, want) in zip(our_requests, their_requests):
        assert args == same
        if task == "wikitext":
            assert have == pytest.approx(want, abs=1e-3)
        else:
            assert have[0] == pytest.approx(want[0], abs=1e-3) and have[1] == want[1], (task, args)
    lengths = [len(adapters[0].tok_encode("".join(args))) for _, args, _ in our_requests]
    assert min(lengths) < WINDOW / 2 and sum(length > WINDOW + 1 for length in lengths) > 10  # both sides of the window's edge
    assert ours["results"].keys() == set(TASKS)
    for task in TASKS:
        for key, value in theirs["results"][task].items():
            exact = key.startswith("acc") or isinstance(value, str)  # a name, or the N/A of an error that is not computed
            assert ours["results"][task][key] == (value if exact else pytest.approx(value, rel=1e-4)), (task, key)


@pytest.mark.parametrize("kwargs", [{"until": [], "max_gen_toks": 12}, {"until": ["\n"]}, {"max_gen_toks": 5, "do_sample": False},
                                    {"until": "e", "max_gen_toks": 20, "temperature": 0.0}, {"until": [], "max_gen_toks": 40}])
def test_generation_parity(kwargs, adapters):
    from lm_eval.api.instance import Instance

    contexts = [*sentences(4), " ".join(sentences(20)), "A"]
    kwargs = {"max_gen_toks": 20} | kwargs
    ours, theirs = (lm.generate_until([Instance("generate_until", {}, (context, dict(kwargs)), 0) for context in contexts])
                    for lm in adapters)
    assert ours == theirs and len(set(ours)) > 1


# ----------------------------------------------------------------------------------------------------------------------
# Tokens at the join of context and continuation, and at the window's edge


@pytest.mark.parametrize("context, continuation, want", [
    ("A cat", " sat", ("A cat", " sat")),
    ("A cat ", "sat", ("A cat", " sat")),          # the trailing space moves over, as words are encoded with theirs
    ("A cat  ", "sat", ("A cat", "  sat")),
    ("A cat\n", " sat", ("A cat", "\n sat")),      # the harness counts any white space
    ("a", "b", ("a", "b")),                        # "ab" is one token: nothing would be left to score
    ("  ", "sat", ("<|endoftext|>", "  sat")),     # all of the context moves over
    ("<|endoftext|>", " sat", ("<|endoftext|>" + "as text", " sat")),
])
def test_boundaries(context, continuation, want, adapters):
    lm, tokenizer = adapters[0], load_tokenizer("gpt2")
    ids, targets = lm._encode_pair(context, continuation)
    if want[0] == "<|endoftext|>":
        assert ids == [tokenizer.eot]
    elif want[0].endswith("as text"):
        assert tokenizer.eot not in ids and tokenizer.decode(ids) == context
    else:
        assert tokenizer.decode(ids) == want[0]
    assert tokenizer.decode(targets) == want[1] and targets


def test_split_is_where_the_context_alone_would_end(adapters):
    # encoded together, " m" + "at" is " mat": the harness splits at len(encode(context)), whatever stands there
    tokenizer = load_tokenizer("gpt2")
    context, continuation = "the cat on the m", "at and more"
    ids, targets = adapters[0]._encode_pair(context, continuation)
    assert ids == tokenizer.encode(context).tolist()
    assert targets == tokenizer.encode(context + continuation).tolist()[len(ids):]
    assert (ids, targets) == adapters[1]._encode_pair(context, continuation)


def request(kind, *args):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, args, 0)


def test_without_context_the_end_of_text_stands_before(adapters, model):
    lm, tokenizer = adapters[0], load_tokenizer("gpt2")
    (have, _), = lm.loglikelihood([request("loglikelihood", "", "The cat sat")], disable_tqdm=True)
    want = reference(model, [tokenizer.eot], tokenizer.encode("The cat sat").tolist())
    assert have == pytest.approx(want, abs=1e-4)
    rolling, empty = lm.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in ("The cat sat", "")], disable_tqdm=True)
    assert rolling == pytest.approx(want, abs=1e-4) and empty == 0


def test_rolling_windows_are_the_harness_s(adapters):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    lm, tokenizer = adapters[0], load_tokenizer("gpt2")
    for text in (" ".join(sentences(k)) for k in (1, 7, 20)):
        windows = get_rolling_token_windows(tokenizer.encode(text).tolist(), tokenizer.eot, WINDOW, context_len=1)
        want = sum(nats for nats, _ in lm.scores([make_disjoint_window(window) for window in windows], True))
        assert lm.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True) == [pytest.approx(want, abs=1e-3)]


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def test_temperature(adapters, model):
    lm, tokenizer = adapters[0], load_tokenizer("gpt2")
    torch.manual_seed(0)
    texts = lm.write([[3, 4]] * 400, 1, [], 0.02)
    with torch.no_grad():
        probs = (model(torch.tensor([[3, 4]]))[0, -1] / 0.02).softmax(dim=-1)
    likeliest = tokenizer.decode([int(probs.argmax())])
    share = sum(text == likeliest for text in texts) / 400
    assert share == pytest.approx(probs.max().item(), abs=4 * math.sqrt(0.25 / 400)) and len(set(texts)) > 1


@pytest.mark.parametrize("settings, want", [({}, 0.0), ({"do_sample": True}, 1.0), ({"temperature": 0.7}, 0.7),
                                            ({"do_sample": True, "temperature": 0.7}, 0.7), ({"do_sample": False, "temperature": 0.7}, 0.0)])
def test_a_task_s_settings_decide_whether_it_samples(settings, want, adapters, monkeypatch):
    temperatures = []
    monkeypatch.setattr(adapters[0], "write", lambda prompts, limit, until, temperature: temperatures.append(temperature) or ["x"])
    assert adapters[0].generate_until([request("generate_until", "a", {"until": ["."], **settings})]) == ["x"]
    assert temperatures == [want]


class Spelling(torch.nn.Module):
    """A model that writes the given ids one after the other, then the last one for ever."""

    def __init__(self, ids, vocab_size, block_size):
        super().__init__()
        self.config, self.ids, self.vocab_size = tiny(block_size=block_size), ids, vocab_size
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, idx, at, past):
        past.calls = getattr(past, "calls", -1) + 1
        token = torch.tensor(self.ids[min(past.calls, len(self.ids) - 1)])
        return torch.nn.functional.one_hot(token, self.vocab_size).float().expand(len(idx), -1)


@pytest.mark.parametrize("until, max_gen_toks, want", [
    ([], 99, "the cat sat on the mat."),       # ends at the end of text, which is not part of it
    ([" on"], 99, "the cat sat"),
    (["on th"], 99, "the cat sat "),           # across tokens
    (["mat", "sat"], 99, "the cat "),          # the earliest
    ("cat", 99, "the "),                       # a string by itself
    (["", "dog"], 99, "the cat sat on the mat."),
    (["the"], 99, ""),
])
def test_stop_strings(until, max_gen_toks, want, bpe, processes):
    model = Spelling([*bpe.encode("the cat sat on the mat.").tolist(), bpe.eot], bpe.vocab_size, 200)
    lm = eval_harness.adapter(model, bpe, processes)
    kwargs = {"until": until, "max_gen_toks": max_gen_toks}
    assert lm.generate_until([request("generate_until", "a", kwargs)], disable_tqdm=True) == [want]
    short, = lm.generate_until([request("generate_until", "a", {"until": [], "max_gen_toks": 3})], disable_tqdm=True)
    assert short == bpe.decode(bpe.encode("the cat sat on the mat.")[:3])


# ----------------------------------------------------------------------------------------------------------------------
# Local files


def foundry(task, item):
    """An item of the harness's columns as llm-foundry's files hold it, which ../shared/evals has."""
    if task in ("arc_easy", "arc_challenge"):
        return {"query": f"Question: {item['question']}", "choices": item["choices"]["text"], "gold": "ABCD".index(item["answerKey"])}
    if task == "piqa":
        return {"query": f"Question: {item['goal']}\n", "choices": [item["sol1"], item["sol2"]], "gold": item["label"]}
    if task == "lambada_openai":
        context, _, word = item["text"].rpartition(" ")
        return {"context": context, "continuation": word}
    return {"ctx": f"{item['ctx_a']} {item['ctx_b']}".strip(), "label": int(item["label"])} | {key: item[key] for key in ("activity_label", "endings")}


def prompts(task):
    task.build_all_requests(rank=0, world_size=1)
    return [(one.args, one.doc_id, task.doc_to_target(one.doc)) for one in task.instances]


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "piqa", "lambada_openai", "hellaswag"])
def test_both_kinds_of_files_give_the_harness_s_prompts(task, manager, tmp_path):
    there = items(task)
    if task == "hellaswag":
        there[1] |= {"ctx_a": 'Fold the "egg whites". Bake.', "ctx_b": ""}  # as WikiHow's
    (tmp_path / "own").mkdir()
    write_lines(tmp_path / "own" / f"{task}.jsonl", there)
    write_lines(tmp_path / f"{task}_val.jsonl", [foundry(task, item) for item in there])
    own, other = (prompts(*eval_harness.load_tasks(manager, [task], folder)) for folder in (tmp_path / "own", tmp_path))
    assert own == other
    (context, continuation), _, _ = own[0]
    item = there[0]
    assert (context, continuation) == {
        "arc_easy": lambda: (f"Question: {item['question']}\nAnswer:", f" {item['choices']['text'][0]}"),
        "arc_challenge": lambda: (f"Question: {item['question']}\nAnswer:", f" {item['choices']['text'][0]}"),
        "piqa": lambda: (f"Question: {item['goal']}\nAnswer:", f" {item['sol1']}"),
        "lambada_openai": lambda: (item["text"].rpartition(" ")[0], f" {item['text'].split(' ')[-1]}"),
        "hellaswag": lambda: (f"Sitting: {item['ctx_a']} The fly", f" {item['endings'][0]}"),
    }[task]()


def test_the_configuration_is_the_harness_s(manager, data):
    task, = eval_harness.load_tasks(manager, ["arc_easy"], data)
    theirs, ours = manager.task_index["arc_easy"].cfg, task.config.to_dict()
    changed = {"dataset_path", "dataset_name", "dataset_kwargs", "test_split", "validation_split", "training_split", "fewshot_split"}
    assert {key for key in theirs.keys() - {"tag", "metadata"} if theirs[key] != ours.get(key)} <= changed
    assert task.config.dataset_path == "json" and len(task.eval_docs) == 6


def test_few_shot_examples_come_from_the_train_file(manager, data, tmp_path):
    shutil.copy(data / "piqa.jsonl", tmp_path)
    write_lines(tmp_path / "piqa_train.jsonl", items("piqa", 20)[10:])
    task, = eval_harness.load_tasks(manager, ["piqa"], tmp_path)
    assert len(task.eval_docs) == 6 and len(task.fewshot_docs()) == 10


def test_few_shot_examples_are_no_items_of_the_test(tmp_path):
    """Where a task shows examples, its own items would be among them, with their answers."""
    from lm_eval import tasks

    manager = tasks.TaskManager(include_defaults=False, include_path=Path(tasks.__file__).parent / "gsm8k")
    for name, n in (("gsm8k", 9), ("gsm8k_train", 7)):
        if name == "gsm8k_train":
            with pytest.raises(BadInput, match=r"gsm8k shows 5 examples before each item: add gsm8k_train\.jsonl to"):
                eval_harness.load_tasks(manager, ["gsm8k"], tmp_path)
        write_lines(tmp_path / f"{name}.jsonl", [{"question": f"{name} {i}", "answer": f"#### {i}"} for i in range(n)])
    task, = eval_harness.load_tasks(manager, ["gsm8k"], tmp_path)
    task.set_fewshot_seed(0)
    task.build_all_requests()
    assert [one.args[0].count("gsm8k_train") for one in task.instances] == [5] * 9
    write_lines(tmp_path / "gsm8k_cot.jsonl", [{"question": "a", "answer": "#### 1"}])
    assert len(eval_harness.load_tasks(manager, ["gsm8k_cot"], tmp_path)) == 1  # has examples of its own


@pytest.mark.parametrize("text, says", [
    ('{"query": "a"}\n', "arc_easy.jsonl does not fit the task arc_easy"),
    ('{"question": "a"}\n', "allenai/ai2_arc"),
    ('{"question": "a\n', "arc_easy.jsonl does not fit"),
    ("", "arc_easy.jsonl does not fit"),
    ("[1]\n", "arc_easy.jsonl does not fit"),
    (None, "no arc_easy.jsonl in"),
])
def test_files_that_do_not_fit(text, says, manager, tmp_path):
    write_lines(tmp_path / "other.jsonl", [{}])
    if text is not None:
        (tmp_path / "arc_easy.jsonl").write_text(text)
    with pytest.raises(BadInput) as error:
        eval_harness.load_tasks(manager, ["arc_easy"], tmp_path)
    assert says in str(error.value) and (text is not None or "other.jsonl" in str(error.value))


def test_local_files_are_of_single_tasks(manager, data):
    with pytest.raises(BadInput, match="ai2_arc is a set of them"):
        eval_harness.load_tasks(manager, ["ai2_arc"], data)


def test_without_network_and_data_one_line_says_what_to_do(manager):
    with pytest.raises(BadInput, match=r"cannot load the data of arc_easy \(\w+\): connect .* or .*--data_dir"):
        eval_harness.load_tasks(manager, ["arc_easy"])  # HF_HUB_OFFLINE here


def test_names(manager, monkeypatch):
    monkeypatch.setattr(eval_harness, "task_manager", lambda names: manager)
    assert eval_harness.find_tasks("piqa, arc_eas*,piqa") == (manager, ["piqa", "arc_easy"])
    assert eval_harness.find_tasks(eval_harness.GROUPS["small"])[1] == eval_harness.GROUPS["small"].split(",")
    with pytest.raises(BadInput, match="unknown task 'helaswag': did you mean hellaswag"):
        eval_harness.find_tasks("piqa,helaswag")


@pytest.mark.slow
def test_all_of_the_harness_is_there():
    """Also what is named almost like one of the folders that are looked through first."""
    assert eval_harness.find_tasks("hellaswag_fr,arc_easy")[1] == ["hellaswag_fr", "arc_easy"]


# ----------------------------------------------------------------------------------------------------------------------
# The command


def accuracies(path):
    return json.loads(path.read_text())["results"]


def test_one_and_two_processes_give_the_same_results(launch, checkpoint, data, tmp_path):
    path, _ = checkpoint
    flags = ["--checkpoint", path, "--tasks", "arc_easy,wikitext", "--limit", 5, "--data_dir", data, "--device", "cpu"]
    env = {"HF_HOME": str(tmp_path / "hf")}
    one = launch("eval_harness.py", *flags, env=env)
    assert one.returncode == 0, one.stderr
    assert "|arc_easy" in one.stdout and "bits_per_byte" in one.stdout
    beside = path.with_name("eval_00020.json")
    assert f"results: {beside}" in one.stdout
    two = launch("eval_harness.py", *flags, "--output", tmp_path / "two.json", processes=2, env=env)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("|arc_easy") == 1
    have, want = accuracies(tmp_path / "two.json"), accuracies(beside)
    assert have.keys() == want.keys() == {"arc_easy", "wikitext"}
    for task, values in want.items():
        assert have[task].keys() == values.keys()
        assert all(have[task][key] == (v if isinstance(v, str) else pytest.approx(v, rel=1e-5)) for key, v in values.items())
    assert json.loads(beside.read_text())["n-samples"]["arc_easy"]["effective"] == 5


def test_too_little_memory_has_its_own_remedy(adapters, manager, data, monkeypatch):
    def score(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(eval_harness, "score", score)
    results = eval_harness.evaluate(adapters[0], manager, eval_harness.load_tasks(manager, ["piqa"], data))
    assert results == {"failed": {"piqa": "out of memory: eval_harness.py with a smaller --batch_size takes less"}}


def test_a_process_that_fails_alone_ends_the_others(launch, checkpoint, data, tmp_path):
    items = [json.loads(line) for line in (data / "arc_easy.jsonl").read_text().splitlines()][:4]
    items[2]["answerKey"] = "X"  # of the first process's share
    (tmp_path / "bad").mkdir()
    write_lines(tmp_path / "bad" / "arc_easy.jsonl", items)
    flags = ["--checkpoint", checkpoint[0], "--tasks", "arc_easy", "--data_dir", tmp_path / "bad", "--device", "cpu"]
    two = launch("eval_harness.py", *flags, processes=2, timeout=90)
    assert two.returncode != 0
    assert "eval_harness.py: error: no result of arc_easy (ValueError" in two.stderr and "leave arc_easy out" in two.stderr


def test_hugging_face_model_and_comparison(hf_folder, checkpoint, manager, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_harness, "task_manager", lambda names: manager)
    flags = ["--tasks", "piqa,lambada_openai", "--data_dir", str(data), "--device", "cpu"]
    eval_harness.main(["--model", str(hf_folder), *flags])
    eval_harness.main(["--checkpoint", str(checkpoint[0]), *flags, "--limit", "4", "--batch_size", "2"])
    capsys.readouterr()
    eval_harness.main(["--compare", "log/hf_random-gpt2", "log/a"])
    text, markdown, note, chart = capsys.readouterr().out.strip().split("\n\n")
    results = [accuracies(Path("log", name)) for name in ("hf_random-gpt2/eval.json", "a/eval_00020.json")]
    for table in (text, markdown):
        assert "random-gpt2" in table and "lambada_openai" in table and "perplexity (lower is better)" in table
        for values in results:
            assert f"{values['piqa']['acc,none']:.4f} ± {values['piqa']['acc_stderr,none']:.4f}" in table
    assert markdown.startswith("| task")
    assert note.splitlines() == [f"{task}: not the same items, 6 (hf_random-gpt2), 4 (a 20)" for task in ("piqa", "lambada_openai")]
    assert chart == "chart: compare.png" and Path("compare.png").read_bytes().startswith(b"\x89PNG")


def results_file(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": {"t": values}, "n-samples": {"t": {"original": 9, "effective": 9}},
                                "higher_is_better": {"t": {"acc": True}}}))
    return path


def test_a_run_is_its_newest_results(tmp_path):
    for step, acc in ((900, 0.1), (1000, 0.3), (95000, 0.2), (100000, 0.25)):
        results_file(tmp_path / "a" / f"eval_{step:05d}.json", **{"acc,none": acc, "acc_stderr,none": "N/A"})
    name, data = eval_harness.newest_results(tmp_path / "a")
    assert (name, data["results"]["t"]["acc,none"]) == ("a 100000", 0.25)
    more = {"results": {"u": {"acc,none": 0.5}}, "n-samples": {}, "higher_is_better": {}}
    for name in ("eval_100000_more.json", "eval_00900_of_a_long_name.json"):  # other tasks, of the same checkpoint and another
        (tmp_path / "a" / name).write_text(json.dumps(more))
    assert eval_harness.newest_results(tmp_path / "a")[1]["results"].keys() == {"t", "u"}
    name, data = eval_harness.newest_results(tmp_path / "a" / "eval_01000.json")
    assert (name, data["results"]["t"]["acc,none"]) == ("a/eval_01000", 0.3)
    other = results_file(tmp_path / "b" / "eval.json", **{"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.125})
    headers, rows, notes = eval_harness.tabulate_runs([(name, data), eval_harness.newest_results(other.parent)])
    assert headers == ["task", "metric", "a/eval_01000", "b"] and notes == []
    assert rows == [["t", "acc", "0.3000", ""], ["t", "exact_match (strict)", "", "0.5000 ± 0.1250"]]


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"results": {}}', '{"results": 3, "n-samples": {}}'])
def test_what_holds_no_results_is_bad_input(text, tmp_path):
    if text is not None:
        (tmp_path / "eval_1.json").write_text(text)
    with pytest.raises(BadInput, match="no results of eval_harness.py" if text else "no eval_<step>.json"):
        eval_harness.newest_results(tmp_path)
    with pytest.raises(BadInput):
        eval_harness.newest_results(tmp_path / "nowhere.json")


def test_the_chart_draws_accuracies_and_their_errors(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    runs = [("a", {"results": {"piqa": {"acc,none": 0.6, "acc_stderr,none": 0.1, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.2},
                               "wikitext": {"bits_per_byte,none": 1.5, "bits_per_byte_stderr,none": "N/A"}}}),
            ("b", {"results": {"boolq": {"acc,none": 0.7, "acc_stderr,none": "N/A"}}})]
    eval_harness.bar_chart(runs, tmp_path / "chart.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["piqa\nacc_norm", "boolq\nacc"]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers if hasattr(bars, "patches")]
    assert heights == [[0.5, pytest.approx(math.nan, nan_ok=True)], [pytest.approx(math.nan, nan_ok=True), 0.7]]


def test_a_chart_that_cannot_be_written(tmp_path, capsys):
    run = str(results_file(tmp_path / "a" / "eval.json", **{"acc,none": 0.5, "acc_stderr,none": 0.1}))
    for chart in ("nowhere/a.png", "a.xyz"):
        with pytest.raises(BadInput, match="cannot write .*--chart"):
            eval_harness.main(["--compare", run, "--chart", str(tmp_path / chart)])


@pytest.mark.parametrize("flags, says", [
    ([], "name either --checkpoint or --model"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--model", "gpt2"], "name either --checkpoint or --model"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--chart", "a.png"], "--chart is for --compare"),
    (["--compare", "log/a", "--checkpoint", "log/a/ckpt_00020.pt", "--limit", "9"], "leave out --checkpoint and --limit, or evaluate first"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--limit", "0"], "--limit must be at least 1, not 0"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--batch_size", "0"], "--batch_size must be at least 1"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--batch_size", "many"], "--batch_size"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--output", "there.json"], "there.json exists: delete it, or name another --output"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--batch_size", "2"], "eval_00020.json exists"),
    (["--checkpoint", "nowhere/ckpt_00001.pt"], "no checkpoint at nowhere/ckpt_00001.pt"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--output", "there.json/more.json"], "cannot write there.json/more.json"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--tasks", "piqa", "--data_dir", "nowhere"], "no folder nowhere: it should hold <task>.jsonl"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--tasks", "arc_eazy"], "unknown task 'arc_eazy': did you mean arc_easy"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--tasks", " ,"], "no task is named"),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--tasks", "sciq", "--data_dir", "log"], "no sciq.jsonl in log, which holds no jsonl files"),
    (["--checkpoint", "nowhere.pt", "--tasks", "piqa", "--data_dir", "data"], "no checkpoint at nowhere.pt"),
    (["--checkpoint", "none.pt", "--tasks", "piqa", "--data_dir", "data"], "none.pt is not a checkpoint of this project, it holds no tokenizer: name one that train_gpt2.py wrote"),
    (["--model", "gpt2", "--tasks", "piqa", "--data_dir", "data"], "cannot load the Hugging Face model gpt2"),  # offline here
    (["--model", "no_tokenizer", "--tasks", "piqa", "--data_dir", "data"], "no_tokenizer: it has no tokenizer. Give a folder"),
    (["--model", "torn", "--tasks", "piqa", "--data_dir", "data"], "cannot load the Hugging Face model torn: "),
    (["--checkpoint", "log/a/ckpt_00020.pt", "--tasks", "piqa", "--device", "mps"], "--device mps"),
    (["--compare", "log/a"], "no eval_<step>.json in log/a"),
    (["--group", "large"], "small"),
])
def test_bad_flags(flags, says, checkpoint, manager, hf_folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(data, "data")
    for folder in ("no_tokenizer", "torn"):
        Path(folder).mkdir()
        for name in ("config.json", "model.safetensors"):
            Path(folder, name).write_bytes((hf_folder / name).read_bytes()[:None if folder == "no_tokenizer" or name == "config.json" else 999])
    monkeypatch.setattr(eval_harness, "task_manager", lambda names: manager)
    write_lines(tmp_path / "there.json", [{}])
    if "eval_00020" in says:
        write_lines(tmp_path / "log" / "a" / "eval_00020.json", [{}])
    if flags[:2] == ["--checkpoint", "none.pt"]:
        state = {"step": 1, "model": checkpoint[1].state_dict(), "model_config": asdict(checkpoint[1].config),
                 "train_config": asdict(TrainConfig())}
        checkpoints.write(tmp_path / "none.pt", state)
    with pytest.raises(BadInput) as error:
        eval_harness.main(flags)
    assert says in str(error.value) and not Path("nowhere").exists() and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("package, flags", [("lm_eval", ["--checkpoint", "log/a/ckpt_00020.pt"]), ("tabulate", ["--compare", "log/a"])])
def test_missing_packages(package, flags, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=f"missing {package}: pip install -r requirements-dev.txt"):
        eval_harness.main(flags)


@pytest.mark.parametrize("flags", [["--limit", 0], pytest.param(["--tasks", "hellasweg"], marks=pytest.mark.slow)])
def test_bad_input_of_a_real_process_is_one_line(flags, launch, checkpoint):
    result = launch("eval_harness.py", "--checkpoint", checkpoint[0], "--device", "cpu", *flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("eval_harness.py: error: ") and result.stderr.count("\n") == 1, result.stderr


def test_tasks_that_cannot_run(manager, data):
    tasks = eval_harness.load_tasks(manager, ["piqa"], data)
    for world, limit, n in ((7, None, 6), (2, 1, 1), (7, 10, 6)):
        with pytest.raises(BadInput, match=f"piqa: {n} items for {world} processes: raise the limit"):
            eval_harness.check_tasks(tasks, world, limit)
    eval_harness.check_tasks(tasks, 6)
    tasks[0].UNSAFE_CODE = True
    with pytest.raises(BadInput, match="piqa runs code that a model wrote"):
        eval_harness.check_tasks(tasks, 1)


def test_a_task_that_fails_loses_no_other_s_results(checkpoint, manager, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_harness, "task_manager", lambda names: manager)
    write_lines(tmp_path / "wikitext.jsonl", [{"page": "one_word_of_very_many_letters" * 90}])  # exp(nats / words) overflows
    write_lines(tmp_path / "piqa.jsonl", items("piqa"))
    flags = ["--checkpoint", str(checkpoint[0]), "--data_dir", str(tmp_path), "--device", "cpu", "--dtype", "float32"]
    with pytest.raises(BadInput, match=r"no results of wikitext \(OverflowError: .*\): mend that, or leave it out of --tasks"):
        eval_harness.main([*flags, "--tasks", "wikitext,piqa"])
    saved = json.loads(checkpoint[0].with_name("eval_00020.json").read_text())
    assert saved["results"].keys() == {"piqa"} and "|piqa" in capsys.readouterr().out
    assert saved["config"]["checkpoint"] == str(checkpoint[0])


def test_any_checkpoint_runs(checkpoint, manager, data, processes, bpe):
    model, tokenizer, _ = load_checkpoint(checkpoint[0])
    assert tokenizer.vocab_size == bpe.vocab_size
    lm = eval_harness.adapter(model, tokenizer, processes)
    results = eval_harness.evaluate(lm, manager, eval_harness.load_tasks(manager, TASKS, data), limit=3)
    assert results["results"].keys() == set(TASKS)
    assert os.environ["HF_HUB_OFFLINE"] == "1" and math.isfinite(results["results"]["wikitext"]["bits_per_byte,none"])


# ----------------------------------------------------------------------------------------------------------------------
# In training


@pytest.mark.parametrize("processes", [1, 2])
def test_training_logs_what_the_script_finds_in_its_checkpoint(processes, launch, bpe, data, tmp_path):
    shards = write_data(tmp_path / "shards", bpe)
    # lambada has a metric whose standard error the harness bootstraps in processes of its own, if it is asked to
    tasks = ["--eval_tasks", "piqa,arc_easy,wikitext,lambada_openai", "--eval_tasks_dir", data, "--eval_tasks_limit", 4]
    run = launch("train_gpt2.py", *TINY_FLAGS, "--data", shards, "--max_steps", 3, "--eval_tasks_every", 2, *tasks, "--run_name", "r", "--device", "cpu",
                 processes=processes)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in (tmp_path / "log" / "r" / "log.txt").read_text().splitlines()]
    logged = {kind: [(int(step), float(value)) for step, k, value in lines if k == f"eval/{kind}"] for kind in ("piqa", "arc_easy", "wikitext", "lambada_openai")}
    assert [[step for step, _ in values] for values in logged.values()] == [[0, 2, 3]] * 4
    scored = launch("eval_harness.py", "--checkpoint", "log/r/ckpt_00003.pt", "--tasks", "piqa,arc_easy,wikitext", "--data_dir", data,
                    "--limit", 4, "--device", "cpu")
    assert scored.returncode == 0, scored.stderr
    results = json.loads((tmp_path / "log" / "r" / "eval_00003.json").read_text())["results"]
    for task, metric in (("piqa", "acc_norm,none"), ("arc_easy", "acc_norm,none"), ("wikitext", "bits_per_byte,none")):
        assert logged[task][-1][1] == pytest.approx(results[task][metric], rel=1e-4)
        assert f"step 3 | {task} {metric.partition(',')[0]} " in run.stdout
    events = EventAccumulator(str(tmp_path / "log" / "r"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/piqa")] == [0, 2, 3]


def test_both_hellaswags_have_names_of_their_own(bpe, manager, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_harness, "task_manager", lambda names: manager)
    lines = [{"activity_label": "Sitting", "ctx": item["ctx_a"][:60], "endings": item["endings"], "label": int(item["label"])}
             for item in items("hellaswag", 9)]
    write_lines(tmp_path / "hellaswag.jsonl", lines)
    train_gpt2.main([*TINY_FLAGS, "--data", str(write_data(tmp_path / "shards", bpe)), "--max_steps", "2", "--warmup_steps", "1", "--run_name", "r",
                     "--hellaswag_every", "1", "--hellaswag_file", "hellaswag.jsonl",
                     "--eval_tasks", "hellaswag", "--eval_tasks_dir", ".", "--eval_tasks_every", "1"])
    events = EventAccumulator("log/r").Reload()
    lines = [line.split() for line in Path("log/r/log.txt").read_text().splitlines()]
    for tag, kind in (("eval/hellaswag", "hella"), ("eval/hellaswag_lm_eval", "eval/hellaswag_lm_eval")):
        assert [(event.step, pytest.approx(event.value, abs=1e-6)) for event in events.Scalars(tag)] == [
            (int(step), float(value)) for step, k, value in lines if k == kind]
        assert [event.step for event in events.Scalars(tag)] == [0, 1, 2]


@pytest.mark.parametrize("flags, says", [
    (["--eval_tasks", "piqqa"], "unknown task 'piqqa'"), (["--eval_tasks", "piqa", "--eval_tasks_dir", "."], "no piqa.jsonl in ."),
    (["--eval_tasks", "piqa", "--eval_tasks_limit", "0"], "--eval_tasks_limit must be above zero"),
    (["--eval_tasks", "piqa", "--eval_tasks_every", "-1"], "--eval_tasks_every must not be negative"),
    (["--eval_tasks_dir", "."], "are for --eval_tasks: name some"), (["--eval_tasks_limit", "5"], "are for --eval_tasks: name some")])
def test_training_refuses_bad_tasks_before_it_starts(flags, says, bpe, manager, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_harness, "task_manager", lambda names: manager)
    shards = write_data(tmp_path / "shards", bpe)
    with pytest.raises(BadInput) as error:
        train_gpt2.main([str(flag) for flag in (*TINY_FLAGS, "--data", shards, "--max_steps", 3, "--run_name", "r", "--device", "cpu", *flags)])
    assert says in str(error.value)
    assert not list((tmp_path / "log").glob("r/ckpt*"))


def test_training_survives_tasks_that_fail_and_stops_within_one(bpe, manager, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_harness, "task_manager", lambda names: manager)
    (tmp_path / "tasks").mkdir()
    write_lines(tmp_path / "tasks" / "wikitext.jsonl", [{"page": "one_word_of_very_many_letters" * 90}])
    shutil.copy(data / "piqa.jsonl", tmp_path / "tasks")
    flags = [*TINY_FLAGS, "--data", write_data(tmp_path / "shards", bpe), "--max_steps", 4, "--run_name", "r", "--device", "cpu",
             "--eval_tasks", "wikitext,piqa", "--eval_tasks_dir", tmp_path / "tasks", "--eval_tasks_every", 2]
    score, calls = eval_harness.score, []

    def stop_at_the_second(*args):
        calls.append(args[-1]())  # `stopped`, the last argument
        if len(calls) == 4:  # piqa at step 2
            os.kill(os.getpid(), signal.SIGTERM)
            while not args[-1]():
                time.sleep(0.01)
        return score(*args)

    monkeypatch.setattr(eval_harness, "score", stop_at_the_second)
    train_gpt2.main([str(flag) for flag in flags])
    out = capsys.readouterr().out
    assert "step 0 | wikitext has no result: OverflowError" in out and "step 0 | piqa acc_norm" in out
    assert "step 2 | piqa" not in out and "stopped at step 2 of 4" in out and calls == [False] * 4
    train_gpt2.main([str(flag) for flag in flags])
    assert "step 2 | piqa acc_norm" in capsys.readouterr().out
    lines = [line.split()[:2] for line in (tmp_path / "log" / "r" / "log.txt").read_text().splitlines()]
    assert [step for step, kind in lines if kind == "eval/piqa"] == ["0", "2", "4"]
