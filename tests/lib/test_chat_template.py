"""The chat template against a hand-worked case. Run: python -m pytest
tests/lib/test_chat_template.py"""

import pytest

from lib.chat_template import check_messages, fit, render
from lib.cli import BadInput
from lib.tokenizers import load_tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo<|end|>"}]


def test_a_conversation_by_hand():
    tokenizer = load_tokenizer("gpt2")
    system, user, assistant, end = (50257 + i for i in range(4))
    text = [tokenizer.encode(message["content"]).tolist() for message in CHAT]
    ids, learned = render(CHAT, tokenizer)
    assert ids == [50256, system, *text[0], end, user, *text[1], end, assistant, *text[2], end]
    assert [token for token, yes in zip(ids, learned, strict=True) if yes] == [*text[2], end]
    assert end not in text[2]  # typed out, it is text
    assert render(CHAT[:2], tokenizer,
                  reply=True)[0] == [50256, system, *text[0], end, user, *text[1], end, assistant]


@pytest.mark.parametrize("messages, says", [
    ([], "no messages"), (None, "no messages"), ([3], "without"), ([{"role": "user"}], "without"),
    ([{"role": "tool", "content": "x"}], "unknown role 'tool'"),
    (CHAT[1:] + CHAT[:1], "out of order"), (CHAT[:1], "out of order"),
    (CHAT[2:], "out of order"), (CHAT[1:2] * 2, "out of order"),
])
def test_what_is_not_a_conversation(messages, says):
    with pytest.raises(BadInput, match=says):
        check_messages(messages)


def test_a_conversation_passes():
    check_messages(CHAT)
    check_messages(CHAT[1:])


@pytest.mark.parametrize("system", [[], CHAT[:1]], ids=["plain", "system"])
def test_the_oldest_turns_are_dropped(system):
    tokenizer = load_tokenizer("gpt2")
    # each has 4 tokens: its role, 2 of text, its end
    turns = []
    for i in range(3):
        turns.append({"role": "user", "content": f"turn {i}"})
        turns.append({"role": "assistant", "content": f"turn {i}"})
    del turns[-1]
    # 2: end of text and <|assistant|>; "Be brief." has 3 tokens
    whole = 2 + len(system) * 5 + 4 * len(turns)
    for limit, kept in ((whole, turns), (whole - 1, turns[2:]), (whole - 8, turns[2:]),
                        (whole - 9, turns[4:])):
        ids, _ = render(system + kept, tokenizer, reply=True)
        assert fit(system + turns, tokenizer, limit) == (system + kept, ids)
    with pytest.raises(BadInput, match=f"has {whole - 16} tokens, .* room for {whole - 17}:"):
        fit(system + turns, tokenizer, whole - 17)
