"""The chat template against a hand-worked case. Run: python -m pytest tests/lib/test_chat_template.py"""

import pytest

from lib.chat_template import check_messages, render
from lib.cli import BadInput
from lib.tokenizers import load_tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo<|end|>"}]


def test_a_conversation_by_hand():
    tokenizer = load_tokenizer("gpt2")
    system, user, assistant, end = (50257 + i for i in range(4))
    text = [tokenizer.encode(message["content"]).tolist() for message in CHAT]
    ids, learned = render(CHAT, tokenizer)
    assert ids == [50256, system, *text[0], end, user, *text[1], end, assistant, *text[2], end]
    assert [token for token, yes in zip(ids, learned, strict=True) if yes] == [*text[2], end]
    assert end not in text[2]  # typed out, it is text
    assert render(CHAT[:2], tokenizer, reply=True)[0] == [50256, system, *text[0], end, user, *text[1], end, assistant]


@pytest.mark.parametrize("messages, told", [
    ([], "no messages"), (None, "no messages"), ([{"role": "user"}], "without"), ([{"role": "tool", "content": "x"}], "unknown role 'tool'"),
    (CHAT[1:] + CHAT[:1], "out of order"), (CHAT[:1], "out of order"), (CHAT[2:], "out of order"), (CHAT[1:2] * 2, "out of order")])
def test_what_is_no_conversation(messages, told):
    with pytest.raises(BadInput, match=told):
        check_messages(messages)
    check_messages(CHAT)
