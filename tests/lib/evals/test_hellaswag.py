"""lib/evals/hellaswag.py against hand-computed scores and the harness's rules:
python -m pytest tests/lib/evals/test_hellaswag.py"""

import json
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from helpers import run_together, tiny, write_lines
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lib.cli import BadInput
from lib.devices import Processes
from lib.evals import harness, hellaswag
from train_gpt2 import GPT

ITEM = {
    "ind": 1,
    "activity_label": "Baking",
    "ctx_a": "A cook mixes flour.",
    "ctx_b": "the cook",
    "ctx": "A cook mixes flour. the cook",
    "endings": ["bakes.", "sings.", "sleeps well.", "runs."],
    "label": 2,
}

# --------------------------------------------------------------------------------------------------
# Scores


class Prices:
    """A model in which ids 0 to 3 always cost 1, 2, 3 and 3 bits; ids 4 to 9 never occur."""
    config = SimpleNamespace(block_size=32)

    def __call__(self, idx, logits_at):
        bits = torch.tensor([1.0, 2, 3, 3, *[50] * 6])
        logits = -bits * math.log(2)
        return logits.expand(*idx.shape, 10)[logits_at]


def test_scores_by_sum_by_token_and_by_character():
    endings = [
        ([1], 1),            # 2 bits, 2 per token, 2 per character: best by sum
        ([0, 0, 0], 2),      # 3 bits, 1 per token, 1.5 per character: best by token
        ([2, 3, 1], 100),    # 8 bits, 2.7 per token, 0.08 per character: best by character
        ([3], 1),            # 3 bits, 3 per token, 3 per character: best by none
    ]
    rows = [([9, 8], ending, characters) for ending, characters in endings]
    processes = Processes("cpu")
    for label in range(4):
        counts = hellaswag.count_correct(Prices(), [(label, rows)], processes)
        assert counts == [1, int(label == 0), int(label == 1), int(label == 2)]
    questions = [(label, rows) for label in (0, 1, 1, 2, 2, 2)]
    expected = [6, 1, 2, 3]
    assert hellaswag.count_correct(Prices(), questions, processes) == expected
    results = run_together(
        4, lambda processes: hellaswag.count_correct(Prices(), questions, processes))
    assert results == [expected] * 4


# --------------------------------------------------------------------------------------------------
# Prompts


def texts(questions, tokenizer):
    """Questions -> list of (context, ending, characters), as text."""
    return [(tokenizer.decode(context), tokenizer.decode(ending), characters)
            for _, rows in questions for context, ending, characters in rows]


def test_completion_prompts(tokenizer):
    """As build-nanogpt writes them: it encodes the context and " ending" separately."""
    questions = hellaswag.render([ITEM], tokenizer)
    expected = [(ITEM["ctx"], " " + ending, len(ending)) for ending in ITEM["endings"]]
    assert texts(questions, tokenizer) == expected
    label, rows = questions[0]
    assert label == 2
    context, ending, _ = rows[0]
    assert context == tokenizer.encode(ITEM["ctx"]).tolist()
    assert ending == tokenizer.encode(" bakes.").tolist()


PLAIN = "Baking: A cook mixes flour. The cook"


@pytest.mark.parametrize("change, context, ending", [
    ({}, PLAIN, "bakes."),
    ({"ctx_b": "THE COOK"}, PLAIN, "bakes."),  # str.capitalize, as in lm-eval
    ({"ctx_a": "[header] How to bake [title] Mix. [step] Add eggs.", "ctx_b": ""},
     "Baking: How to bake. Mix. Add eggs.", "bakes."),
    ({"endings": ["[substeps] Wait [title] Eat it.", *ITEM["endings"][1:]]},
     PLAIN, " Wait. Eat it."),
    ({"ctx_a": None, "ctx_b": None}, PLAIN, "bakes."),  # cleaned files have only ctx
], ids=["plain", "capitals", "wikihow", "ending", "only ctx"])
def test_lm_eval_prompts(change, context, ending, tokenizer):
    item = {key: value for key, value in (ITEM | change).items() if value is not None}
    questions = hellaswag.render([item], tokenizer, "lm_eval")
    found_context, found_ending, characters = texts(questions, tokenizer)[0]
    assert found_context.rstrip() == context.rstrip()
    assert found_ending == " " + ending
    assert characters == len(ending)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet="[]ab .\n", max_size=30))
def test_cleaning_is_the_harness_s(text):
    from lm_eval.tasks.hellaswag.utils import preprocess

    assert hellaswag.clean(text) == preprocess(text)


def test_cleaning_takes_linear_time():  # the harness's takes many minutes
    open_brackets = "[" * 300_000
    assert hellaswag.clean(open_brackets) == open_brackets
    assert hellaswag.clean("a]" + open_brackets + "\n]") == "a]" + open_brackets + "\n]"


def test_long_rows_are_truncated_as_in_the_harness(tokenizer, monkeypatch):
    """The harness feeds all tokens but the last, so it scores one token more than the context
    length."""
    torch.manual_seed(0)
    config = tiny(vocab_size=tokenizer.vocab_size, vocab_multiple=128, block_size=24, init="xavier")
    model = GPT(config).eval()
    item = ITEM | {
        "ctx_a": "the cat sat on the mat. " * 20,
        "endings": [*ITEM["endings"][:3], "the dog stood on the mat."],
    }
    scored = []
    score = hellaswag.score

    def recorded(*args, **kwargs):
        scored.append(score(*args, **kwargs))
        return scored[-1]

    monkeypatch.setattr(hellaswag, "score", recorded)
    questions = hellaswag.render([item], tokenizer, "lm_eval")
    hellaswag.count_correct(model, questions, Processes("cpu"))
    (nats, _), = scored
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    context = context.replace("  ", " ")
    requests = [SimpleNamespace(args=(context, f" {ending}")) for ending in item["endings"]]
    lm = harness.adapter(model, tokenizer, Processes("cpu"))
    expected = [log_likelihood for log_likelihood, _ in lm.loglikelihood(requests)]
    assert nats == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------------------------------
