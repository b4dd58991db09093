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


@pytest.mark.parametrize("messages, told",
                         [([], "no messages"), (None, "no messages"),
                          ([{"role": "user"}], "without"),
                          ([{"role": "tool", "content": "x"}], "unknown role 'tool'"),
                          (CHAT[1:] + CHAT[:1], "out of order"), (CHAT[:1], "out of order"),
                          (CHAT[2:], "out of order"), (CHAT[1:2] * 2, "out of order")])
def test_what_is_no_conversation(messages, told):
    with pytest.raises(BadInput, match=told):
        check_messages(messages)
    check_messages(CHAT)


def test_the_oldest_turns_give_way():
    tokenizer = load_tokenizer("gpt2")
    # each: its role, 2 tokens of text, its end
    turns = [{"role": role, "content": f"turn {i}"}
             for i in range(3)
             for role in ("user", "assistant")][:-1]
    for system in ([], CHAT[:1]):
        whole = 2 + len(system) * 5 + 4 * len(
            turns)  # end-of-text, <|assistant|>, "Be brief." is 3 tokens
        for limit, kept in ((whole, turns), (whole - 1, turns[2:]), (whole - 8, turns[2:]),
                            (whole - 9, turns[4:])):
            assert fit(system + turns, tokenizer,
                       limit) == (system + kept, render(system + kept, tokenizer, reply=True)[0])
        with pytest.raises(
                BadInput, match=
                f"has {whole - 16} tokens, and the context has room for {whole - 17}: shorten it"):
            fit(system + turns, tokenizer, whole - 17)
