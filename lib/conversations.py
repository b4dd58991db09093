"""Conversations and texts from data files, for post-training. The layout of a file is detected from
its columns:

    messages        {"messages": [{"role": "user", "content": ...}, ...]}
    ShareGPT        {"conversations": [{"from": "human", "value": ...}, ...]}
    alpaca          {"instruction": ..., "output": ...}
    dolly           {"instruction": ..., "response": ...}
    prompt          {"prompt": ..., "completion": ...}, or "response"; alpaca's "### Instruction:"
                    around a prompt is removed
    text            {"text": ...}; a .txt file is one text, and so is a .md file given by name

Alpaca, dolly and prompt may also have "input" or "context", which the question refers to, and
"history", earlier pairs. All but text may have "system" or "system_prompt". A content may be a list
of parts, {"type": "text", "text": ...}. An answer with "weight": 0 or "train": false, in its
message or its row, is context only: its message gets "learned": False. Other columns are listed
once per file as not used.

A pair is a conversation of two messages. An example is a conversation, a list of messages as in
lib/chat_template.py, or a text, a str.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lib.chat_template import END, check_messages, render
from lib.cli import BadInput
from lib.files import find_files, is_utf16, json_rows, open_file, read_text
from lib.tokenizers import Tokenizer

ENDINGS = (".json", ".jsonl", ".parquet", ".txt")
NOTES = ".md"  # read as .txt if given by name; in a folder it may describe the data
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
CONTEXT = ("input", "context")  # columns that a question refers to
SYSTEM = ("system", "system_prompt")  # columns of a system message
# whether an answer is learned: OpenAI's, two of axolotl's, ms-swift's
MARKS = ("weight", "train", "training", "loss")
LEARNED = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
FRAME = re.compile(
    r"(?:.*?\n)?### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:\s*", re.DOTALL)
SHOWN = 3  # malformed rows that are shown
EMPTY: tuple = (None, "", [], {})

Example = list[dict] | str


# --------------------------------------------------------------------------------------------------
# Layouts: a row -> an example. A ValueError says what is wrong with the row


class Layout(NamedTuple):
    name: str
    keys: set[str]  # columns that identify it
    convert: Callable  # row -> (example, names of unused columns)


class UnknownLayout(ValueError):
    def __init__(self, row: dict):
        super().__init__(f"no layout is known of {', '.join(row)[:60] or 'nothing'}")
        self.row = row


def _turns(key):
    """The `convert` of a layout with a list of messages in the column `key`."""
    def convert(row):
        turns = row[key]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{key} is not a list of messages")
        unused = _unused(row, {key, *SYSTEM})
        messages = []
        for turn in turns:
            role = turn.get("role", turn.get("from"))
            content = _joined(turn.get("content", turn.get("value")))
            message = {"role": ROLES.get(str(role), role), "content": content}
            names = _unused(turn, {"role", "from", "content", "value"})
            unused |= {f"a message's {name}" for name in names}
            if _is_masked(turn) or _is_masked(row):
                message["learned"] = False
            messages.append(message)
        return _with_system(row, messages), unused
    return convert


def _pair(question, answer):
    """The `convert` of a layout with a question and an answer in columns of these names."""
    def convert(row):
        asked = _text_of(row, question)
        answered = _text_of(row, answer).strip()
        context = [_text_of(row, name) for name in CONTEXT]
        frame = FRAME.fullmatch(asked)
        if frame:
            asked = frame[1]
            context.insert(0, frame[2] or "")
        if not asked.strip():
            raise ValueError(f"{question} is empty")
        if not answered:
            raise ValueError(f"{answer} is empty")
        asked = "\n\n".join(part.strip() for part in (asked, *context) if part.strip())
        reply = {"role": "assistant", "content": answered}
        if _is_masked(row):
            reply["learned"] = False
        messages = [*_history(row), {"role": "user", "content": asked}, reply]
        unused = _unused(row, {question, answer, "history", *CONTEXT, *SYSTEM})
        return _with_system(row, messages), unused
    return convert


def _text(row):
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise ValueError("text is empty, or not text")
    return row["text"], _unused(row, {"text"})


def _joined(content):
    """The content of a message as one text; in OpenAI's format it may be a list of parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError("a message with parts that are not text")
        texts.append(_text_of(part, "text"))
    return "".join(texts)


def _text_of(row, name):
    """The text in a column, "" if there is none."""
    text = row.get(name)
    if text in EMPTY:
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
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _with_system(row, messages):
    """The messages, preceded by the system message in a column of their row, if there is one."""
    texts = {_text_of(row, name).strip() for name in SYSTEM} - {""}
    if not texts:
        return messages
    if messages and messages[0]["role"] == "system":
        texts.add(str(messages[0]["content"]).strip())
        messages = messages[1:]
    if len(texts) > 1:
        raise ValueError("two system messages")
    return [{"role": "system", "content": texts.pop()}, *messages]


