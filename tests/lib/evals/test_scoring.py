"""lib/evals/scoring.py against scoring one row at a time, on one and several processes:
python -m pytest tests/lib/evals/test_scoring.py"""

import math

import numpy as np
import pytest
import torch
from helpers import reference, run_together, tiny

from lib.cli import RankError
from lib.decoding import NonFinite
from lib.devices import Processes
from lib.evals.scoring import score
from train_gpt2 import GPT

ONE = Processes("cpu")


def random_pairs(n, longest=40):
    """n (context, continuation) of many lengths, shorter and longer than a window of 16; a few
    continuations are empty."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(n):
        context = rng.integers(61, size=rng.integers(1, longest)).tolist()
        continuation = rng.integers(61, size=rng.integers(0, longest)).tolist()
        pairs.append((context, continuation))
    return pairs


PAIRS = random_pairs(25)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(tiny(init="xavier", pos="rope")).eval()


@pytest.fixture(scope="module")
def expected(model):
    return [reference(model, *pair) for pair in PAIRS]


class Counting(torch.nn.Module):
    """A model that counts its forward passes."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.model(*args, **kwargs)


class OutOfMemory(Counting):
    def forward(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


@pytest.mark.parametrize("batch_tokens, batch_size", [(1, None), (60, None), (10**6, None), (1, 7)])
def test_batching_and_padding_change_nothing(batch_tokens, batch_size, model, expected):
    nats, greedy = score(model, PAIRS, ONE, batch_tokens, batch_size=batch_size)
    assert nats == pytest.approx(expected, abs=1e-3)
    is_empty = [not continuation for _, continuation in PAIRS]
    assert greedy.tolist() == is_empty  # the model is certain of nothing


def test_greedy_is_what_decoding_would_generate(model):
    context = [5, 6]
    likeliest = int(model(torch.tensor([context]))[0, -1].argmax())
    pairs = [(context, [likeliest]), (context, [likeliest - 1])]
    _, greedy = score(model, pairs, ONE, 100)
    assert greedy.tolist() == [True, False]


@pytest.mark.parametrize("world_size, batch_tokens", [
    (2, 60),
    (3, 200),
    (4, 10**6),  # one batch for four processes
])
def test_processes_work_equally_and_have_all_results(world_size, batch_tokens, model, expected):
    def work(processes):
        counting = Counting(model)
        nats, _ = score(counting, PAIRS, processes, batch_tokens)
        return counting.calls, nats

    alone = Counting(model)
    score(alone, PAIRS, ONE, batch_tokens)
    results = run_together(world_size, work)
    _, first_nats = results[0]
    for calls, nats in results:
        assert calls == math.ceil(alone.calls / world_size)
        assert nats == pytest.approx(expected, abs=1e-3)
        assert np.array_equal(nats, first_nats)


def test_all_stop_together(model):
    def work(processes):
        counting = Counting(model)
        asked = []

        def stopped():
            asked.append(None)
            return len(asked) == 3

        score(counting, PAIRS, processes, 60, stopped=stopped)
        return counting.calls, len(asked)

    assert run_together(2, work) == [(2, 3)] * 2


def test_damaged_weights_end_the_evaluation_on_every_process(model):
    broken = GPT(model.config).eval()
    broken.load_state_dict(model.state_dict())
    broken.transformer.wte.weight.data[7] = math.nan  # an id that one process alone may have
    pairs = [([1, 2], [3]), ([4, 7, 5], [6]), ([8], [9])]
    errors = run_together(2, lambda processes: score(broken, pairs, processes, 1))
    assert [type(error) for error in errors] == [NonFinite] * 2
    with pytest.raises(NonFinite):
        score(broken, pairs, ONE, 100)


def test_an_error_of_one_process_ends_all(model):
    pairs = [([1], [2])]
    with pytest.raises(torch.OutOfMemoryError):
        score(OutOfMemory(model), pairs, ONE, 100)
    errors = run_together(2, lambda processes: score(OutOfMemory(model), pairs, processes, 100))
    assert [type(error) for error in errors] == [RankError] * 2
    assert "process 1 (out of memory)" in str(errors[1])


def test_different_texts_on_two_processes_are_noticed(model):
    def work(processes):
        return score(model, [([1], [2, processes.rank])], processes, 100)

    errors = run_together(2, work)
    assert [type(error) for error in errors] == [RankError] * 2
    assert "different texts" in str(errors[0])
