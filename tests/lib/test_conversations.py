"""lib/conversations.py on rows of every layout: python -m pytest tests/lib/test_conversations.py"""

import json

import pytest
from helpers import sentences, write_lines

from lib.chat_template import render
from lib.cli import BadInput
from lib.conversations import find_paths, hold_out, read, truncate

QUESTION, ANSWER = "Name a cat.", "Tom."
PAIR = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
PART = {"type": "text"}
SYSTEM = {"role": "system", "content": "Be brief."}
WITH_INPUT = [{"role": "user", "content": f"{QUESTION}\n\nNot Jerry."}, PAIR[1]]
FRAME = "Below is an instruction.\nRespond.\n\n### Instruction:\n{}\n\n### Response:\n"
ROWS = [
    ("messages", {"messages": [{"role": "system", "content": "Be brief."}, *PAIR],
                  "prompt": "x"}, [{"role": "system", "content": "Be brief."}, *PAIR]),
    ("ShareGPT", {
        "id": 1, "conversations": [{"from": "human", "value": QUESTION},
                                   {"from": "gpt", "value": ANSWER}]
    }, PAIR),
    ("ShareGPT", {"conversations": PAIR}, PAIR),  # the newer names under the older key
    ("alpaca", {"instruction": QUESTION, "input": "", "output": ANSWER, "text": "x"}, PAIR),
    ("alpaca", {"instruction": QUESTION, "input": "Not Jerry.", "output": ANSWER}, WITH_INPUT),
    ("dolly", {"instruction": QUESTION, "context": "Not Jerry.", "response": ANSWER,
               "category": "qa"}, WITH_INPUT),
    ("prompt/completion", {"prompt": QUESTION, "completion": f" {ANSWER}"}, PAIR),
    ("prompt/response", {"prompt": FRAME.format(QUESTION), "response": ANSWER}, PAIR),
    ("prompt/response",
     {"prompt": FRAME.format(f"{QUESTION}\n\n### Input:\nNot Jerry."), "response": ANSWER},
     WITH_INPUT),
    ("text", {"text": "Tom is a cat.\n"}, "Tom is a cat.\n"),
    # in every layout, input, system message and history count
    ("dolly", {"instruction": QUESTION, "input": "Not Jerry.", "response": ANSWER}, WITH_INPUT),
    ("prompt/completion", {"prompt": QUESTION, "context": "Not Jerry.",
                           "completion": ANSWER}, WITH_INPUT),
    ("prompt/response",
     {"prompt": FRAME.format(f"{QUESTION}\n\n### Input:\nNot"), "context": "Jerry.",
      "response": ANSWER}, [{"role": "user", "content": f"{QUESTION}\n\nNot\n\nJerry."}, PAIR[1]]),
    ("alpaca",
     {"instruction": QUESTION, "output": ANSWER, "system": "Be brief.",
      "history": [["Hi", "Hello."]]},
     [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
      *PAIR]),
    ("ShareGPT", {
        "system": "Be brief.", "conversations": [{"from": "human", "value": QUESTION},
                                                 {"from": "gpt", "value": ANSWER}]
    }, [SYSTEM, *PAIR]),
    ("messages", {"messages": [PAIR[0], PAIR[1] | {"weight": 0}, PAIR[0], PAIR[1] | {"weight": 1}]},
     [PAIR[0], PAIR[1] | {"learned": False}, *PAIR]),
    ("ShareGPT", {"conversations": [*PAIR, PAIR[0], PAIR[1] | {"train": False}]},
     [*PAIR, PAIR[0], PAIR[1] | {"learned": False}]),
    # marks as text, as of a CSV; contents in parts; a system message that a column repeats
    ("messages",
     {"messages": [PAIR[0], PAIR[1] | {"weight": "0.0"}, PAIR[0],
                   PAIR[1] | {"train": "True"}]}, [PAIR[0], PAIR[1] | {"learned": False}, *PAIR]),
    ("messages", {
        "messages": [{
            "role": "user", "content": [PART | {"text": "Name a "}, PART | {"text": "cat."}]
        }, {"role": "assistant", "content": [PART | {"text": ANSWER}]}]
    }, PAIR),
    ("ShareGPT",
     {"system": "Be brief.", "system_prompt": "Be brief.",
      "conversations": [SYSTEM, *PAIR]}, [SYSTEM, *PAIR]),
]


@pytest.mark.parametrize("name, row, example", ROWS)
def test_every_layout_in_every_kind_of_file(name, row, example, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "a.json").write_text(json.dumps([row, row], indent=1))
    (tmp_path / "marked.json").write_text(json.dumps([row, row]), encoding="utf-8-sig")
    write_lines(tmp_path / "b.jsonl", [row, row])
    (tmp_path / "marked.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}",
                                           encoding="utf-8-sig")
    write_lines(tmp_path / "lines.json", [row, row])
    pa.parquet.write_table(pa.Table.from_pylist([row, row]), tmp_path / "c.parquet")
    for path in find_paths([str(tmp_path)])[0]:
        examples, line = read(path)
        assert examples == [example, example] and name in line and "skipped" not in line


