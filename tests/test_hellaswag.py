"""hellaswag.py against scores worked out by hand, and launched for real: python -m pytest tests/test_hellaswag.py -n 2"""

import json
import math

import pytest
import torch
from helpers import hellaswag_items, sentences, tiny, tiny_checkpoint, write_lines
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import hellaswag
from lib.cli import BadInput
from lib.tokenizers import train_bpe
from train_gpt2 import GPT

ITEM = {"ind": 1, "activity_label": "Baking", "ctx_a": "A cook mixes flour.", "ctx_b": "the cook",
        "ctx": "A cook mixes flour. the cook", "endings": ["bakes.", "sings.", "sleeps well.", "runs."], "label": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(sentences(200), 280)


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """(path, model) of an untrained model with opinions."""
    path = tmp_path / "ckpt_00001.pt"
    return path, tiny_checkpoint(path, tokenizer, init="xavier", block_size=48)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def test_the_three_scores_choose_by_sum_by_token_and_by_character():
    def model(idx, at):  # whatever came before, ids 0 to 3 cost 1, 2, 3 and 3 bits; ids 4 to 9 never come
        bits = torch.tensor([1.0, 2, 3, 3, *[50] * 6])
        return (-bits * math.log(2)).expand(*idx.shape, 10)[at]

    context = [9, 8]
    rows = [(context + ending, len(ending), characters) for ending, characters in [
        ([1], 1),            # 2 bits, 2 a token, 2 a character: best by sum
        ([0, 0, 0], 2),      # 3 bits, 1 a token, 1.5 a character: best by token
        ([2, 3, 1], 100),    # 8 bits, 2.7 a token, 0.08 a character: best by character
        ([3], 1),            # 3 bits, 3 a token, 3 a character: best by none
    ]]
    for label in range(4):
        want = [1, int(label == 0), int(label == 1), int(label == 2)]
        assert hellaswag.evaluate(model, [(label, rows)], "cpu") == want
    assert hellaswag.evaluate(model, [(label, rows) for label in (0, 1, 1, 2, 2, 2)], "cpu") == [6, 1, 2, 3]


def random_items(n):
    """Rendered items of rows of many lengths, with contexts and endings of their own."""
    torch.manual_seed(0)
    items = []
    for _ in range(n):
        context = torch.randint(61, (int(torch.randint(1, 14, ())),)).tolist()
        lengths = torch.randint(1, 15, (4,)).tolist()
        items.append((0, [(context + torch.randint(61, (k,)).tolist(), k, 3 * k + i) for i, k in enumerate(lengths)]))
    return items


def reference_choices(model, items):
    """The endings chosen by sum, by token and by character: one row at a time, token by token."""
    choices = []
    for _, rows in items:
        nats = []
        for ids, ending, _ in rows:
            logp = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
            nats.append(-sum(logp[i - 1, ids[i]].item() for i in range(len(ids) - ending, len(ids))))
        scores = [nats, [n / row[1] for n, row in zip(nats, rows)], [n / row[2] for n, row in zip(nats, rows)]]
        choices.append([min(range(4), key=score.__getitem__) for score in scores])
    return choices


@pytest.mark.parametrize("batch_tokens", [1, 60, 500, 10**6])
def test_batching_and_padding_change_nothing(batch_tokens, monkeypatch):
    items = random_items(25)
    model = GPT(tiny(block_size=32, init="xavier", pos="rope")).eval()
    choices = reference_choices(model, items)
    assert len({tuple(c) for c in choices}) > 5 and any(len(set(c)) > 1 for c in choices)
    monkeypatch.setattr(hellaswag, "BATCH_TOKENS", batch_tokens)
    for k in range(3):  # with the labels that one of the scores chooses, it gets all right
        labelled = [(choice[k], rows) for choice, (_, rows) in zip(choices, items)]
        counts = hellaswag.evaluate(model, labelled, "cpu")
        assert counts == [25, *(sum(c[j] == c[k] for c in choices) for j in range(3))] and counts[1 + k] == 25


def test_ranks_add_up():
    items, model = random_items(9), GPT(tiny(block_size=32, init="xavier")).eval()
    whole = hellaswag.evaluate(model, items, "cpu")
    for world in (2, 3, 12):  # 12: some have nothing to do
        parts = [hellaswag.evaluate(model, items, "cpu", rank, world) for rank in range(world)]
        assert [sum(column) for column in zip(*parts)] == whole
        assert parts[9:] == [[0, 0, 0, 0]] * (world - 9)


# ----------------------------------------------------------------------------------------------------------------------
# Rendering


def texts(rendered, tokenizer):
    return [(tokenizer.decode(ids[:len(ids) - ending]), tokenizer.decode(ids[len(ids) - ending:]), characters)
            for _, rows in rendered for ids, ending, characters in rows]


def test_completion_rendering(tokenizer):
    rendered = hellaswag.render([ITEM], tokenizer, 1024)
    assert rendered[0][0] == 2
    assert texts(rendered, tokenizer) == [(ITEM["ctx"], " " + ending, len(ending)) for ending in ITEM["endings"]]
    ids, ending, _ = rendered[0][1][0]  # build-nanogpt encodes the context and " ending" separately
    assert ids == tokenizer.encode(ITEM["ctx"]).tolist() + tokenizer.encode(" bakes.").tolist()
    assert ending == len(tokenizer.encode(" bakes."))


@pytest.mark.parametrize("change, context, ending", [
    ({}, "Baking: A cook mixes flour. The cook", "bakes."),
    ({"ctx_b": "THE COOK"}, "Baking: A cook mixes flour. The cook", "bakes."),  # str.capitalize, as lm-eval does
    ({"ctx_a": "[header] How to bake [title] Mix. [step] Add eggs.", "ctx_b": ""},
     "Baking: How to bake. Mix. Add eggs.", "bakes."),
    ({"endings": ["[substeps] Wait [title] Eat it.", *ITEM["endings"][1:]]}, "Baking: A cook mixes flour. The cook",
     " Wait. Eat it."),
    ({"ctx_a": None, "ctx_b": None}, "Baking: A cook mixes flour. The cook", "bakes."),  # cleaned files hold ctx alone
], ids=["plain", "capitals", "wikihow", "ending", "ctx alone"])
def test_lm_eval_rendering(change, context, ending, tokenizer):
    item = {key: value for key, value in (ITEM | change).items() if value is not None}
    have_context, have_ending, characters = texts(hellaswag.render([item], tokenizer, 1024, "lm_eval"), tokenizer)[0]
    # by lm_eval/tasks/hellaswag/utils.py: strip, " [title]" to ". ", brackets out, double spaces once to single
    assert have_context.rstrip() == context.rstrip()
    assert have_ending == " " + ending and characters == len(ending)


def test_long_rows_lose_the_beginning_of_the_context(tokenizer):
    item = ITEM | {"ctx": "the cat sat on the mat. " * 20 + "the dog"}
    whole = hellaswag.render([item], tokenizer, 10**6)[0][1]
    for block_size in (40, 16):
        for (ids, ending, characters), (all_ids, *same) in zip(hellaswag.render([item], tokenizer, block_size)[0][1], whole):
            assert len(ids) == block_size and ids == all_ids[-block_size:]
            assert [ending, characters] == same
    # an ending longer than the model's context: all but its first token are scored
    ids, ending, _ = hellaswag.render([item | {"endings": ["the cat sat. " * 20] * 4}], tokenizer, 16)[0][1][0]
    assert len(ids) == 16 and ending == 15


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_load(tmp_path):
    items = [ITEM, ITEM | {"ctx": "a line\u2028separator and\x85another", "label": 0}]  # legal inside JSON strings
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    assert hellaswag.load(path) == hellaswag.load(str(path)) == items


@pytest.mark.parametrize("text, says", [
    ("", "holds no HellaSwag items"),
    (json.dumps(ITEM) + "\n{\"ctx\": \"a", "line 2 is no HellaSwag item"),
    ("404: Not Found", "line 1 is no HellaSwag item"),
    ("[1, 2]\n", "line 1"),
    (b"\xff\xfe\x00", "line 1"),
    *((json.dumps({k: v for k, v in ITEM.items() if k != name}), "no ctx, four endings and label")
      for name in ("ctx", "endings", "label")),
    *((json.dumps(ITEM | change), "is no HellaSwag item")
      for change in ({"label": 4}, {"label": "2"}, {"label": None}, {"endings": ["a", "b", "c"]}, {"endings": "abcd"},
                     {"endings": ["a", "b", "c", 4]}, {"endings": ["a", "b", "c", ""]}, {"endings": None}, {"ctx": 3},
                     {"ctx": ""}, {"ctx_b": 3}, {"activity_label": None})),
])
def test_bad_files(text, says, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput) as error:
        hellaswag.load(path)
    assert says in str(error.value) and "bad.jsonl" in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000], ids=["lists", "objects"])
