"""lib/serving.py against texts written alone: python -m pytest tests/lib/test_serving.py"""

import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers import tiny

from lib.cli import BadInput
from lib.decoding import Decoder, NonFinite, Text, generate
from lib.serving import Busy, Closed, Engine, Request
from train_gpt2 import GPT


@pytest.fixture
def model(tokenizer):
    """A model with opinions that never agrees with itself for long."""
    torch.manual_seed(0)
    model = GPT(
        tiny(vocab_size=tokenizer.vocab_size + 4, vocab_multiple=128, block_size=64, pos="rope",
             init="xavier", token_shift=True)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture
def gate(model):
    """(an event without which no forward pass goes on, the rows of each pass)."""
    opened, rows = threading.Event(), []

    def wait(module, args):
        rows.append(len(args[0]))
        assert opened.wait(60)

    opened.set()
    model.transformer.wte.register_forward_pre_hook(wait)
    return opened, rows


def alone(model, tokenizer, request):
    """The text of a greedy request, by the loop of lib/decoding.py."""
    limit = min(request.limit, 64 - len(request.ids))
    text = Text(tokenizer, limit, request.stop, tokenizer.control)
    for (token,) in generate(Decoder(model, 1, 64), [request.ids], limit,
                              lambda logits: logits.argmax(dim=-1)):
        text.add(token)
    return text.text, text.ended, text.count


def drain(reply):
    return "".join(reply.pieces(60))


def requests(n, **changes):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (n, 2), generator=generator).tolist()
    settings = dict(temperature=0.0, stream=True) | changes
    return [Request(torch.randint(280, (length,), generator=generator).tolist(), limit, **settings)
            for length, limit in lengths]


def until(condition):
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_texts_side_by_side_are_those_written_alone(slots, model, tokenizer):
    endless = Request([7], 1000, 0.0, stream=True)
    stop = alone(model, tokenizer, endless)[0][9:12]
    asked = [
        *requests(12),
        replace(endless, stop=("nowhere", stop)),
        Request([5] * 63, 9, 0.0), endless
    ]
    want = [alone(model, tokenizer, request) for request in asked]
    assert {ended for _, ended, _ in want} == {"stop", "length"} and len(
        {text for text, _, _ in want}) > 10
    with Engine(model, tokenizer, slots) as engine:
        replies = [engine.submit(request) for request in asked]
        texts = [drain(reply) for reply in replies]
    assert [(reply.text, reply.ended, reply.count) for reply in replies] == want
    assert texts == [reply.text if reply.request.stream else ""
                     for reply in replies]  # without stream, nothing before the end


def test_rows_are_as_many_as_there_are_texts_and_none_when_idle(model, tokenizer, gate):
    opened, rows = gate
    with Engine(model, tokenizer, 4) as engine:
        assert rows == [4, 4]  # takes its memory before it begins
        opened.clear()
        replies = [engine.submit(request) for request in requests(1)[:1] + requests(8)[1:]]
        opened.set()
        for reply in replies:
            drain(reply)
        assert max(rows) == 4
        before = len(rows)
        reply = engine.submit(Request([1, 2, 3], 20, 0.0))
        drain(reply)
        until(lambda: not engine.replies)
        assert rows[before:] == [1] * (1 + reply.count)  # the prompt's pass, and a step per token


def test_temperature_top_p_and_seed_are_each_text_s_own(model, tokenizer):
    seeded = dict(temperature=1.5, top_p=0.9, seed=11)
    with Engine(model, tokenizer, 8, top_k=50) as engine:
        first = engine.submit(Request([1, 2], 30, **seeded))
        drain(first)
        unseeded = Request([1, 2], 30, temperature=1.5)
        mixed = [
            engine.submit(request)
            for request in (*requests(3), Request([1, 2], 30, **seeded),
                            *requests(2, temperature=1.0, top_p=0.5), unseeded, unseeded)
        ]
        for reply in mixed:
            drain(reply)
    assert mixed[3].text == first.text and mixed[-1].text != mixed[-2].text
    assert [reply.text for reply in mixed[:3]
            ] == [alone(model, tokenizer, request)[0] for request in requests(3)]


