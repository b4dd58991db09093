"""Muon against torch.optim.Muon, AdamW against torch.optim.AdamW, two processes against one.

    python -m pytest tests/lib/test_muon.py
"""

import copy
import io
import math

import pytest
import torch
from helpers import ROOT

from lib import muon
from lib.muon import NEWTON_SCHULZ, POLAR_EXPRESS, Muon, low_precision, orthogonalize

SHAPES = {
    "c_attn": (48, 16), "c_fc": (64, 16), "c_proj": (16, 64), "experts": (3, 24, 16),
    "wte": (40, 16), "norm": (16,)
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(seed=0, names=tuple(SHAPES)):
    """dict: name -> parameter, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name in names:
        params[name] = torch.nn.Parameter(torch.randn(SHAPES[name], generator=generator))
    return params


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def optimizer_of(params, **changes):
    """All of SHAPES, as train_gpt2.py would group them: fused, plain and expert matrices,
    embeddings, vectors."""
    matrices = dict(kind="muon", lr=0.02, weight_decay=0.1) | changes
    return Muon([
        dict(params=[params["c_attn"]], splits=3, **matrices),
        dict(params=[params["experts"]], splits=2, **matrices),
        dict(params=[params["c_fc"], params["c_proj"]], **matrices),
        dict(params=[params["wte"]], kind="adamw", lr=0.3, weight_decay=0.01, betas=(0.8, 0.95)),
        dict(params=[params["norm"]], kind="adamw", lr=0.01)
    ])


def train(optimizer, params, steps, prepare=False):
    """Make the updates `steps`, a range, with a learning rate that changes."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / 10)
        set_gradients(params.values(), step)
        if prepare:
            optimizer.prepare()
        optimizer.step()


def assert_same(ours, theirs, **tolerance):
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], msg=lambda text, name=name: f"{name}: {text}",
                                   **tolerance)


# --------------------------------------------------------------------------------------------------
# The iteration


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 96, 32), (2, 32, 96)])
def test_polar_express_is_orthogonal(shape):
    """Singular values in [1e-3, 1] come out close to 1, and the singular vectors stay."""
    U, _, Vt = torch.linalg.svd(randn(*shape), full_matrices=False)
    values = torch.logspace(-2.9, 0, U.size(-1))
    X = orthogonalize(U * values @ Vt * 7.0 / values.norm())  # any scale: it is normalized
    inside = values > 1e-3 * values.norm() * 1.01
    assert inside.sum() > 25
    S = U.mT @ X @ Vt.mT
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(S, torch.diag_embed(diagonal), atol=1e-4, rtol=0)
    assert diagonal[:, inside].min() > 0.85
    assert diagonal.max() < 1.15


def test_polar_express_in_bf16():
    S = torch.linalg.svdvals(orthogonalize(randn(2, 64, 128).bfloat16()).float())
    assert S.min() > 0.8
    assert S.max() < 1.2


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_fp16_is_closer_than_bf16(size):
    """Also for gradients that fp16 cannot represent."""
    X = randn(2, 192, 384) * size
    exact = orthogonalize(X)
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        errors[dtype] = (orthogonalize(low_precision(X, dtype)).float() - exact).norm()
    assert 0 < errors[torch.float16] < 0.5 * errors[torch.bfloat16]
    assert errors[torch.bfloat16] < 0.1 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_matrix_stays_zero(dtype):
    assert orthogonalize(low_precision(torch.zeros(1, 4, 8), dtype)).abs().max() == 0