def test_unused_columns_are_listed_once_per_file_and_marked_answers_masked(tokenizer, tmp_path):
    call = {"tool_calls": [{"name": "f"}], "weight": 0.5, "name": None}
    rows = [{"messages": [PAIR[0], PAIR[1] | call], "tools": [{"name": "f"}], "id": 7},
            {"messages": PAIR, "id": 8}]
    _, line = read(str(write_lines(tmp_path / "a.jsonl", rows)))
    assert line.endswith(
        "(layout messages); not used: a message's tool_calls, a message's weight, id, tools")
    rows = [{"prompt": QUESTION, "completion": ANSWER,
             "train": False}, {"prompt": QUESTION, "completion": ANSWER, "weight": 1},
            {"system": "a", "system_prompt": "b", "prompt": QUESTION, "completion": ANSWER}]
    examples, line = read(str(write_lines(tmp_path / "b.jsonl", rows)))
    assert examples == [PAIR] and line.endswith(
        "line 1: every answer is marked as not to be learned; line 3: two system messages"
    ) and "not used" not in line
    ids, learned = render([PAIR[0], PAIR[1] | {"learned": False}, *PAIR], tokenizer)
    once = render(PAIR, tokenizer)
    assert learned == [False] * len(once[0]) + once[1][1:] and ids == once[0] + once[0][1:]


def test_hidden_files_are_no_data_and_endings_have_no_case(tmp_path):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a.jsonl", "._a.jsonl", "A.JSONL", "b.Json", "c.jsonl.bz2"):
        (tmp_path / name).write_text(json.dumps(ROWS[6][1]))
    paths, lines = find_paths([str(tmp_path)])
    assert paths == [str(tmp_path / "A.JSONL"), str(tmp_path / "b.Json")]
    assert [read(path)[0] for path in paths] == [[PAIR], [PAIR]]
    assert lines == [
        f"left out of {tmp_path} (hidden or temporary): ._a.jsonl, .ipynb_checkpoints/a.jsonl",
        f"left out of {tmp_path} (.bz2): c.jsonl.bz2"
    ]


def test_rows_of_json_may_be_formatted_in_any_way(tmp_path):
    row = ROWS[6][1] | {"x": 1}
    line = json.dumps(row).replace("1}",
                                   "9" * 5000 + "}")  # more digits than Python makes an integer of
    array = json.dumps([row], indent=1)
    for name, text in {
            "lines": f"{line}\n\ufeff{line}", "returns": f"{line}\r{line}",
            "array": f"[{line}, {line}]", "arrays": f"{array}\n{array}",
            "blank": f"\n\n{json.dumps([row, row])}",
            "objects": f"\ufeff{json.dumps(row, indent=1)}\n{json.dumps(row, indent=4)}"
    }.items():
        for ending in ("json", "jsonl"):
            path = tmp_path / f"{name}.{ending}"
            path.write_bytes(text.encode())
            examples, line = read(str(path))
            assert examples == [PAIR, PAIR] and "skipped" not in line


def test_columns_that_python_cannot_represent_are_not_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    pair = {"prompt": [QUESTION], "completion": [ANSWER]}
    unreadable = {
        "when": pa.array([2**62], pa.timestamp("us")),
        "zone": pa.array([0], pa.timestamp("us", "Nowhere/Land")),
        "twice": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]),
        "bytes": pa.array([b"\xff"]).view(pa.string()),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    }
    pa.parquet.write_table(pa.table(pair | unreadable), tmp_path / "a.parquet")
    examples, line = read(str(tmp_path / "a.parquet"))
    assert examples == [PAIR] and line.endswith("; not used: bytes, map, twice, when, zone")
    table = pa.table({"prompt": [QUESTION], "completion": unreadable["bytes"]})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="cannot read .*utf-8"):
        read(str(tmp_path / "a.parquet"))


def test_a_txt_is_one_text(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):  # with a byte order mark
        (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding=encoding)
        assert read(str(tmp_path / "a.txt"))[0] == ["one\n\ntwo\n"]
    russian = "".join(map(chr, range(0x430, 0x44F))) + " " * 5
    for text in ("of Windows", russian):
        (tmp_path / "a.txt").write_text(text, encoding="utf-16-le")  # valid UTF-8
        with pytest.raises(BadInput, match="a.txt is UTF-16"):
            read(str(tmp_path / "a.txt"))


def test_malformed_rows_are_left_out_and_the_first_three_shown(tmp_path):
    malformed = [[1], {"prompt": "x"}, {"prompt": "x", "completion": " "},
                 {"prompt": 3, "completion": "x"}]
    path = tmp_path / "a.jsonl"
    lines = ["not JSON", json.dumps(ROWS[6][1]), "", *map(json.dumps, malformed)]
    path.write_text("\n".join(lines))
    examples, line = read(str(path))
    assert examples == [PAIR] and line == (
        f"{path}: 1 conversations (layout prompt/completion); skipped 5 malformed rows: "
        "line 1: not JSON (Expecting value: line 1 column 1 (char 0)); line 4: not an object; "
        "line 5: no completion; ...")
    with pytest.raises(BadInput, match="line 1: not JSON.*--strict"):
        read(str(path), strict=True)


