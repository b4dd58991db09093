"""cross_entropy.py against torch's own logits and cross-entropy: python -m pytest
tests/lib/test_cross_entropy.py"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from lib import cross_entropy
from lib.cross_entropy import LinearCrossEntropy


def linear_cross_entropy(x, weight, targets, cap=0.0):
    return LinearCrossEntropy(cap)(x, weight, targets)


def plain(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1, reduction="sum")


def straight(x, weight, targets):
    """The loss as its docstring has it: a logit too far above the target's counts as FAR above it,
    and passes its gradient on."""
    above = F.linear(x, weight) - F.linear(x, weight).gather(1, targets[:, None])
    above = above + (above.clamp(max=cross_entropy.FAR) - above).detach()
    return above.logsumexp(dim=1).sum()


def problem(n=23, vocab=31, width=12, scale=1.0):
    """x (n, width), weight (vocab, width), targets (n,): logits of a standard deviation of about 2
    x scale."""
    torch.manual_seed(0)
    return torch.randn(n, width) * scale, torch.randn(vocab, width) * 0.6, torch.randint(
        vocab, (n,))


def with_gradients(loss_of, x, weight, targets):
    """-> loss, gradient of x, gradient of weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = loss_of(x, weight, targets)
    loss.backward()
    return loss.detach(), x.grad, weight.grad


def close(have, want, rtol=1e-5):
    """Each tensor by its own largest value: a single small element may be the rest of two large
    ones."""
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


@pytest.fixture
def chunk(monkeypatch):
    """Sets the size of chunks."""
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
        return F.cross_entropy(cap * z / (z.square() + cap**2).sqrt(), targets, ignore_index=-1,
                               reduction="sum")

    close(with_gradients(lambda *args: linear_cross_entropy(*args, cap), x, weight, targets),
          with_gradients(plainly, x, weight, targets))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, cap),
                                   plainly(x, weight, targets))


@pytest.mark.parametrize("ignored", [0, 1, 12, 22])
@pytest.mark.parametrize("size", [1, 2, 5, 22, 23, 24, 1000])  # 23 tokens
def test_loss_and_gradients_against_torch(size, ignored, chunk):
    chunk(size)
    x, weight, targets = problem()
    targets[torch.randperm(23)[:ignored]] = -1
    for share in (1.0, 1 / 8, -3.0):  # accumulation divides the loss
        have, want = (with_gradients(lambda *args, f=f, share=share: f(*args) * share, x, weight,
                                     targets) for f in (linear_cross_entropy, plain))
        assert [g.dtype for g in have] == [torch.float32] * 3 and have[0].shape == ()
        close(have, want)
    assert not have[1][targets < 0].any()
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets),
                                   plain(x, weight, targets), rtol=1e-6, atol=0)


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
    assert [
        g.count_nonzero().item() for g in with_gradients(linear_cross_entropy, x, weight, targets)
    ] == [0, 0, 0]
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets) == 0


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_gradient_of_one_alone(wanted):
    (x, weight, targets), grads = problem(), []
    for loss_of in (linear_cross_entropy, plain):
        one = (x if wanted == "x" else weight).clone().requires_grad_()
        loss_of(*((one, weight) if wanted == "x" else (x, one)), targets).backward()
        grads.append(one.grad)
    close(grads[:1], grads[1:])


def test_gradients_add_up_where_x_or_weight_is_used_elsewhere_too(chunk):
    chunk(7)

    def tied(loss_of):
        return lambda x, weight, targets: loss_of(x * 2 + weight[targets].tanh(), weight, targets
                                                  ) + x.square().mean()

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
def test_logits_far_above_the_targets_give_a_finite_loss_and_a_way_down(scale, chunk):
    chunk(5)
    x, weight, targets = problem(scale=scale)
    loss, dx, dweight = with_gradients(linear_cross_entropy, x, weight, targets)
    assert 0 < loss < 23 * (cross_entropy.FAR + math.log(31) + 1e-3)
    close((loss, dx, dweight), with_gradients(straight, x, weight, targets), rtol=1e-4)
    with torch.no_grad():
        before = plain(x, weight, targets)
        down = [a - 1e-2 * a.norm() * b / b.norm() for a, b in ((x, dx), (weight, dweight))]
        assert plain(down[0], weight, targets) < before and plain(x, down[1], targets) < before


def test_logits_far_below_the_targets_leave_nothing_to_learn(chunk):
    chunk(5)
    _, weight, targets = problem()
    weight = F.normalize(weight)
    loss, dx, dweight = with_gradients(linear_cross_entropy, weight[targets] * 1000, weight,
                                       targets)
    assert loss == pytest.approx(0,
                                 abs=1e-6) and dx.abs().max() < 1e-6 and dweight.abs().max() < 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_what_is_not_finite_shows_in_the_loss_or_the_gradients(where, value):
    x, weight, targets = problem()
    (x if where == "x" else weight)[3, 4] = value
    assert not all(g.isfinite().all()
                   for g in with_gradients(linear_cross_entropy, x, weight, targets))


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
    ours, torchs = (with_gradients(low(f), x, weight, targets)
                    for f in (linear_cross_entropy, plain))
    assert [g.dtype for g in ours] == [torch.float32] * 3
    assert ours[0].item() == pytest.approx(torchs[0].item(), rel=1e-4)
    for a, b, want in zip(ours[1:], torchs[1:], exact[1:]):
        assert 0 < (a - want).norm() < 1.5 * (b - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("backend, cap", [("inductor", 15.0), ("aot_eager", 0.0)])
def test_compiled_is_as_eager_and_one_graph_serves_all_chunks(backend, cap, chunk):
    chunk(6)
    torch._dynamo.reset()
    x, weight, targets = problem(24)
    targets[3] = -1
    graphs = counters["stats"]["unique_graphs"]
    compiled = LinearCrossEntropy(cap)
    compiled.compile(fullgraph=True, dynamic=False, backend=backend)
    close(with_gradients(compiled, x, weight, targets),
          with_gradients(LinearCrossEntropy(cap), x, weight, targets))
    assert counters["stats"]["unique_graphs"] == graphs + 1
    evaluated = compiled.eval()(x.requires_grad_(), weight, targets)
    torch.testing.assert_close(evaluated, linear_cross_entropy(x, weight, targets, cap).detach())
    assert not evaluated.requires_grad and counters["stats"]["unique_graphs"] == graphs + 2


@pytest.mark.parametrize("n, sizes", [(24, [6] * 4), (25, [5] * 5), (7, [4, 3]), (23, [6, 6, 6, 5]),
                                      (5, [5])])
def test_chunks_have_one_size_where_there_is_one(n, sizes, chunk):
    chunk(6)
    x, weight, _ = problem(n)
    assert [len(part) for part, in cross_entropy._chunks(weight, x)] == sizes


class Sizes(TorchDispatchMode):
    """Elements of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.seen += [
            t.numel() for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor)
        ]
        return made


@pytest.mark.parametrize("gradients", [True, False])
def test_the_logits_of_all_tokens_never_exist(gradients, chunk):
    args, sizes = problem(24, 31, 8), {}
    for name, loss_of, size in (("plain", plain, 1000), ("whole", linear_cross_entropy, 1000),
                                ("chunks", linear_cross_entropy, 5)):
        chunk(size)
        with Sizes() as made, torch.set_grad_enabled(gradients):
            with_gradients(loss_of, *args) if gradients else loss_of(*args)
        sizes[name] = max(made.seen)
    assert sizes == {"plain": 24 * 31, "whole": 24 * 31, "chunks": max(5 * 31, 31 * 8)}
