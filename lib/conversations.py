"""Conversations and texts out of data files, for post-training: several layouts, told apart by the
names that a row has.

    messages        {"messages": [{"role": "user", "content": ...}, ...]}
    ShareGPT        {"conversations": [{"from": "human", "value": ...}, ...]}
    alpaca          {"instruction": ..., "output": ...}
    dolly           {"instruction": ..., "response": ...}
    prompt          {"prompt": ..., "completion": ...}, or "response"; alpaca's "### Instruction:" around a prompt is taken off
    text            {"text": ...}; a .txt is one text

Alpaca, dolly and prompt may also have "input" or "context", which the question is about, and
"history", the pairs before; all but text may have "system" or "system_prompt". A content may be a
list of parts, {"type": "text", "text": ...}. An answer with "weight": 0 or "train": false, in its
message or its row, is read and not learned: its message has "learned": False. Whatever else a row
holds is named, once per file, as not used.

A pair is a conversation of two messages. An example is a conversation, a list of messages as in
lib/chat_template.py, or a text, a str.
"""

import hashlib
import json
import os
import re

from lib.chat_template import END, check_messages, render
from lib.cli import BadInput
from lib.files import find_files, json_rows, open_file, read_text

ENDINGS = (".json", ".jsonl", ".parquet", ".txt")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
CONTEXT = ("input", "context")  # columns of what a question is about
SYSTEM = ("system", "system_prompt")  # columns of a system message
# whether an answer is learned: OpenAI's, two of axolotl's, ms-swift's
MARKS = ("weight", "train", "training", "loss")
LEARNED = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
WRAPPED = re.compile(
    r"(?:.*?\n)?### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:\s*", re.DOTALL)
SHOWN = 3  # malformed rows that are shown


# ----------------------------------------------------------------------------------------------------------------------
# Layouts: a row -> an example. A ValueError says what is wrong with the row


def _turns(key):
    def convert(row):
        if not isinstance(row[key], list) or not all(isinstance(turn, dict) for turn in row[key]):
            raise ValueError(f"{key} is not a list of messages")
        used = Used(row, {key, *SYSTEM})
        messages = []
        for turn in row[key]:
            role = turn.get("role", turn.get("from"))
            content = _joined(turn.get("content", turn.get("value")))
            message = {"role": ROLES.get(str(role), role), "content": content}
            used.turn(turn, {"role", "from", "content", "value"})
            if used.is_masked(turn) or used.is_masked(row):
                message["learned"] = False
            messages.append(message)
        return _with_system(row, messages), used.others
    return convert


def _pair(question, answer):
    def convert(row):
        used = Used(row, {question, answer, "history", *CONTEXT, *SYSTEM})
        asked = _words(row, question)
        more = [_words(row, name) for name in CONTEXT]
        if wrapped := WRAPPED.fullmatch(asked):
            asked = wrapped[1]
            more.insert(0, wrapped[2] or "")
        told = _words(row, answer)
        if not asked.strip() or not told.strip():
            raise ValueError(f"{question if told.strip() else answer} is empty")
        asked = "\n\n".join(part.strip() for part in (asked, *more) if part.strip())
        question_message = {"role": "user", "content": asked}
        answer_message = {"role": "assistant", "content": told.strip()}
        if used.is_masked(row):
            answer_message["learned"] = False
        messages = [*_history(row), question_message, answer_message]
        return _with_system(row, messages), used.others
    return convert


