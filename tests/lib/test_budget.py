"""Steps, tokens and hours of a run: python -m pytest tests/lib/test_budget.py"""

from types import SimpleNamespace

import pytest

from lib.budget import (
    batch_size,
    context_length,
    contexts,
    hours_and_dollars,
    only_length,
    steps_in,
    steps_of,
    tokens_of,
    work_of,
)
from lib.cli import BadInput
from train_gpt2 import GPT, GPTConfig


def length(tokens, batch=256, epochs=1.0, max_steps=None, ratio=None, parameters=None):
    cfg = SimpleNamespace(max_steps=max_steps, minutes=None, epochs=epochs, tokens_per_param=ratio,
                          total_batch_size=batch, batch_warmup=0)
    return steps_of(cfg, tokens, parameters)


def test_steps_are_given_or_follow_from_epochs():
    assert length(10_000_000_000, 524_288) == 19_073  # build-nanogpt's
    assert length(2560) == 10
    assert length(2559) == 9
    assert length(2560, epochs=2.5) == 25
    assert length(2560, max_steps=7) == 7


def test_a_run_may_begin_with_half_batches():
    cfg = SimpleNamespace(total_batch_size=256, batch_warmup=1000)
    # 7 halves are 896 of the 1,000 tokens
    assert [batch_size(step, cfg) for step in (0, 6, 7, 99)] == [128, 128, 256, 256]
    assert [tokens_of(steps, cfg) for steps in (0, 6, 7, 10)] == [0, 768, 896, 1664]
    tokens = (0, 767, 768, 896, 1151, 1152, 1664)
    assert [steps_in(n, cfg) for n in tokens] == [0, 5, 6, 7, 7, 8, 10]


def test_a_run_may_begin_with_a_quarter_and_a_half_of_the_context():
    cfg = SimpleNamespace(context_warmup=0.5)
    contexts = [context_length(step, 8, cfg, 64) for step in range(9)]
    assert contexts == [16, 16, 32, 32, 64, 64, 64, 64, 64]
    assert context_length(0, 8, SimpleNamespace(context_warmup=0.0), 64) == 64


@pytest.mark.parametrize("context_warmup", [0.0, 0.3, 0.75, 1.0])
def test_work_is_the_sum_of_the_flops_of_steps(context_warmup):
    cfg = SimpleNamespace(total_batch_size=256, batch_warmup=1000, context_warmup=context_warmup)
    costs = dict(zip(contexts(64), (3.0, 4.0, 6.0), strict=True))
    steps = 23
    work = 0.0
    for step in range(steps):
        assert work_of(step, steps, cfg, tuple(costs.values())) == work
        work += batch_size(step, cfg) * costs[context_length(step, steps, cfg, 64)]
    assert work_of(steps, steps, cfg, tuple(costs.values())) == work


@pytest.mark.parametrize("tokens, epochs, says", [
    (255, 1.0, "too few for steps of 256: raise --epochs or lower"),
    (2560, 0.01, "too few for steps of 256: raise --epochs or lower"),
    (2560, 1e300, "too many steps of 256: lower --epochs or raise"),
    (10**15, 1.0, "too many steps of 256: lower --epochs or raise")])
def test_a_run_without_a_step_or_with_too_many_is_refused(tokens, epochs, says):
    with pytest.raises(BadInput, match=f"are {says} --total_batch_size"):
        length(tokens, epochs=epochs)


def test_tokens_per_parameter_count_the_embeddings():
    """Chinchilla itself: 70B parameters on 1.4T tokens (Hoffmann et al. 2022, table 1).
    GPT-2: 124,475,904 with the padded embeddings."""
    chinchilla = length(10**10, batch=2**20, ratio=20, parameters=70 * 10**9)
    assert chinchilla == 1_400_000_000_000 // 2**20
    gpt2 = GPT(GPTConfig()).parameter_counts()["total"]
    assert length(10**10, batch=524_288, ratio=20, parameters=gpt2) == 20 * 124_475_904 // 524_288
    with pytest.raises(BadInput, match="too few for steps of 256: raise --tokens_per_param"):
        length(10**10, ratio=0.001, parameters=1000)
    with pytest.raises(BadInput, match="write vocab_size into the meta.json"):
        length(10**10, ratio=20)


def test_a_flag_that_sets_the_length_replaces_that_of_a_preset_or_checkpoint():
    assert only_length({"max_lr"}) == {}
    assert only_length({"epochs"}) == dict.fromkeys(("max_steps", "minutes", "tokens_per_param"))
    assert only_length({"minutes"}) == dict.fromkeys(("max_steps", "tokens_per_param"))


def test_hours_and_dollars():
    assert hours_and_dollars(5400, None) == "90.0 minutes"
    assert hours_and_dollars(9000, 2.5) == "2.50 hours, $6.25 at $2.5 per hour"
