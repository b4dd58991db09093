"""lib/evals/scoring.py against one row at a time, on one and several processes:
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


def random_pairs(n, longest=40):
    """n (context, continuation) of many lengths, on both sides of a window of 16; a few empty
    continuations."""
    rng = np.random.default_rng(0)
    return [(rng.integers(61, size=rng.integers(1, longest)).tolist(),
             rng.integers(61, size=rng.integers(0, longest)).tolist()) for _ in range(n)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(tiny(init="xavier", pos="rope")).eval()


@pytest.fixture(scope="module")
def want(model):
    return [reference(model, *pair) for pair in random_pairs(25)]


@pytest.mark.parametrize("batch_tokens, batch_size", [(1, None), (60, None), (10**6, None), (1, 7)])
def test_batching_and_padding_change_nothing(batch_tokens, batch_size, model, want):
    nats, greedy = score(model, random_pairs(25), Processes("cpu"), batch_tokens,
                         batch_size=batch_size)
    assert nats == pytest.approx(want, abs=1e-3)
    assert [not continuation
            for _, continuation in random_pairs(25)] == greedy.tolist()  # nothing is certain


def test_greedy_is_what_decoding_would_generate(model):
    context = [5, 6]
    likeliest = int(model(torch.tensor([context]))[0, -1].argmax())
    _, greedy = score(model, [(context, [likeliest]), (context, [likeliest - 1])], Processes("cpu"),
                      100)
    assert greedy.tolist() == [True, False]


class Counting(torch.nn.Module):
    """A model that counts its forward passes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.calls = model, model.config, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("world_size, batch_tokens", [(2, 60), (3, 200),
                                                      (4, 10**6)])  # the last: one batch for four
def test_every_process_works_equally_and_has_all_results(world_size, batch_tokens, model, want):
    def work(processes):
        counting = Counting(model)
        return counting, score(counting, random_pairs(25), processes, batch_tokens)

    one, results = Counting(model), run_together(world_size, work)
    score(one, random_pairs(25), Processes("cpu"), batch_tokens)
    assert {counting.calls for counting, _ in results} == {-(-one.calls // world_size)}
    for _, (nats, _) in results:
        assert nats == pytest.approx(want, abs=1e-3) and np.array_equal(nats, results[0][1][0])


def test_all_stop_together(model):
    def work(processes):
        counting, asked = Counting(model), []
        score(counting, random_pairs(25), processes, 60,
              stopped=lambda: asked.append(None) or len(asked) == 3)
        return counting.calls, len(asked)

    assert run_together(2, work) == [(2, 3)] * 2


def test_damaged_weights_end_the_evaluation_on_every_process(model):
    broken = GPT(model.config).eval()
    broken.load_state_dict(model.state_dict())
    broken.transformer.wte.weight.data[
        7] = math.nan  # only texts with this id, which one process alone may have
    pairs = [([1, 2], [3]), ([4, 7, 5], [6]), ([8], [9])]
    assert [
        type(error)
        for error in run_together(2, lambda processes: score(broken, pairs, processes, 1))
    ] == [NonFinite] * 2
    with pytest.raises(NonFinite):
        score(broken, pairs, Processes("cpu"), 100)


def test_what_one_process_meets_alone_ends_all(model):
    class OutOfMemory(Counting):
        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        score(OutOfMemory(model), [([1], [2])], Processes("cpu"), 100)
    errors = run_together(2,
                          lambda processes: score(OutOfMemory(model), [([1], [2])], processes, 100))
    assert [type(error) for error in errors
            ] == [RankError] * 2 and "process 1 (out of memory)" in str(errors[1])


def test_different_texts_on_two_processes_are_noticed(model):
    errors = run_together(
        2, lambda processes: score(model, [([1], [2, processes.rank])], processes, 100))
    assert [type(error)
            for error in errors] == [RankError] * 2 and "different texts" in str(errors[0])
