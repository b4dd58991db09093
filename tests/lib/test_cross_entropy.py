"""cross_entropy.py against torch's own logits and cross-entropy.

    python -m pytest tests/lib/test_cross_entropy.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from lib import cross_entropy
from lib.cross_entropy import LinearCrossEntropy


def linear_cross_entropy(x, weight, targets):
    return LinearCrossEntropy(0.0)(x, weight, targets)


def plain(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1, reduction="sum")


def straight(x, weight, targets):
    """The loss as its docstring defines it: a logit further above the target's than FAR counts as
    FAR above it, and its gradient passes straight through."""
    logits = F.linear(x, weight)
    above = logits - logits.gather(1, targets[:, None])
    above = above + (above.clamp(max=cross_entropy.FAR) - above).detach()
    return above.logsumexp(dim=1).sum()


def problem(n=23, vocab=31, width=12, scale=1.0):
    """x (n, width), weight (vocab, width), targets (n,): logits with a standard deviation of about
    2 x scale."""
    torch.manual_seed(0)
    x = torch.randn(n, width) * scale
    weight = torch.randn(vocab, width) * 0.6
    return x, weight, torch.randint(vocab, (n,))


def with_gradients(loss_of, x, weight, targets):
    """-> loss, gradient of x, gradient of weight."""
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    loss = loss_of(x, weight, targets)
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def close(have, want, rtol=1e-5):
    """Tolerances are relative to each tensor's largest value: a small element may be the difference
    of two large ones."""
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


@pytest.fixture
def chunk(monkeypatch):
    """chunk(n) sets how many tokens a chunk has."""
    return lambda n: monkeypatch.setattr(cross_entropy, "chunk_size", lambda weight: n)


# --------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("size", [5, 1000])
@pytest.mark.parametrize("cap", [0.7, 15.0])
def test_capped_logits_against_autograd(cap, size, chunk):
    chunk(size)
    x, weight, targets = problem()
    targets[3] = -1

    def plainly(x, weight, targets):
        z = x @ weight.T
        capped = cap * z / (z.square() + cap**2).sqrt()
        return F.cross_entropy(capped, targets, ignore_index=-1, reduction="sum")

    loss_of = LinearCrossEntropy(cap)
    close(with_gradients(loss_of, x, weight, targets), with_gradients(plainly, x, weight, targets))
    with torch.no_grad():
        want = plainly(x, weight, targets)
        torch.testing.assert_close(loss_of(x, weight, targets), want)


def scaled(loss_of, share):
    return lambda *args: loss_of(*args) * share


@pytest.mark.parametrize("ignored", [0, 1, 12, 22])
@pytest.mark.parametrize("size", [1, 2, 5, 22, 23, 24, 1000])  # 23 tokens
def test_loss_and_gradients_against_torch(size, ignored, chunk):
    chunk(size)
    x, weight, targets = problem()
    targets[torch.randperm(23)[:ignored]] = -1
    for share in (1.0, 1 / 8, -3.0):  # accumulation divides the loss
        have = with_gradients(scaled(linear_cross_entropy, share), x, weight, targets)
        want = with_gradients(scaled(plain, share), x, weight, targets)
        assert [g.dtype for g in have] == [torch.float32] * 3
        assert have[0].shape == ()
        close(have, want)
        assert not have[1][targets < 0].any()
    with torch.no_grad():
        want = plain(x, weight, targets)
        have = linear_cross_entropy(x, weight, targets)
        torch.testing.assert_close(have, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n, vocab, width", [(1, 1, 1), (1, 9, 4), (9, 1, 4), (9, 5, 1), (2, 2, 2)])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_sizes_of_one(size, n, vocab, width, chunk):
    chunk(size)
    args = problem(n, vocab, width)
    close(with_gradients(linear_cross_entropy, *args), with_gradients(plain, *args))


@pytest.mark.parametrize("size", [2, 1000])
def test_without_a_target_loss_and_gradients_are_zero(size, chunk):
    chunk(size)
    x, weight, targets = problem()
    targets.fill_(-1)
    assert not any(g.any() for g in with_gradients(linear_cross_entropy, x, weight, targets))
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets) == 0


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_gradient_of_one_alone(wanted):
    grads = []
    for loss_of in (linear_cross_entropy, plain):
        x, weight, targets = problem()
        one = x if wanted == "x" else weight
        one.requires_grad_()
        loss_of(x, weight, targets).backward()
        grads.append(one.grad)
    close(grads[:1], grads[1:])


def test_gradients_add_up_where_x_or_weight_is_used_elsewhere_too(chunk):
    chunk(7)

    def tied(loss_of):
        def loss(x, weight, targets):
            embedded = x * 2 + weight[targets].tanh()
            return loss_of(embedded, weight, targets) + x.square().mean()

        return loss

    args = problem()
    close(with_gradients(tied(linear_cross_entropy), *args), with_gradients(tied(plain), *args))


# --------------------------------------------------------------------------------------------------
# Large logits


@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_without_gradients_the_loss_is_exact_for_any_logits(scale, chunk):
    chunk(5)
    x, weight, targets = problem(scale=scale)
    with torch.no_grad():
        want = F.cross_entropy(x.double() @ weight.double().T, targets, reduction="sum").item()
        assert want > (23 * cross_entropy.FAR if scale > 1 else 0)
        assert linear_cross_entropy(x, weight, targets).item() == pytest.approx(want, rel=1e-6)
    with torch.inference_mode():
        assert linear_cross_entropy(x, weight, targets).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("scale", [30, 1000])
def test_logits_far_above_the_targets_have_a_finite_loss_that_can_be_reduced(scale, chunk):
    chunk(5)
    x, weight, targets = problem(scale=scale)
    loss, dx, dweight = with_gradients(linear_cross_entropy, x, weight, targets)
    assert 0 < loss < 23 * (cross_entropy.FAR + math.log(31) + 1e-3)
    close((loss, dx, dweight), with_gradients(straight, x, weight, targets), rtol=1e-4)
    with torch.no_grad():
        before = plain(x, weight, targets)
        lower_x = x - 1e-2 * x.norm() * dx / dx.norm()
        lower_weight = weight - 1e-2 * weight.norm() * dweight / dweight.norm()
        assert plain(lower_x, weight, targets) < before
        assert plain(x, lower_weight, targets) < before


def test_logits_far_below_the_targets_leave_nothing_to_learn(chunk):
    chunk(5)
    _, weight, targets = problem()
    weight = F.normalize(weight)
    x = weight[targets] * 1000
    for value in with_gradients(linear_cross_entropy, x, weight, targets):
        assert value.abs().max() < 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_non_finite_values_show_in_the_loss_or_the_gradients(where, value):
    x, weight, targets = problem()
    changed = x if where == "x" else weight
    changed[3, 4] = value
    results = with_gradients(linear_cross_entropy, x, weight, targets)
    assert not all(g.isfinite().all() for g in results)


# --------------------------------------------------------------------------------------------------
# Low precision, compilation, memory


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_under_autocast_gradients_are_about_as_good_as_torchs(chunks, chunk):
    chunk(512 // chunks)
    x, weight, targets = problem(512, 300, 64, scale=0.3)

    def low(loss_of):
        def loss(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return loss_of(*args)
        return loss

    exact = with_gradients(plain, x, weight, targets)
    ours = with_gradients(low(linear_cross_entropy), x, weight, targets)
    torchs = with_gradients(low(plain), x, weight, targets)
    assert [g.dtype for g in ours] == [torch.float32] * 3
    assert ours[0].item() == pytest.approx(torchs[0].item(), rel=1e-4)
    for a, b, want in zip(ours[1:], torchs[1:], exact[1:]):
        assert 0 < (a - want).norm() < 1.5 * (b - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_in_fp16_gradients_are_better_than_in_bf16(cap, chunks, chunk):
    """Also those of a token that is unlikely by more than fp16 spans."""
    chunk(512 // chunks)
    x, weight, targets = problem(512, 300, 64)
    targets[7] = (x[7] @ weight.T).argmin()

    def low(dtype):
        def loss(*args):
            with torch.autocast("cpu", dtype):
                return LinearCrossEntropy(cap)(*args)
        return loss

    exact = with_gradients(LinearCrossEntropy(cap), x, weight, targets)
    fp16 = with_gradients(low(torch.float16), x, weight, targets)
    bf16 = with_gradients(low(torch.bfloat16), x, weight, targets)
    assert exact[0] > 500 * math.log(65_504) / 4
    assert fp16[0].item() == pytest.approx(exact[0].item(), rel=1e-4)
    for a, b, want in zip(fp16[1:], bf16[1:], exact[1:], strict=True):
        assert (a - want).norm() < 0.5 * (b - want).norm()


def test_in_fp16_a_large_batch_does_not_overflow(chunk):
    """All tokens have the same target and x, so that their gradients add up."""
    n = 2**16
    chunk(n)
    x = torch.full((n, 8), 3.0)
    weight = torch.zeros(64, 8)
    targets = torch.zeros(n, dtype=torch.long)

    def mean_loss(*args):
        with torch.autocast("cpu", torch.float16):
            return linear_cross_entropy(*args) / n

    _, _, dweight = with_gradients(mean_loss, x, weight, targets)
    assert dweight[0].tolist() == pytest.approx([-3 * 63 / 64] * 8, rel=1e-3)


def graphs():
    return counters["stats"]["unique_graphs"]


# inductor builds C++ kernels, 10 s of CPU time
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_compiled_is_as_eager_and_one_graph_serves_all_chunks(backend, cap, chunk):
    chunk(6)
    torch._dynamo.reset()
    x, weight, targets = problem(24)
    targets[3] = -1
    before = graphs()
    eager = LinearCrossEntropy(cap)
    compiled = LinearCrossEntropy(cap)
    compiled.compile(fullgraph=True, dynamic=False, backend=backend)
    have = with_gradients(compiled, x, weight, targets)
    close(have, with_gradients(eager, x, weight, targets))
    assert graphs() == before + 1
    evaluated = compiled.eval()(x.requires_grad_(), weight, targets)
    torch.testing.assert_close(evaluated, eager(x, weight, targets).detach())
    assert not evaluated.requires_grad
    assert graphs() == before + 2


@pytest.mark.parametrize("n, sizes", [
    (24, [6] * 4), (25, [5] * 5), (7, [4, 3]), (23, [6, 6, 6, 5]), (5, [5])])
def test_chunks_have_equal_sizes_where_that_is_possible(n, sizes, chunk):
    chunk(6)
    x, weight, _ = problem(n)
    assert [len(part) for part, in cross_entropy._chunks(weight, x)] == sizes


class Sizes(TorchDispatchMode):
    """Context that records the number of elements of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.seen.append(leaf.numel())
        return made


def largest_tensor(loss_of, gradients):
    """Elements of the largest tensor made for 24 tokens of width 8, 31 ids."""
    args = problem(24, 31, 8)
    with Sizes() as made, torch.set_grad_enabled(gradients):
        if gradients:
            with_gradients(loss_of, *args)
        else:
            loss_of(*args)
    return max(made.seen)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_logits_of_all_tokens_never_exist(gradients, chunk):
    chunk(1000)
    assert largest_tensor(plain, gradients) == 24 * 31
    assert largest_tensor(linear_cross_entropy, gradients) == 24 * 31
    chunk(5)
    assert largest_tensor(linear_cross_entropy, gradients) == max(5 * 31, 31 * 8)