def test_json_nested_beyond_what_python_reads_is_bad_input(text, tmp_path):
    (tmp_path / "deep.jsonl").write_text(json.dumps(ITEM) + "\n" + text)
    with pytest.raises(BadInput, match=r"deep.jsonl, line 2 is no HellaSwag item"):
        hellaswag.load(tmp_path / "deep.jsonl")


ODD = st.sampled_from([None, True, 2, -1, 4, 1.5, "", "text", "\ud800", [], ["a"], ["a", "b", "c", "d"], ["a", "b", "c", ""],
                       {}, math.nan])


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
    data = bytearray(b"".join(json.dumps(item).encode() + draw(st.sampled_from([b"\n", b"\n", b"\r\n",
                                                                                b"\n\n"])) for item in items))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(data)))
        data[start:start + draw(st.integers(0, 4))] = draw(st.one_of(st.binary(max_size=4),
                                                                     st.sampled_from([b'"', b",", b"\n", b"}"])))
    return bytes(data[:draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


def is_item(item):
    """An item as the scorer uses it, said once more in other words."""
    if type(item) is not dict or not {"ctx", "endings", "label"} <= item.keys():
        return False
    needed, optional = [item["ctx"], item["endings"]], [item[k] for k in ("activity_label", "ctx_a", "ctx_b") if k in item]
    return (type(needed[0]) is str and needed[0] != "" and type(needed[1]) is list and [type(e) for e in needed[1]] == [str] * 4
            and "" not in needed[1] and item["label"] in (0, 1, 2, 3) and [type(o) for o in optional] == [str] * len(optional))


@pytest.mark.parametrize("kind", ["mutated", "random"])
def test_any_bytes_are_bad_input_or_items_that_can_be_scored(kind, tokenizer, tmp_path):
    path, whole = tmp_path / "any.jsonl", []

    @settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=jsonl_bytes() if kind == "mutated" else st.binary(max_size=200))
    @example(json.dumps(ITEM | {"endings": ["a", "b", "c", ""]}).encode())
    @example(json.dumps(ITEM | {"label": 4}).encode())
    @example(json.dumps(ITEM | {"label": 3}).encode() + b"\n\n")
    def check(data):
        path.write_bytes(data)
        try:
            lines = data.decode().replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
            want = [json.loads(line) for line in lines]
        except ValueError:
            want = None
        whole.append(bool(want) and all(map(is_item, want)))
        if whole[-1]:
            assert hellaswag.load(path) == want
            hellaswag.render(want, tokenizer, 64)
            hellaswag.render([item for item in want if "activity_label" in item], tokenizer, 64, "lm_eval")
        else:
            with pytest.raises(BadInput, match="any.jsonl"):
                hellaswag.load(path)

    check()
    assert kind == "random" or 10 < sum(whole) < len(whole) - 10  # the test did see both


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(BadInput, match=f"cannot read {path}"):
            hellaswag.load(path)
    # the download fails: the message says how to do without, and no half file stays to be taken for the whole
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "URL", (tmp_path / "not_there").as_uri())
    with pytest.raises(BadInput, match="--hellaswag_every 0"):
        hellaswag.load()
    assert not list(tmp_path.rglob("*.jsonl*"))
    write_lines(tmp_path / "there", [ITEM])
    monkeypatch.setattr(hellaswag, "URL", (tmp_path / "there").as_uri())
    assert hellaswag.load() == [ITEM]
    (tmp_path / "there").unlink()
    assert hellaswag.load() == [ITEM]  # once