def test_a_row_of_unknown_layout_is_skipped_at_any_place(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"comment": "mine"}, ROWS[6][1], {"x": 1}])
    examples, line = read(str(path))
    assert examples == [PAIR]
    assert "skipped 2 malformed rows: line 1: no layout is known of comment; line 3: no " in line
    assert "another layout" not in line
    _, line = read(str(write_lines(tmp_path / "b.jsonl", [ROWS[6][1], {"text": "plain"}])))
    assert line.endswith(
        "line 2: no completion and prompt; of another layout, it belongs in a file of its own")
    with pytest.raises(BadInput, match=r"line 1: no layout is known of comment \(known are "
                                       r"messages, conv.*\): fix it, or leave out --strict$"):
        read(str(path), strict=True)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_truncated_array_is_reported_and_lines_may_start_with_one(indent, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROWS[6][1]] * 3, indent=indent)[:-9])
    with pytest.raises(BadInput, match="a.json is incomplete .*: fix it, or name another file"):
        read(str(path))
    path.write_text("[1]\n" + json.dumps(ROWS[6][1]))
    assert read(str(path))[0] == [PAIR]


@pytest.mark.parametrize("messages, says", [
    ([], "no messages"), ([PAIR[0]], "no answer"), (PAIR[::-1], "out of order"),
    ([{"role": "tool", "content": "x"}], "unknown role 'tool'"),
    ([PAIR[0], {"role": "assistant", "content": "  "}], "empty answer"),
    ([{"role": "user", "content": None}], "both text"), ("hello", "not a list"),
    ([{"role": "user", "content": [{"type": "image_url"}]}, PAIR[1]], "parts that are not text")])
def test_what_is_not_a_conversation(messages, says, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(BadInput, match=f"no usable row.*{says}"):
        read(str(path))


@pytest.mark.parametrize("content, says", [
    ("", "it is empty"), ("{}", "nothing in it"),
    ('{"question": 1, "answer": 2}', "with question, answer \\(known are messages, conversations, "
                                     "instruction and output, .*\\): rename its columns$"),
    ("[1, 2]", "not an object")])
def test_a_file_without_usable_rows(content, says, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(BadInput, match=says):
        read(str(tmp_path / "a.json"))
    (tmp_path / "a.parquet").write_text(content)
    with pytest.raises(BadInput, match="cannot read"):
        read(str(tmp_path / "a.parquet"))


def test_a_long_conversation_is_cut_at_an_answer_or_on_the_right(tokenizer):
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the dog sat"}
            ] * 3
    ids, learned = render(chat, tokenizer)
    one, two, three = (len(render(chat[:n], tokenizer)[0]) for n in (2, 4, 6))  # pairs

    def cut_to(n, how):
        return ids[:n], learned[:n], how

    assert truncate(chat, tokenizer, three) == cut_to(three, "whole")
    assert truncate([*chat, chat[0]], tokenizer, three) == cut_to(three, "whole")
    assert truncate(chat, tokenizer, three - 1) == cut_to(two, "cut")
    assert truncate(chat, tokenizer, two) == cut_to(two, "cut")
    assert truncate(chat, tokenizer, one - 1) == cut_to(one - 1, "truncated")
    assert truncate(chat, tokenizer, 5) == (None, None, "dropped")


def test_what_is_held_out_depends_on_content_and_seed():
    examples = [[{"role": "user", "content": text}, PAIR[1]] for text in sentences(400)]
    train, val = hold_out(examples, 0.1, 1)
    assert 0.05 < len(val) / 400 < 0.16 and len(train) + len(val) == 400
    assert not any(example in train for example in val)  # duplicates are on one side
    assert hold_out(examples[::-1], 0.1, 1) == (train[::-1], val[::-1])
    assert hold_out(examples, 0.1, 2)[1] != val
    few = [examples[0], PAIR]
    assert [len(part) for part in hold_out(few, 0.01, 1)] == [1, 1]
    assert hold_out(few, 0.0, 1) == (few, [])


def test_a_share_that_cannot_be_held_out_is_refused():
    examples = [[{"role": "user", "content": text}, PAIR[1]] for text in sentences(30)]
    with pytest.raises(BadInput, match="--val_share 0"):
        hold_out([PAIR, PAIR], 0.1, 1)
    with pytest.raises(BadInput, match="--val_share 0.9999 of 30 rows"):
        hold_out(examples, 0.9999, 1)


def test_the_tail_of_a_single_text_is_held_out():
    book = "a" * 90 + "b" * 10
    assert hold_out([book], 0.1, 1) == (["a" * 90], ["b" * 10])
    examples = [[{"role": "user", "content": text}, PAIR[1]] for text in sentences(30)]
    for seed in range(30):  # with some seeds, the hash would hold out the whole book
        train, val = hold_out(examples, 0.1, seed)
        assert hold_out([book, *examples], 0.1, seed) == ([*train, "a" * 90], [*val, "b" * 10])