def _joined(content):
    """The content of a message, which OpenAI's format may hold in parts: those of text as one."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("a message with parts that are not text")
        texts.append(_words(part, "text"))
    return "".join(texts)


def _words(row, name):
    """The text in a column, "" where there is none."""
    text = row.get(name)
    if text in (None, [], {}):
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text")
    return text


def _history(row):
    """The turns before a pair, [[question, answer], ...] in the column history, as messages."""
    turns = row.get("history") or []
    if not isinstance(turns, list):
        raise ValueError("history is not a list")
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise ValueError("history is not a list of pairs")
    messages = []
    for asked, told in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return messages


def _with_system(row, messages):
    """Messages behind the system message that a column of their row holds."""
    texts = {text for name in SYSTEM if (text := _words(row, name).strip())}
    if not texts:
        return messages
    if messages and messages[0]["role"] == "system":
        texts.add(str(messages[0]["content"]).strip())
        messages = messages[1:]
    if len(texts) > 1:
        raise ValueError("two system messages")
    return [{"role": "system", "content": texts.pop()}, *messages]


class Used:
    """What a layout reads of a row. others: the names of what it leaves out, to be printed."""

    def __init__(self, row, names):
        self.others = set()
        self._note(row, names, "")

    def turn(self, turn, names):
        """Note a message of the row."""
        self._note(turn, names, "a message's ")

    def _note(self, row, names, where):
        for name, value in row.items():
            is_read = name in names or (name in MARKS and _is_learned(value) is not None)
            if not is_read and value not in (None, "", [], {}):
                self.others.add(f"{where}{name}")

    @staticmethod
    def is_masked(row):
        """Whether a row, or a message of one, says that its answer is not to be learned."""
        return any(_is_learned(row.get(name)) is False for name in MARKS)


def _is_learned(mark):
    """What one of MARKS says, a number, a boolean or text; None if neither yes nor no."""
    return LEARNED.get(str(mark).lower())


def _text(row):
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise ValueError("text is empty, or not text")
    return row["text"], Used(row, {"text"}).others


# name, the keys by which it is known, row -> (example, names of what it does not read);
# the first that fits counts
LAYOUTS = [
    ("messages", {"messages"}, _turns("messages")),
    ("ShareGPT", {"conversations"}, _turns("conversations")),
    ("alpaca", {"instruction", "output"}, _pair("instruction", "output")),
    ("dolly", {"instruction", "response"}, _pair("instruction", "response")),
    ("prompt/completion", {"prompt", "completion"}, _pair("prompt", "completion")),
    ("prompt/response", {"prompt", "response"}, _pair("prompt", "response")),
    ("text", {"text"}, _text),
]
# of a parquet file no other is read: it may hold what Python cannot
COLUMNS = set().union(*(keys for _, keys, _ in LAYOUTS), CONTEXT, SYSTEM, MARKS, {"history"})
KNOWN = ", ".join(" and ".join(sorted(keys)) for _, keys, _ in LAYOUTS)


def _check(example):
    """Raises ValueError for what nothing can be learned from."""
    if isinstance(example, str):
        return example
    try:
        check_messages(example)
    except BadInput as error:
        raise ValueError(str(error)) from error
    answers = [message for message in example if message["role"] == "assistant"]
    if not answers or not all(answer["content"].strip() for answer in answers):
        raise ValueError(
            "an empty answer of the assistant" if answers else "no answer of the assistant")
    if not any(answer.get("learned", True) for answer in answers):
        raise ValueError("every answer is marked as not to be learned")
    return example


# ----------------------------------------------------------------------------------------------------------------------
# Files


def find_paths(words):
    """Files and folders -> (paths of files, lines about files of folders that are left out).

    Raises BadInput for what is missing or of another kind.
    """
    paths, lines = [], []
    for word in words:
        found, left_out = [word], []
        if os.path.isdir(word):
            found, left_out = find_files(word, ending_of)
        if not found:
            missing = f"{word}/ holds no {', '.join(ENDINGS)} files and no token shards"
            raise BadInput("; ".join([f"{missing}: name another one", *left_out]))
        paths += found
        lines += left_out
    for path in paths:
        open_file(path, "name another one").close()
        if not ending_of(path):
            raise BadInput(f"cannot tell what {path} is: give {', '.join(ENDINGS)} files, "
                           "or folders of them or of token shards")
    return paths, lines


def ending_of(path):
    """Which of ENDINGS a path has, whatever its case, or None."""
    ending = os.path.splitext(path.lower())[1]
    return ending if ending in ENDINGS else None


def read(path, strict=False):
    """A data file -> (its examples, a line about them). Malformed rows are skipped and reported, or
    with `strict` an error.

    Raises BadInput where no layout fits or no row is usable.
    """
    examples, problems, layout, name, odd = [], [], None, None, None
    unused = {}  # names, in the order met
    for place, row in _rows(path):
        if isinstance(row, dict) and layout is None:
            layout = next((layout for layout in LAYOUTS if layout[1] <= row.keys()), None)
            wrapped = isinstance(row.get("prompt"), str) and WRAPPED.fullmatch(row["prompt"])
            name = layout and layout[0] + (", without the frame around what is asked"
                                           if wrapped else "")
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError("not an object")
            if layout is None:
                odd = odd or f"{path}, {place}: no layout is known of a row with {', '.join(row)[:200] or 'nothing in it'}"
                raise ValueError(f"no layout is known of {', '.join(row)[:60] or 'nothing'}")
            if not layout[1] <= row.keys():
                known = any(other[1] <= row.keys() for other in LAYOUTS)
                raise ValueError(f"no {' and '.join(sorted(layout[1] - row.keys()))}"
                                 + "; of another layout, it belongs in a file of its own" * known)
            example, others = layout[2](row)
            examples.append(_check(example))
            unused |= dict.fromkeys(sorted(others))
        except ValueError as error:
            problems.append(f"{place}: {error}")
            if strict:
                known = f" (known are {KNOWN})" if odd else ""
                raise BadInput(
                    f"{path}, {problems[0]}{known}: mend it, or leave out --strict") from error
    if odd and not layout:
        raise BadInput(f"{odd} (known are {KNOWN}): rename its columns")
    if not examples:
        raise BadInput(f"{path} holds no usable row ({problems[0] if problems else 'it is empty'}): "
                       "see what is in it, or name another")
    line = f"{path}: {len(examples):,} " + ("texts"
                                            if name == "text" else f"conversations (layout {name})")
    if unused:
        line += f"; not used: {', '.join(unused)}"
    if problems:
        line += f"; skipped {len(problems):,} malformed rows: {'; '.join(problems[:SHOWN])}" + "; ..." * (
            len(problems) > SHOWN)
    return examples, line


def _rows(path):
    """A file -> its rows, (place for people, row or a ValueError) each."""
    remedy = "mend it, or name another file"
    if ending_of(path) == ".txt":
        yield "its text", {"text": read_text(path, remedy, limit=2**33).removeprefix("\ufeff")}
    elif ending_of(path) == ".parquet":
        yield from ((f"row {i}", row) for i, row in enumerate(_parquet(path, remedy), 1))
    else:
        with open_file(path, remedy) as file:
            try:
                yield from json_rows(file)
            except ValueError as error:
                raise BadInput(f"{path} is not whole ({error}): {remedy}") from error


def _parquet(path, remedy):
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            others = dict.fromkeys((name for name in names if name not in COLUMNS), "not read")
            known = [name for name in names if name in COLUMNS]
            for batch in file.iter_batches(1024, columns=known):
                for row in batch.to_pylist():
                    yield others | row
    except Exception as error:  # pyarrow raises its own and Python's
        cause = str(error).splitlines()[0][:100]
        raise BadInput(f"cannot read {path} ({cause}): {remedy}") from error


# ----------------------------------------------------------------------------------------------------------------------
# What is learned, what is held out


def truncate(messages, tokenizer, room):
    """A conversation -> (ids, learned, how), of at most `room` ids: "whole", "cut" at the end of an
    earlier answer, "truncated" on the right, or "dropped" (then None, None), where nothing to be
    learned fits. What follows the last answer is dropped."""
    ids, learned = render(messages, tokenizer)
    end = tokenizer.reserved[END]
    ends = [
        i + 1
        for i, (token, yes) in enumerate(zip(ids, learned, strict=True))
        if yes and token == end
    ]
    fits = [n for n in ends if n <= room]
    n = fits[-1] if fits else room
    if not any(learned[:n]):
        return None, None, "dropped"
    return ids[:n], learned[:n], "whole" if n == ends[-1] else "cut" if fits else "truncated"


def hold_out(examples, share, seed):
    """Examples -> (those for training, those for validation), at least one of the conversations and
    of the texts: by a hash of content and seed, so that equal ones are on one side. Of texts too
    few to spare one, the end of each. Raises BadInput if nothing is left for training."""
    if not share:
        return examples, []
    train, val = [], []
    for is_text in (False, True):
        if some := [example for example in examples if isinstance(example, str) == is_text]:
            parts = _ends(some, share) if is_text and len(some) * share < 1 else _by_hash(
                some, share, seed)
            train, val = train + parts[0], val + parts[1]
    return train, val


def _ends(texts, share):
    ends = [max(int(len(text) * (1 - share)), 1) for text in texts]
    return [text[:n] for text, n in zip(texts, ends)
            ], [text[n:] for text, n in zip(texts, ends) if text[n:].strip()]


def _by_hash(examples, share, seed):
    marks = [
        hashlib.blake2b(f"{seed} {json.dumps(example)}".encode(), digest_size=8).digest()
        for example in examples
    ]
    limit = max(int(share * 2**64).to_bytes(8, "big"), min(marks))
    train = [example for example, mark in zip(examples, marks) if mark > limit]
    if not train and len(set(marks)) > 1:
        raise BadInput(
            f"--val_share {share} of {len(examples):,} rows leaves none to learn from: give a smaller one"
        )
    if not train:
        raise BadInput("all rows are alike, or there is one alone, so that none can be held out for validation: "
                       "give more, --val_data, or --val_share 0")
    return train, [example for example, mark in zip(examples, marks) if mark <= limit]