# ----------------------------------------------------------------------------------------------------------------------
# The command


def figures(text):
    """The lines of accuracies, without the time."""
    return [line for line in text.splitlines() if line.startswith(("acc", "lm_eval"))]


def test_one_and_two_processes_give_the_same_figures(launch, checkpoint, tokenizer, tmp_path):
    path, model = checkpoint
    items = hellaswag_items(12)
    flags = ["--checkpoint", path, "--file", write_lines(tmp_path / "h.jsonl", items), "--limit", 9, "--device", "cpu"]
    printed = []
    for processes in (1, 2):
        result = launch("hellaswag.py", *flags, processes=processes)
        assert result.returncode == 0, result.stderr
        printed.append(figures(result.stdout))
    want = []
    for style, names in (("completion", {"acc": 0, "acc_norm": 1}), ("lm_eval", {"lm_eval_acc_norm": 2})):
        rendered = hellaswag.render(items[:9], tokenizer, 48, style)
        choices = reference_choices(model, rendered)
        for name, k in names.items():
            right = sum(choice[k] == label for choice, (label, _) in zip(choices, rendered))
            want.append(f"{name} {right}/9 = {right / 9:.4f}")
    assert printed == [want, want]


def test_items_without_an_activity(checkpoint, tmp_path, capsys):
    items = [{key: item[key] for key in ("ctx", "endings", "label")} for item in hellaswag_items(3)]
    path = write_lines(tmp_path / "h.jsonl", items)
    hellaswag.main(["--checkpoint", str(checkpoint[0]), "--file", str(path), "--device", "cpu"])
    assert [line.split()[0] for line in figures(capsys.readouterr().out)] == ["acc", "acc_norm", "lm_eval_acc_norm"]