# Files


def test_load(tmp_path):
    # line separators are legal inside JSON strings
    items = [ITEM, ITEM | {"ctx": "a line\u2028separator and\x85another", "label": 0}]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    path.write_text("".join(lines), encoding="utf-8")
    assert hellaswag.load(path) == hellaswag.load(str(path)) == items
    path.write_text("")
    with pytest.raises(BadInput, match="a.jsonl contains no HellaSwag items"):
        hellaswag.load(path)


VALUES = st.sampled_from([
    None, True, 2, -1, 4, 1.0, "2", "", "text", "\ud800", [], ["a"], ["a", "b", "c", "d"],
    ["a", "b", "c", ""], {}, math.nan,
])
NEWLINES = st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n"])


@st.composite
def jsonl_bytes(draw):
    """Items with some values replaced, then some bytes replaced."""
    items = [dict(ITEM) for _ in range(draw(st.integers(0, 3)))]
    for item in items:
        for name in draw(st.lists(st.sampled_from([*ITEM, "more"]), max_size=2)):
            if draw(st.booleans()):
                item[name] = draw(VALUES)
            else:
                item.pop(name, None)
    data = bytearray(b"".join(json.dumps(item).encode() + draw(NEWLINES) for item in items))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(data)))
        some = st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b",", b"\n", b"}"]))
        data[start:start + draw(st.integers(0, 4))] = draw(some)
    return bytes(data[:draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


def is_item(item):
    """An independent check that the scorer can use an item."""
    if type(item) is not dict or not {"ctx", "endings", "label"} <= item.keys():
        return False
    optional = [item[key] for key in ("activity_label", "ctx_a", "ctx_b") if key in item]
    if any(type(value) is not str for value in [item["ctx"], *optional]):
        return False
    endings = item["endings"]
    if type(endings) is not list or [type(ending) for ending in endings] != [str] * 4:
        return False
    if item["ctx"] == "" or "" in endings:
        return False
    return repr(item["label"]) in "0123"


def test_any_bytes_are_bad_input_or_items_that_can_be_scored(tokenizer, tmp_path):
    path = tmp_path / "any.jsonl"
    valid = []

    @settings(derandomize=True, deadline=None, max_examples=200,
              suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.one_of(jsonl_bytes(), jsonl_bytes(), st.binary(max_size=200)))
    @example(json.dumps(ITEM | {"label": True}).encode())
    @example(json.dumps(ITEM | {"label": 1.0}).encode())
    @example(json.dumps(ITEM | {"label": -1}).encode())
    @example(json.dumps(ITEM).encode() + b"\n" + b"[" * 100_000)
    def check(data):
        path.write_bytes(data)
        try:
            expected = [json.loads(line) for line in data.removesuffix(b"\n").split(b"\n")]
        except (ValueError, RecursionError):
            expected = []
        valid.append(bool(expected) and all(map(is_item, expected)))
        if not valid[-1]:
            with pytest.raises(BadInput, match="any.jsonl"):
                hellaswag.load(path)
            return
        assert hellaswag.load(path) == expected
        hellaswag.render(expected, tokenizer)
        labeled = [item for item in expected if "activity_label" in item]
        hellaswag.render(labeled, tokenizer, "lm_eval")

    check()
    assert 10 < sum(valid) < len(valid) - 10  # both cases occurred


def test_what_is_not_a_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nowhere.jsonl", tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(BadInput, match=f"cannot read {path} .*--file"):
            hellaswag.load(path)


def test_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "URL", (tmp_path / "not_there").as_uri())
    with pytest.raises(BadInput, match="--hellaswag_every 0"):
        hellaswag.load()
    assert not list(tmp_path.rglob("*.jsonl*"))  # no partial file
    write_lines(tmp_path / "there", [ITEM])
    monkeypatch.setattr(hellaswag, "URL", (tmp_path / "there").as_uri())
    assert hellaswag.load() == [ITEM]
    (tmp_path / "there").unlink()
    assert hellaswag.load() == [ITEM]  # not downloaded again
    write_lines(tmp_path / "hellaswag" / "hellaswag_val.jsonl", [{}])
    with pytest.raises(BadInput, match="move the file away"):
        hellaswag.load()


def test_runs_that_start_together_download_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    together = threading.Barrier(8, timeout=600)

    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = json.dumps(ITEM).encode() + b"\n"
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    def start(_):
        together.wait()
        return hellaswag.load()

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as site, ThreadPoolExecutor(8) as pool:
        serve = partial(site.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{site.server_port}/h.jsonl")
        assert list(pool.map(start, range(8))) == [[ITEM]] * 8
        site.shutdown()
    assert len(asked) == 1
    assert os.listdir("hellaswag") == ["hellaswag_val.jsonl"]


def test_a_file_where_the_download_folder_should_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hellaswag").write_text("")
    with pytest.raises(BadInput, match="cannot write to hellaswag .*--file"):
        hellaswag.load()
