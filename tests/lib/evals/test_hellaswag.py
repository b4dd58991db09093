"""lib/evals/hellaswag.py against scores worked out by hand and the harness's rules:
python -m pytest tests/lib/evals/test_hellaswag.py"""

import json
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
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
    "ind": 1, "activity_label": "Baking", "ctx_a": "A cook mixes flour.", "ctx_b": "the cook",
    "ctx": "A cook mixes flour. the cook", "endings": ["bakes.", "sings.", "sleeps well.",
                                                       "runs."], "label": 2
}


# ----------------------------------------------------------------------------------------------------------------------
# Scores


class Prices:
    """A model by which, whatever came before, ids 0 to 3 cost 1, 2, 3 and 3 bits; ids 4 to 9 never
    come."""
    config = SimpleNamespace(block_size=32)

    def __call__(self, idx, logits_at):
        bits = torch.tensor([1.0, 2, 3, 3, *[50] * 6])
        return (-bits * math.log(2)).expand(*idx.shape, 10)[logits_at]


def test_the_three_scores_choose_by_sum_by_token_and_by_character():
    rows = [([9, 8], ending, characters) for ending, characters in [
        ([1], 1),            # 2 bits, 2 per token, 2 per character: best by sum
        ([0, 0, 0], 2),      # 3 bits, 1 per token, 1.5 per character: best by token
        ([2, 3, 1], 100),    # 8 bits, 2.7 per token, 0.08 per character: best by character
        ([3], 1),            # 3 bits, 3 per token, 3 per character: best by none
    ]]
    for label in range(4):
        want = [1, int(label == 0), int(label == 1), int(label == 2)]
        assert hellaswag.count_correct(Prices(), [(label, rows)], Processes("cpu")) == want
    items = [(label, rows) for label in (0, 1, 1, 2, 2, 2)]
    assert hellaswag.count_correct(Prices(), items, Processes("cpu")) == [6, 1, 2, 3]
    assert run_together(
        4, lambda processes: hellaswag.count_correct(Prices(), items, processes)) == [[6, 1, 2, 3]] * 4


# ----------------------------------------------------------------------------------------------------------------------
# Rendering


def texts(rendered, tokenizer):
    return [(tokenizer.decode(context), tokenizer.decode(ending), characters)
            for _, rows in rendered for context, ending, characters in rows]


def test_completion_rendering(tokenizer):
    rendered = hellaswag.render([ITEM], tokenizer)
    assert rendered[0][0] == 2
    assert texts(rendered, tokenizer) == [(ITEM["ctx"], " " + ending, len(ending))
                                          for ending in ITEM["endings"]]
    context, ending, _ = rendered[0][1][
        0]  # build-nanogpt encodes the context and " ending" separately
    assert context == tokenizer.encode(ITEM["ctx"]).tolist()
    assert ending == tokenizer.encode(" bakes.").tolist()


@pytest.mark.parametrize(
    "change, context, ending",
    [
        ({}, "Baking: A cook mixes flour. The cook", "bakes."),
        ({"ctx_b": "THE COOK"
          }, "Baking: A cook mixes flour. The cook", "bakes."),  # str.capitalize, as lm-eval does
        ({"ctx_a": "[header] How to bake [title] Mix. [step] Add eggs.", "ctx_b": ""
          }, "Baking: How to bake. Mix. Add eggs.", "bakes."),
        ({"endings": ["[substeps] Wait [title] Eat it.", *ITEM["endings"][1:]]
          }, "Baking: A cook mixes flour. The cook", " Wait. Eat it."),
        ({"ctx_a": None, "ctx_b": None
          }, "Baking: A cook mixes flour. The cook", "bakes."),  # cleaned files hold ctx alone
    ],
    ids=["plain", "capitals", "wikihow", "ending", "ctx alone"])
def test_lm_eval_rendering(change, context, ending, tokenizer):
    item = {key: value for key, value in (ITEM | change).items() if value is not None}
    have_context, have_ending, characters = texts(hellaswag.render([item], tokenizer, "lm_eval"),
                                                  tokenizer)[0]
    assert have_context.rstrip() == context.rstrip()
    assert have_ending == " " + ending and characters == len(ending)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet="[]ab .\n", max_size=30))
def test_cleaning_is_the_harness_s(text):
    from lm_eval.tasks.hellaswag.utils import preprocess

    assert hellaswag.clean(text) == preprocess(text)


def test_cleaning_takes_linear_time():  # the harness's takes many minutes
    assert hellaswag.clean("[" * 300_000) == "[" * 300_000
    assert hellaswag.clean("a]" + "[" * 300_000 + "\n]") == "a]" + "[" * 300_000 + "\n]"


