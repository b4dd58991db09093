"""The chat template: how a conversation becomes token ids, in post-training, in chat.py and, as
Jinja, in exported tokenizers.

    <|endoftext|> <|user|>Hi<|end|> <|assistant|>Hello!<|end|>          without the spaces

A conversation is a list of messages, {"role": "system", "user" or "assistant", "content": str}: a
system message may stand first, then user and assistant take turns. An answer with "learned": False
is read, and not learned. The control tokens are ids that text never encodes to (lib/tokenizers.py),
so nothing that a user types or that stands in data is taken for one.
"""

from lib.cli import BadInput
from lib.tokenizers import END, EOT

ROLES = ("system", "user", "assistant")
# the same for transformers' apply_chat_template; a checkpoint that can chat holds it as
# "chat_template"
JINJA = ("{{ '" + EOT + "' }}{% for message in messages %}"
         "{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def check_messages(messages):
    """Raises BadInput, without a remedy, unless `messages` is a conversation."""
    if not isinstance(messages, list) or not messages:
        raise BadInput("no messages")
    for message in messages:
        if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadInput("a message without a role and a content, both text")
        if message["role"] not in ROLES:
            raise BadInput(f"the unknown role {message['role'][:40]!r}")
    turns = [message["role"] for message in messages[messages[0]["role"] == "system":]]
    if not turns or turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise BadInput(f"roles out of order ({', '.join(message['role'] for message in messages[:6])}): "
                       "a system message may stand first, then user and assistant take turns, the user first")


def render(messages, tokenizer, reply=False):
    """A conversation -> ids, list of int, and which of them are to be learned, list of bool:
    what the assistant says, and its <|end|>.

    reply: end with <|assistant|>, for the model to go on.
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


def fit(messages, tokenizer, limit):
    """The part of a conversation, its last message the user's, whose prompt has at most `limit`
    tokens -> (messages, ids): the system message and the newest turns; the oldest are left out, in
    pairs. Raises BadInput if the last message alone is too long."""
    system, turns = messages[:messages[0]["role"] == "system"], messages[messages[0]["role"] ==
                                                                         "system":]
    while True:
        ids, _ = render([*system, *turns], tokenizer, reply=True)
        if len(ids) <= limit:
            return [*system, *turns], ids
        if len(turns) < 3:
            raise BadInput(f"the message and what stands around it have {len(ids):,} tokens, "
                           f"and the context has room for {limit:,}: shorten it")
        turns = turns[2:]
