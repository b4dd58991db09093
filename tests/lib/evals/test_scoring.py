"""scoring.py against likelihoods token by token: python -m pytest tests/test_scoring.py"""

import random

import pytest
import torch
from helpers import reference, tiny

from lib.decoding import generate
from lib.evals import scoring
from train_gpt2 import GPT


def score(model, pairs, batch_tokens=10**4, batch_size=None):
    nats, greedy = scoring.score(model, pairs, model.config.block_size, torch.device("cpu"), batch_tokens, batch_size)
    return list(zip(nats.tolist(), greedy.tolist()))


def random_pairs(n, vocab_size=61, window=16):
    rng = random.Random(0)

    def ids(low, high):
        return [rng.randrange(vocab_size) for _ in range(rng.randint(low, high))]

    pairs = [(ids(1, 2 * window), ids(1, window)) for _ in range(n)]
    pairs += [(ids(1, 5), ids(length, length)) for length in (window - 1, window, window + 1, 2 * window, 3 * window + 5)]
    pairs += [(ids(length, length), ids(1, 1)) for length in (window - 1, window, window + 1)]
    shared = ids(6, 6)
    return pairs + [(shared, [k]) for k in range(8)] + [(shared[:4], shared[4:] + [3])] + [(ids(2, 2), [])]


@pytest.mark.parametrize("batch_size, batch_tokens", [(None, 1), (None, 70), (None, 10**6), (1, 0), (3, 0)])
def test_score_is_the_sum_of_each_token_s_likelihood(batch_size, batch_tokens):
    model, pairs = GPT(tiny(block_size=16, init="xavier", pos="rope")).eval(), random_pairs(20)
    have = score(model, pairs, batch_tokens, batch_size)
    for (context, continuation), (nats, _) in zip(pairs, have):
        assert nats == pytest.approx(reference(model, context, continuation), abs=1e-4)
    assert have[-1] == (0, True)
    assert score(model, [([1], [])]) == [(0.0, True)] and score(model, []) == []


def test_greedy_means_that_each_token_is_the_likeliest():
    model, rng = GPT(tiny(block_size=16, init="xavier")).eval(), random.Random(1)
    prompts = [[rng.randrange(61) for _ in range(rng.randint(1, 8))] for _ in range(10)]
    written = [generate(model, torch.tensor([ids]), 6, lambda logits: logits.argmax(dim=-1, keepdim=True))[0, len(ids):].tolist()
               for ids in prompts]
    assert all(greedy for _, greedy in score(model, list(zip(prompts, written))))
    changed = [ids[:3] + [(ids[3] + 1) % 61] + ids[4:] for ids in written]
    assert not any(greedy for _, greedy in score(model, list(zip(prompts, changed))))


def test_equal_inputs_run_once():
    model, seen = GPT(tiny(block_size=16)).eval(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    score(model, [([5, 6, 7], [k]) for k in range(9)] + [([5, 6], [7, k]) for k in range(9)])
    assert seen == [(1, 3)]


def test_once_stopped_the_rest_is_left_out():
    model, asked = GPT(tiny(block_size=16)).eval(), []
    nats, _ = scoring.score(model, random_pairs(20), 16, torch.device("cpu"), 0, 4, stopped=lambda: asked.append(0) or len(asked) > 2)
    assert len(asked) == 3 and 0 < (nats != 0).sum() <= 2 * 4 + 8  # two batches of four, one input with eight answers among them