def test_those_beyond_the_slots_wait_their_turn_and_those_beyond_the_queue_are_refused(
        model, tokenizer, gate):
    opened, rows = gate
    with Engine(model, tokenizer, 2, waiting=3) as engine:
        opened.clear()
        under_way = [engine.submit(Request([i + 1], 5, 0.0)) for i in range(2)]
        until(lambda: not engine.queue)
        waiting = [engine.submit(Request([i + 1], 5, 0.0)) for i in range(3)]
        with pytest.raises(Busy):
            engine.submit(Request([1], 5))
        waiting[1].cancel()
        waiting.append(engine.submit(Request([9], 5, 0.0)))  # its place is free
        opened.set()
        for reply in (*under_way, waiting[0], *waiting[2:]):
            drain(reply)
            assert (reply.text, reply.ended, reply.count) == alone(model, tokenizer, reply.request)
    assert max(rows) == 2 and (waiting[1].ended, waiting[1].count) == ("cancelled", 0)


def test_a_text_nobody_wants_frees_its_row(model, tokenizer, gate):
    opened, _ = gate
    with Engine(model, tokenizer, 1) as engine:
        opened.clear()
        reply = engine.submit(Request([1], 60, 0.0, stream=True))
        until(lambda: not engine.queue)
        after = engine.submit(Request([2], 5, 0.0))
        reply.cancel()
        opened.set()
        drain(after)
    assert reply.ended == "cancelled" and reply.count == 0 and after.text == alone(
        model, tokenizer, after.request)[0]


def test_a_closed_engine_ends_all_texts(model, tokenizer, gate):
    opened, _ = gate
    with Engine(model, tokenizer, 1) as engine:
        opened.clear()
        replies = [engine.submit(Request([1], 60, 0.0)) for _ in range(2)]
        threading.Timer(0.05, opened.set).start()
    for reply in replies:
        drain(reply)
        assert isinstance(reply.error, Closed)
    with pytest.raises(Closed):
        engine.submit(Request([1], 5))


def test_a_broken_model_ends_the_text_and_not_the_engine(model, tokenizer, capsys):
    calls = []

    def fail(module, args):
        calls.append(len(args[0]))
        if len(calls) in (3, 6):
            raise RuntimeError("out of memory\nat length")

    model.transformer.wte.register_forward_pre_hook(fail)
    with Engine(model, tokenizer, 2) as engine:
        for broken in (True, True, False):  # in the prompt's pass, in a step, not at all
            reply = engine.submit(Request([1], 3, 0.0))
            drain(reply)
            assert (str(reply.error).startswith("out of memory") if broken else reply.error is None)
        assert capsys.readouterr().err.count("ended by RuntimeError: out of memory\n") == 2
        model.lm_head.weight.data[3, 3] = math.nan
        reply = engine.submit(Request([1], 3, 0.0))
        drain(reply)
        assert isinstance(reply.error, NonFinite)
        until(lambda: not engine.replies)


@pytest.mark.gpu
def test_graphs_write_what_eager_steps_write(model, tokenizer):
    """One text at a time, as the number of rows decides how bf16 rounds; then all at once, in
    several captured sizes."""
    texts = []
    for graphs in (False, True):
        with Engine(model.cuda(), tokenizer, 8, graphs=graphs) as engine:
            for request in requests(6):
                reply = engine.submit(request)
                drain(reply)
                texts.append((reply.text, reply.ended, reply.error))
            together = [
                engine.submit(request) for request in requests(40, temperature=1.0, top_p=0.9)
            ]
            for reply in together:
                drain(reply)
                assert reply.ended and reply.error is None
    assert texts[:6] == texts[6:] and all(error is None for _, _, error in texts)


def test_memory_that_does_not_hold_the_slots_is_bad_input(model, tokenizer):
    with pytest.raises(
            BadInput, match=
            "no memory for 1,000,000,000,000 texts of 64 tokens, 32,768,000.0 GB .*: lower --slots"
    ):
        Engine(model, tokenizer, 10**12)
