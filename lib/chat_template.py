"""The chat template: how a conversation becomes token ids, in post-training, in chat.py and, as
Jinja, in exported tokenizers.

    <|endoftext|> <|user|>Hi<|end|> <|assistant|>Hello!<|end|>          without the spaces

A conversation is a list of messages, {"role": "system", "user" or "assistant", "content": str}: an
optional system message, then user and assistant take turns. An answer with "learned": False is
context only. Text never encodes to the ids of control tokens (lib/tokenizers.py), so neither user
input nor data can imitate one.
"""

from typing import Any

from lib.cli import BadInput
from lib.tokenizers import END, EOT, Tokenizer

ROLES = ("system", "user", "assistant")
# the same for transformers' apply_chat_template; a checkpoint that can chat has it as
# "chat_template"
JINJA = ("{{ '" + EOT + "' }}{% for message in messages %}"
         "{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def check_messages(messages: Any) -> None:
    """Raises BadInput, without a remedy, unless `messages` is a conversation."""
    if not isinstance(messages, list) or not messages:
        raise BadInput("no messages")
    for message in messages:
        if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadInput("a message without a role and a content, both text")
        if message["role"] not in ROLES:
            raise BadInput(f"the unknown role {message['role'][:40]!r}")
    _, turns = split_system(messages)
    roles = [message["role"] for message in turns]
    expected = [("user", "assistant")[i % 2] for i in range(len(roles))]
    if not roles or roles != expected:
        first = ", ".join(message["role"] for message in messages[:6])
        raise BadInput(f"roles out of order ({first}): an optional system message, then user and "
                       "assistant take turns, the user first")


def split_system(messages: list[dict]) -> tuple[list[dict], list[dict]]:
    """(the system message, if there is one; the turns after it)."""
    n = 1 if messages[0]["role"] == "system" else 0
    return messages[:n], messages[n:]


def render(messages: list[dict], tokenizer: Tokenizer,
           reply: bool = False) -> tuple[list[int], list[bool]]:
    """A conversation -> its ids, and which of them are learned: the assistant's turns with their
    <|end|>.

    reply: end with <|assistant|>, for the model to continue.
    """
    ids, learned = [tokenizer.eot], [False]
    for message in messages:
        text = tokenizer.encode(message["content"]).tolist()
        ids += [tokenizer.reserved[f"<|{message['role']}|>"], *text, tokenizer.reserved[END]]
        is_learned = message["role"] == "assistant" and message.get("learned", True)
        learned += [False, *[is_learned] * (len(text) + 1)]
    if reply:
        ids.append(tokenizer.reserved["<|assistant|>"])
        learned.append(False)
    return ids, learned


def fit(messages: list[dict], tokenizer: Tokenizer,
        limit: int) -> tuple[list[dict], list[int]]:
    """The part of a conversation whose prompt has at most `limit` tokens -> (messages, ids).

    The last message is the user's. The system message and the newest turns stay; the oldest are
    dropped, in pairs. Raises BadInput if the last message alone is too long.
    """
    system, turns = split_system(messages)
    while True:
        ids, _ = render([*system, *turns], tokenizer, reply=True)
        if len(ids) <= limit:
            return [*system, *turns], ids
        if len(turns) < 3:
            raise BadInput(f"the message, with the system message, has {len(ids):,} tokens, and "
                           f"the context has room for {limit:,}: shorten it")
        turns = turns[2:]
