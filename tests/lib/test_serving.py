"""lib/serving.py against texts generated alone: python -m pytest tests/lib/test_serving.py"""

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
    """A model whose texts do not repeat themselves for long."""
    torch.manual_seed(0)
    config = tiny(vocab_size=tokenizer.vocab_size + 4, vocab_multiple=128, block_size=64,
                  pos="rope", init="xavier", token_shift=True)
    model = GPT(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture
def gate(model):
    """(an event that forward passes wait for, the rows of each pass)."""
    opened = threading.Event()
    opened.set()
    rows = []

    def wait(module, args):
        rows.append(len(args[0]))
        assert opened.wait(600)

    model.transformer.wte.register_forward_pre_hook(wait)
    return opened, rows


def alone(model, tokenizer, request):
    """The text of a greedy request by lib/decoding.py's loop -> (text, how it ended, tokens)."""
    limit = min(request.limit, 64 - len(request.ids))
    text = Text(tokenizer, limit, request.stop, tokenizer.control)
    decoder = Decoder(model, 1, 64)
    for (token,) in generate(decoder, [request.ids], limit, lambda logits: logits.argmax(dim=-1)):
        text.add(token)
    return text.text, text.ended, text.count


def result(reply):
    """The result of a reply, in the form of `alone`."""
    return reply.text, reply.ended, reply.count


def drain(reply):
    return "".join(reply.pieces(60))


def requests(n, **changes):
    """n requests of random prompts and limits."""
    generator = torch.Generator().manual_seed(1)
    settings = dict(temperature=0.0, stream=True) | changes
    found = []
    for length, limit in torch.randint(1, 40, (n, 2), generator=generator).tolist():
        ids = torch.randint(280, (length,), generator=generator).tolist()
        found.append(Request(ids, limit, **settings))
    return found


def short(token):
    return Request([token], 5, temperature=0.0)


def until(condition):
    """Wait for another thread."""
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_texts_of_one_batch_are_those_generated_alone(slots, model, tokenizer):
    endless = Request([7], 1000, 0.0, stream=True)
    stop = alone(model, tokenizer, endless)[0][9:12]
    asked = [
        *requests(12),
        replace(endless, stop=("nowhere", stop)),
        Request([5] * 63, 9, 0.0),
        endless,
    ]
    expected = [alone(model, tokenizer, request) for request in asked]
    assert {ended for _, ended, _ in expected} == {"stop", "length"}
    assert len({text for text, _, _ in expected}) > 10
    with Engine(model, tokenizer, slots) as engine:
        replies = [engine.submit(request) for request in asked]
        pieces = [drain(reply) for reply in replies]
    assert [result(reply) for reply in replies] == expected
    for reply, streamed in zip(replies, pieces):
        # without stream, nothing before the end
        assert streamed == (reply.text if reply.request.stream else "")


def test_a_step_computes_one_row_per_text_and_none_when_idle(model, tokenizer, gate):
    opened, rows = gate
    with Engine(model, tokenizer, 4) as engine:
        assert rows == [4, 4]  # allocates its memory first
        opened.clear()
        replies = [engine.submit(request) for request in requests(8)]
        opened.set()
        for reply in replies:
            drain(reply)
        assert max(rows) == 4
        before = len(rows)
        reply = engine.submit(Request([1, 2, 3], 20, 0.0))
        drain(reply)
        until(lambda: not engine.replies)
        assert rows[before:] == [1] * (1 + reply.count)  # prefill, and a step per token


def test_each_text_has_its_own_temperature_top_p_and_seed(model, tokenizer):
    seeded = Request([1, 2], 30, temperature=1.5, top_p=0.9, seed=11)
    unseeded = Request([1, 2], 30, temperature=1.5)
    with Engine(model, tokenizer, 8, top_k=50) as engine:
        first = engine.submit(seeded)
        drain(first)
        greedy = requests(3)
        sampled = requests(2, temperature=1.0, top_p=0.5)
        replies = [engine.submit(request)
                   for request in (*greedy, seeded, *sampled, unseeded, unseeded)]
        for reply in replies:
            drain(reply)
    assert replies[3].text == first.text
    assert replies[-1].text != replies[-2].text
    for request, reply in zip(greedy, replies):
        assert reply.text == alone(model, tokenizer, request)[0]


def test_requests_beyond_the_slots_wait_and_beyond_the_queue_are_refused(model, tokenizer, gate):
    opened, rows = gate
    with Engine(model, tokenizer, 2, waiting=3) as engine:
        opened.clear()
        running = [engine.submit(short(i + 1)) for i in range(2)]
        until(lambda: not engine.queue)
        waiting = [engine.submit(short(i + 1)) for i in range(3)]
        with pytest.raises(Busy):
            engine.submit(Request([1], 5))
        cancelled = waiting.pop(1)
        cancelled.cancel()
        waiting.append(engine.submit(short(9)))  # takes its place in the queue
        opened.set()
        for reply in (*running, *waiting):
            drain(reply)
            assert result(reply) == alone(model, tokenizer, reply.request)
    assert max(rows) == 2
    assert (cancelled.ended, cancelled.count) == ("cancelled", 0)


def test_a_cancelled_text_frees_its_row(model, tokenizer, gate):
    opened, _ = gate
    with Engine(model, tokenizer, 1) as engine:
        opened.clear()
        reply = engine.submit(Request([1], 60, 0.0, stream=True))
        until(lambda: not engine.queue)
        after = engine.submit(short(2))
        reply.cancel()
        opened.set()
        drain(after)
    assert (reply.ended, reply.count) == ("cancelled", 0)
    assert result(after) == alone(model, tokenizer, after.request)


def test_closing_the_engine_ends_all_texts(model, tokenizer, gate):
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


def test_an_error_of_the_model_ends_the_text_and_not_the_engine(model, tokenizer, capsys):
    calls = []

    def fail(module, args):
        calls.append(len(args[0]))
        if len(calls) in (3, 6):  # in a prefill, in a step
            raise RuntimeError("out of memory\nat length")

    model.transformer.wte.register_forward_pre_hook(fail)
    with Engine(model, tokenizer, 2) as engine:
        for fails in (True, True, False):
            reply = engine.submit(Request([1], 3, 0.0))
            drain(reply)
            if fails:
                assert str(reply.error).startswith("out of memory")
            else:
                assert reply.error is None
        assert capsys.readouterr().err.count("ended by RuntimeError: out of memory\n") == 2
        model.lm_head.weight.data[3, 3] = math.nan
        reply = engine.submit(Request([1], 3, 0.0))
        drain(reply)
        assert isinstance(reply.error, NonFinite)
        until(lambda: not engine.replies)


@pytest.mark.gpu
def test_graphs_generate_what_eager_steps_do(model, tokenizer):
    """One text at a time, since the number of rows changes how bf16 rounds; then all at once, in
    several captured sizes."""
    texts = {}
    for graphs in (False, True):
        texts[graphs] = []
        with Engine(model.cuda(), tokenizer, 8, graphs=graphs) as engine:
            for request in requests(6):
                reply = engine.submit(request)
                drain(reply)
                assert reply.error is None
                texts[graphs].append((reply.text, reply.ended))
            together = [engine.submit(request)
                        for request in requests(40, temperature=1.0, top_p=0.9)]
            for reply in together:
                drain(reply)
                assert reply.ended
                assert reply.error is None
    assert texts[True] == texts[False]


def test_too_little_memory_for_the_slots_is_bad_input(model, tokenizer):
    says = "no memory for 1,000,000,000,000 texts of 64 tokens, 32,768,000.0 GB .*: lower --slots"
    with pytest.raises(BadInput, match=says):
        Engine(model, tokenizer, 10**12)