@pytest.mark.parametrize("flags, says", [
    ([], "name either --checkpoint or --model"),
    (["--checkpoint", "a.pt", "--model", "gpt2"], "name either --checkpoint or --model"),
    (["--checkpoint", "nowhere.pt", "--file", "good.jsonl"], "no checkpoint at nowhere.pt"),
    (["--checkpoint", "good.jsonl", "--file", "good.jsonl"], "good.jsonl is not a whole checkpoint"),
    (["--checkpoint", "ckpt_00001.pt", "--file", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    (["--checkpoint", "ckpt_00001.pt", "--limit", "0"], "--limit must be at least 1"),
    (["--model", "gpt5"], "gpt2-xl"),
    (["--model", "gpt2", "--file", "good.jsonl"], "cannot load the Hugging Face GPT-2 gpt2"),  # offline here
    (["--checkpoint", "ckpt_00001.pt", "--device", "mps"], "--device mps"),
    (["--ckpt", "ckpt_00001.pt"], "unknown flag --ckpt"),
])
def test_bad_flags(flags, says, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "good.jsonl", [ITEM])
    with pytest.raises(BadInput) as error:
        hellaswag.main(flags)
    assert says in str(error.value)


def test_bad_input_of_a_real_process_is_one_line(launch):
    result = launch("hellaswag.py", "--checkpoint", "nowhere.pt", "--file", __file__)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("hellaswag.py: error: ") and result.stderr.count("\n") == 1