def test_what_is_longer_than_the_context_is_cut_as_the_harness_cuts_it(tokenizer, monkeypatch):
    """The harness feeds all tokens but the last, so one more of them than the context holds counts.
    """
    torch.manual_seed(0)
    model = GPT(
        tiny(vocab_size=tokenizer.vocab_size, vocab_multiple=128, block_size=24,
             init="xavier")).eval()
    item = ITEM | {
        "ctx_a": "the cat sat on the mat. " * 20,
        "endings": [*ITEM["endings"][:3], "the dog stood on the mat."]
    }
    scored = []
    real = hellaswag.score
    monkeypatch.setattr(hellaswag, "score",
                        lambda *args, **how: scored.append(real(*args, **how)) or scored[-1])
    hellaswag.count_correct(model, hellaswag.render([item], tokenizer, "lm_eval"), Processes("cpu"))
    (nats, _), = scored
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}".replace(
        "  ", " ")
    requests = [SimpleNamespace(args=(context, f" {ending}")) for ending in item["endings"]]
    want = harness.adapter(model, tokenizer, Processes("cpu")).loglikelihood(requests)
    assert nats == pytest.approx([log_likelihood for log_likelihood, _ in want], abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_load(tmp_path):
    items = [ITEM, ITEM | {"ctx": "a line\u2028separator and\x85another", "label": 0}
             ]  # legal inside JSON strings
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items),
                    encoding="utf-8")
    assert hellaswag.load(path) == hellaswag.load(str(path)) == items
    path.write_text("")
    with pytest.raises(BadInput, match="a.jsonl holds no HellaSwag items"):
        hellaswag.load(path)


ODD = st.sampled_from([
    None, True, 2, -1, 4, 1.0, "2", "", "text", "\ud800", [], ["a"], ["a", "b", "c", "d"],
    ["a", "b", "c", ""], {}, math.nan
])


@st.composite
def jsonl_bytes(draw):
    """Items with values put in place of others, then bytes put in place of others."""
    items = [dict(ITEM) for _ in range(draw(st.integers(0, 3)))]
    for item in items:
        for name in draw(st.lists(st.sampled_from([*ITEM, "more"]), max_size=2)):
            if draw(st.booleans()):
                item[name] = draw(ODD)
            else:
                item.pop(name, None)
    newline = st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n"])
    data = bytearray(b"".join(json.dumps(item).encode() + draw(newline) for item in items))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(data)))
        some = st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b",", b"\n", b"}"]))
        data[start:start + draw(st.integers(0, 4))] = draw(some)
    return bytes(data[:draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


def is_item(item):
    """An item as the scorer uses it, said once more in other words."""
    if type(item) is not dict or not {"ctx", "endings", "label"} <= item.keys():
        return False
    needed, optional = [item["ctx"], item["endings"]
                        ], [item[k] for k in ("activity_label", "ctx_a", "ctx_b") if k in item]
    return (type(needed[0]) is str and needed[0] != "" and type(needed[1]) is list
            and [type(e) for e in needed[1]] == [str] * 4 and "" not in needed[1]
            and repr(item["label"]) in "0123"
            and [type(o) for o in optional] == [str] * len(optional))


def test_any_bytes_are_bad_input_or_items_that_can_be_scored(tokenizer, tmp_path):
    path, whole = tmp_path / "any.jsonl", []

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
            want = [json.loads(line) for line in data.removesuffix(b"\n").split(b"\n")]
        except (ValueError, RecursionError):
            want = None
        whole.append(bool(want) and all(map(is_item, want)))
        if whole[-1]:
            assert hellaswag.load(path) == want
            hellaswag.render(want, tokenizer)
            hellaswag.render([item for item in want if "activity_label" in item], tokenizer,
                             "lm_eval")
        else:
            with pytest.raises(BadInput, match="any.jsonl"):
                hellaswag.load(path)

    check()
    assert 10 < sum(whole) < len(whole) - 10  # the test did see both


def test_what_is_not_a_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nowhere.jsonl", tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(BadInput, match=f"cannot read {path} .*--file"):
            hellaswag.load(path)


def test_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "URL", (tmp_path / "not_there").as_uri())
    with pytest.raises(
            BadInput,
            match="--hellaswag_every 0"):  # and no half file stays to be taken for the whole
        hellaswag.load()
    assert not list(tmp_path.rglob("*.jsonl*"))
    write_lines(tmp_path / "there", [ITEM])
    monkeypatch.setattr(hellaswag, "URL", (tmp_path / "there").as_uri())
    assert hellaswag.load() == [ITEM]
    (tmp_path / "there").unlink()
    assert hellaswag.load() == [ITEM]  # once
    write_lines(tmp_path / "hellaswag" / "hellaswag_val.jsonl", [{}])
    with pytest.raises(BadInput) as error:
        hellaswag.load()
    assert "move the file away" in str(error.value) and not re.search("delete", str(error.value))


def test_runs_that_start_together_download_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked, together = [], threading.Barrier(8, timeout=600)

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
        threading.Thread(
            target=site.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{site.server_port}/h.jsonl")
        assert list(pool.map(start, range(8))) == [[ITEM]] * 8
        site.shutdown()
    assert len(asked) == 1 and os.listdir("hellaswag") == ["hellaswag_val.jsonl"]


def test_a_file_where_the_download_folder_should_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hellaswag").write_text("")
    with pytest.raises(BadInput, match="cannot write to hellaswag .*--file"):
        hellaswag.load()