def _unused(row, names):
    """Names of the non-empty columns of a row, or of a message, that are not in `names`."""
    return {name for name, value in row.items()
            if name not in names and value not in EMPTY
            and not (name in MARKS and _is_learned(value) is not None)}


def _is_masked(row):
    """Whether a row, or a message of one, says that its answer is not to be learned."""
    return any(_is_learned(row.get(name)) is False for name in MARKS)


def _is_learned(mark):
    """The value of one of MARKS, a number, a boolean or text; None if neither yes nor no."""
    return LEARNED.get(str(mark).lower())


LAYOUTS = [  # the first that fits is taken
    Layout("messages", {"messages"}, _turns("messages")),
    Layout("ShareGPT", {"conversations"}, _turns("conversations")),
    Layout("alpaca", {"instruction", "output"}, _pair("instruction", "output")),
    Layout("dolly", {"instruction", "response"}, _pair("instruction", "response")),
    Layout("prompt/completion", {"prompt", "completion"}, _pair("prompt", "completion")),
    Layout("prompt/response", {"prompt", "response"}, _pair("prompt", "response")),
    Layout("text", {"text"}, _text),
]
# no other column of a parquet file is read: it may contain values that Python cannot represent
COLUMNS = set().union(*(layout.keys for layout in LAYOUTS), CONTEXT, SYSTEM, MARKS, {"history"})
KNOWN = ", ".join(" and ".join(sorted(layout.keys)) for layout in LAYOUTS)


def find_layout(row: dict) -> Layout | None:
    for layout in LAYOUTS:
        if layout.keys <= row.keys():
            return layout
    return None