@pytest.mark.parametrize("coefficients", [POLAR_EXPRESS, NEWTON_SCHULZ])
def test_batch_equals_loop(coefficients):
    X = randn(5, 48, 16)
    loop = torch.stack([orthogonalize(x[None], coefficients)[0] for x in X])
    torch.testing.assert_close(orthogonalize(X, coefficients), loop, atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# The optimizer


@pytest.mark.parametrize("momentum", [0.95, 0.8])
def test_muon_equals_torch(momentum, monkeypatch):
    # torch computes in bf16 on any device, this Muon in fp32 on a CPU
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    names = ("c_fc", "c_proj", "wte")  # tall, wide, neither
    ours = parameters(names=names)
    theirs = parameters(names=names)
    flags = dict(lr=0.02, weight_decay=0.1, momentum=momentum)
    train(Muon([dict(kind="muon", params=list(ours.values()), **flags)], NEWTON_SCHULZ), ours,
          range(5))
    train(torch.optim.Muon(theirs.values(), adjust_lr_fn="original", **flags), theirs, range(5))
    assert_same(ours, theirs, atol=1e-6, rtol=1e-5)


def test_adamw_equals_torch():
    ours = parameters()
    theirs = parameters()
    flags = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    train(Muon([dict(kind="adamw", params=list(ours.values()), **flags)]), ours, range(5))
    train(torch.optim.AdamW(theirs.values(), **flags), theirs, range(5))
    assert_same(ours, theirs, atol=1e-6, rtol=1e-5)


def test_splits_are_separate_matrices():
    """c_attn with three splits is updated as q, k and v would be, each scaled by its own shape;
    experts likewise."""
    whole = parameters(names=("c_attn", "experts"))

    def blocks(tensors):
        c_attn, experts = tensors
        return [*c_attn.split(16), *experts.flatten(0, 1).split(12)]

    weights = [p.detach() for p in whole.values()]
    parts = [torch.nn.Parameter(block.clone()) for block in blocks(weights)]
    flags = dict(kind="muon", lr=0.02, weight_decay=0.1)
    fused = Muon([dict(params=[whole["c_attn"]], splits=3, **flags),
                  dict(params=[whole["experts"]], splits=2, **flags)])
    apart = Muon([dict(params=parts, **flags)])
    for step in range(3):
        set_gradients(whole.values(), step)
        gradients = [p.grad for p in whole.values()]
        for part, block in zip(parts, blocks(gradients), strict=True):
            part.grad = block.clone()
        fused.step()
        apart.step()
    for block, part in zip(blocks(whole.values()), parts, strict=True):
        torch.testing.assert_close(block, part, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows, cols", [(64, 16), (16, 64)])
def test_update_has_unit_scale(rows, cols):
    """The root mean square of a step is lr * sqrt(max(1, rows / cols) / max(rows, cols)) for
    gradients of any scale."""
    p = torch.nn.Parameter(torch.zeros(rows, cols))
    p.grad = 1e-3 * randn(rows, cols)
    Muon([dict(kind="muon", params=[p], lr=1.0)]).step()
    want = (max(1, rows / cols) / max(rows, cols))**0.5
    assert p.square().mean().sqrt().item() == pytest.approx(want, rel=0.1)
    assert (p * p.grad).sum() < 0  # downhill


def test_parameters_without_a_gradient_are_left_alone():
    params = parameters()
    before = copy.deepcopy(params)
    optimizer = optimizer_of(params)
    set_gradients(params.values(), 0)
    params["c_proj"].grad = params["norm"].grad = None
    optimizer.step()
    for name, p in params.items():
        assert torch.equal(p, before[name]) == (p.grad is None), name


def test_a_prepared_step_that_is_not_taken_changes_nothing():
    params = parameters()
    optimizer = optimizer_of(params)
    train(optimizer, params, range(2))
    straight = copy.deepcopy(params)
    other = optimizer_of(straight)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients(params.values(), 2)
    params["c_proj"].grad[:] = math.nan
    optimizer.prepare()
    optimizer.zero_grad()
    assert_same(params, straight, atol=0, rtol=0)
    fresh = optimizer_of(params)
    set_gradients(params.values(), 2)
    fresh.prepare()
    assert not fresh.state_dict()["state"]
    train(optimizer, params, range(2, 4), prepare=True)
    train(other, straight, range(2, 4))
    assert_same(params, straight, atol=0, rtol=0)


@pytest.mark.parametrize("shape, splits", [((48, 16), 5), ((16,), 1)])
def test_rows_that_do_not_split_are_refused(shape, splits):
    p = torch.nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match="split"):
        Muon([dict(kind="muon", params=[p], lr=0.1, splits=splits)])


def test_state_dict_continues_exactly():
    straight = parameters()
    train(optimizer_of(straight), straight, range(6))
    stopped = parameters()
    first = optimizer_of(stopped)
    train(first, stopped, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "model": dict(stopped)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = {name: torch.nn.Parameter(p.detach()) for name, p in saved["model"].items()}
    second = optimizer_of(resumed)
    second.load_state_dict(saved["optimizer"])
    train(second, resumed, range(3, 6))
    assert_same(resumed, straight, atol=0, rtol=0)


@pytest.mark.gpu
def test_a_step_on_a_gpu_has_no_sync(monkeypatch):
    """Its result is within bf16 of the CPU's."""
    results = []
    for device in ("cpu", "cuda"):
        params = {}
        gradients = parameters(seed=1)
        for name, p in parameters().items():
            params[name] = torch.nn.Parameter(p.detach().to(device))
            params[name].grad = gradients[name].detach().to(device)
        optimizer = optimizer_of(params)
        optimizer.step()  # makes the state
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append({name: p.detach().cpu() for name, p in params.items()})
    assert_same(results[1], results[0], atol=2e-3, rtol=0)  # a step is about 0.02 / 4 per entry


# --------------------------------------------------------------------------------------------------
# Two processes


def detached(params):
    return {name: p.detach().clone() for name, p in params.items()}


def resume(saved, steps):
    """Train parameters and optimizer from a saved state -> the same kind of state."""
    params = {name: torch.nn.Parameter(p.clone()) for name, p in saved["model"].items()}
    optimizer = optimizer_of(params)
    if "optimizer" in saved:  # a copy: load_state_dict keeps the tensors that it gets
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    train(optimizer, params, steps)
    return {"model": detached(params), "optimizer": optimizer.state_dict()}


def record_batches():
    """-> a list that grows by the number of matrices in each call of `orthogonalize`."""
    sizes = []

    def recorded(X, coefficients):
        sizes.append(len(X))
        return orthogonalize(X, coefficients)

    muon.orthogonalize = recorded
    return sizes


RANK = f"""
import sys, warnings
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(ROOT / "tests" / "lib")!r}]
import torch
import torch.distributed as dist
from test_muon import record_batches, resume
warnings.simplefilter("error", FutureWarning)  # each process would print it
dist.init_process_group("gloo")
start, middle = torch.load("states.pt")
sizes = record_batches()
states = [resume(start, range(3)), resume(middle, range(3, 6)), sizes]
torch.save(states, f"{{dist.get_rank()}}.pt")
dist.destroy_process_group()
"""


def assert_same_states(ours, theirs):
    assert_same(ours["model"], theirs["model"], atol=1e-6, rtol=1e-5)
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    for key, state in theirs["optimizer"]["state"].items():
        assert_same(ours["optimizer"]["state"][key], state, atol=1e-6, rtol=1e-5)


def test_two_processes_equal_one_and_share_the_work(launch, tmp_path, monkeypatch):
    """The same parameters and state under 1 and 2 processes; each continues with the other's state.
    """
    monkeypatch.setattr(muon, "orthogonalize", orthogonalize)
    sizes = record_batches()
    start = {"model": detached(parameters())}
    middle = resume(start, range(3))
    end = resume(middle, range(3, 6))
    whole = list(sizes)
    torch.save((start, middle), tmp_path / "states.pt")
    (tmp_path / "rank.py").write_text(RANK)
    done = launch(tmp_path / "rank.py", processes=2)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        two_middle, two_end, shares = torch.load(tmp_path / f"{rank}.pt")
        assert shares == [-(-size // 2) for size in whole]
        assert sum(shares) < sum(whole)
        assert_same_states(two_middle, middle)
        assert_same_states(two_end, end)
        assert_same_states(resume(two_middle, range(3, 6)), end)