def _convert(row, layout):
    """A row -> (example, names of unused columns)."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("not an object")
    if layout is None:
        raise UnknownLayout(row)
    missing = layout.keys - row.keys()
    if missing:
        problem = f"no {' and '.join(sorted(missing))}"
        if find_layout(row):
            problem += "; of another layout, it belongs in a file of its own"
        raise ValueError(problem)
    example, unused = layout.convert(row)
    if not isinstance(example, str):
        _check_conversation(example)
    return example, unused


def _check_conversation(messages):
    """Raises ValueError unless there is something to learn."""
    try:
        check_messages(messages)
    except BadInput as error:
        raise ValueError(str(error)) from error
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no answer of the assistant")
    if not all(answer["content"].strip() for answer in answers):
        raise ValueError("an empty answer of the assistant")
    if not any(answer.get("learned", True) for answer in answers):
        raise ValueError("every answer is marked as not to be learned")


# --------------------------------------------------------------------------------------------------
# Files


def find_paths(words: list[str]) -> tuple[list[str], list[str]]:
    """Files and folders -> (paths of files, lines about files in folders that are left out).

    Raises BadInput if one is missing or of another kind.
    """
    paths: list[str] = []
    lines: list[str] = []
    for word in words:
        found = [word]
        left_out: list[str] = []
        if os.path.isdir(word):
            found, left_out = find_files(word, ending_of)
        if not found:
            missing = f"{word}/ has no {', '.join(ENDINGS)} files and no token shards"
            raise BadInput("; ".join([f"{missing}: name another one", *left_out]))
        paths += found
        lines += left_out
    for path in paths:
        open_file(path, "name another one").close()
        if not (ending_of(path) or is_text_file(path)):
            raise BadInput(f"cannot tell what {path} is: give {', '.join(ENDINGS)} files, "
                           "or folders of them or of token shards")
    return paths, lines


def ending_of(path: str) -> str | None:
    """Which of ENDINGS a path has, in any case, or None."""
    ending = os.path.splitext(path.lower())[1]
    return ending if ending in ENDINGS else None


def is_text_file(path: str) -> bool:
    return path.lower().endswith((".txt", NOTES))


def read(path: str, strict: bool = False) -> tuple[list[Example], str]:
    """A data file -> (its examples, a line about them).

    Malformed rows are skipped and reported, or with `strict` an error. Raises BadInput if no layout
    fits or no row is usable.
    """
    examples: list[Example] = []
    problems: list[str] = []
    unused: dict[str, None] = {}  # a set in order
    layout = None
    framed = False
    unknown = None  # the first row of no known layout
    for place, row in _rows(path):
        if layout is None and isinstance(row, dict):
            layout = find_layout(row)
            framed = layout is not None and _is_framed(row)
        try:
            example, names = _convert(row, layout)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            if isinstance(error, UnknownLayout) and unknown is None:
                columns = ", ".join(error.row)[:200] or "nothing in it"
                unknown = f"{path}, {place}: no layout is known of a row with {columns}"
            if strict:
                known = f" (known are {KNOWN})" if unknown else ""
                raise BadInput(f"{path}, {problems[0]}{known}: fix it, or leave out --strict"
                               ) from error
            continue
        examples.append(example)
        unused |= dict.fromkeys(sorted(names))
    if layout is None and unknown:
        raise BadInput(f"{unknown} (known are {KNOWN}): rename its columns")
    if not examples:
        first = problems[0] if problems else "it is empty"
        raise BadInput(f"{path} has no usable row ({first}): check its content, or name another")
    line = f"{path}: {len(examples):,} {_kind(layout, framed)}"
    if unused:
        line += f"; not used: {', '.join(unused)}"
    if problems:
        line += f"; skipped {len(problems):,} malformed rows: {'; '.join(problems[:SHOWN])}"
    if len(problems) > SHOWN:
        line += "; ..."
    return examples, line


def _is_framed(row):
    prompt = row.get("prompt")
    return isinstance(prompt, str) and FRAME.fullmatch(prompt) is not None


def _kind(layout, framed):
    if layout.name == "text":
        return "texts"
    frame = ", without the frame around the prompt" if framed else ""
    return f"conversations (layout {layout.name}{frame})"


def _rows(path) -> Iterator[tuple[str, object]]:
    """The rows of a file: (its place as text, the row or a ValueError) each."""
    remedy = "fix it, or name another file"
    if is_text_file(path):
        text = read_text(path, remedy, limit=2**33)
        if is_utf16(text):
            raise BadInput(f"{path} is UTF-16 or UTF-32: {remedy}")
        yield "its text", {"text": text.removeprefix("\ufeff")}
        return
    if ending_of(path) == ".parquet":
        for number, row in enumerate(_parquet(path, remedy), 1):
            yield f"row {number}", row
        return
    with open_file(path, remedy) as file:
        try:
            yield from json_rows(file)
        except ValueError as error:
            raise BadInput(f"{path} is incomplete or damaged ({error}): {remedy}") from error


def _parquet(path, remedy):
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            known = [name for name in names if name in COLUMNS]
            others = {name: "not read" for name in names if name not in COLUMNS}
            for batch in file.iter_batches(1024, columns=known):
                for row in batch.to_pylist():
                    yield others | row
    except Exception as error:  # pyarrow raises its own and Python's
        cause = str(error).splitlines()[0][:100]
        raise BadInput(f"cannot read {path} ({cause}): {remedy}") from error


# --------------------------------------------------------------------------------------------------
# Cutting and holding out


def truncate(messages: list[dict], tokenizer: Tokenizer,
             room: int) -> tuple[list[int] | None, list[bool] | None, str]:
    """A conversation -> (ids, learned, how), of at most `room` ids.

    how: "whole"; "cut" at the end of an earlier answer; "truncated" on the right; or "dropped" if
    nothing that is learned fits (ids and learned are then None). Messages after the last answer are
    removed.
    """
    ids, learned = render(messages, tokenizer)
    end = tokenizer.reserved[END]
    ends = [i + 1 for i, token in enumerate(ids) if token == end and learned[i]]
    fitting = [n for n in ends if n <= room]
    n = fitting[-1] if fitting else room
    if not any(learned[:n]):
        return None, None, "dropped"
    how = "truncated"
    if fitting:
        how = "whole" if n == ends[-1] else "cut"
    return ids[:n], learned[:n], how


def hold_out(examples: list[Example], share: float,
             seed: int) -> tuple[list[Example], list[Example]]:
    """Examples -> (training examples, validation examples).

    Holds out at least one of the conversations and one of the texts, by a hash of content and seed,
    so that duplicates are in the same split; for a few texts, the tail of each. Raises BadInput if
    nothing is left for training.
    """
    if not share:
        return examples, []
    train, val = [], []
    for is_text in (False, True):
        group = [example for example in examples if isinstance(example, str) == is_text]
        if not group:
            continue
        if is_text and len(group) * share < 1:
            kept, held_out = _split_tails(group, share)
        else:
            kept, held_out = _split_by_hash(group, share, seed)
        train += kept
        val += held_out
    return train, val


def _split_tails(texts, share):
    heads, tails = [], []
    for text in texts:
        n = max(int(len(text) * (1 - share)), 1)
        heads.append(text[:n])
        if text[n:].strip():
            tails.append(text[n:])
    return heads, tails


def _split_by_hash(examples, share, seed):
    hashes = [_hash(example, seed) for example in examples]
    limit = max(int(share * 2**64).to_bytes(8, "big"), min(hashes))
    train, val = [], []
    for example, its_hash in zip(examples, hashes, strict=True):
        side = train if its_hash > limit else val
        side.append(example)
    if train:
        return train, val
    if len(set(hashes)) > 1:
        raise BadInput(f"--val_share {share} of {len(examples):,} rows leaves none to learn from: "
                       "give a smaller one")
    raise BadInput("all rows are equal, or there is only one, so none can be held out for "
                   "validation: give more, --val_data, or --val_share 0")


def _hash(example, seed):
    text = f"{seed} {json.dumps(example)}"
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
