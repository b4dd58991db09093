"""Muon against torch.optim.Muon, AdamW against torch.optim.AdamW, two processes against one.

    python -m pytest tests/lib/test_muon.py
"""

import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lib import muon
from lib.muon import NEWTON_SCHULZ, POLAR_EXPRESS, Muon, orthogonalize

SHAPES = dict(c_attn=(48, 16), c_fc=(64, 16), c_proj=(16, 64), experts=(3, 24, 16), wte=(40, 16),
              norm=(16,))


def parameters(seed=0, names=tuple(SHAPES)):
    """dict: name -> parameter, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(SHAPES[name], generator=generator)) for name in names
    }


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def optimizer_of(params, **changes):
    """All of SHAPES, as train_gpt2.py would group them: fused, plain and expert matrices,
    embeddings, vectors."""
    muon = dict(kind="muon", lr=0.02, weight_decay=0.1) | changes
    return Muon([
        dict(params=[params["c_attn"]], splits=3, **muon),
        dict(params=[params["experts"]], splits=2, **muon),
        dict(params=[params["c_fc"], params["c_proj"]], **muon),
        dict(params=[params["wte"]], kind="adamw", lr=0.3, weight_decay=0.01, betas=(0.8, 0.95)),
        dict(params=[params["norm"]], kind="adamw", lr=0.01)
    ])


def train(optimizer, params, steps):
    """Updates number `steps`, a range, with a learning rate that changes."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / 10)
        set_gradients(params.values(), step)
        optimizer.step()


def assert_same(ours, theirs, **tolerance):
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], msg=lambda text, name=name: f"{name}: {text}",
                                   **tolerance)


# -- the iteration --

@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 96, 32), (2, 32, 96)])
def test_polar_express_is_orthogonal(shape):
    """Every singular value of [1e-3, 1] comes out close to 1, the singular vectors stay."""
    U, _, Vt = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)),
                                full_matrices=False)
    values = torch.logspace(-2.9, 0, U.size(-1))
    X = orthogonalize(U * values @ Vt * 7.0 / values.norm())           # any scale: it is normalized
    inside = values > 1e-3 * values.norm() * 1.01
    assert inside.sum() > 25
    S = U.mT @ X @ Vt.mT
    torch.testing.assert_close(S, torch.diag_embed(S.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)
    S = S.diagonal(dim1=-2, dim2=-1)
    assert S[:, inside].min() > 0.85 and S.max() < 1.15


def test_polar_express_in_bf16():
    X = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0))
    S = torch.linalg.svdvals(orthogonalize(X.bfloat16()).float())
    assert S.min() > 0.8 and S.max() < 1.2


def test_zero_matrix_stays_zero():
    assert orthogonalize(torch.zeros(1, 4, 8)).abs().max() == 0


@pytest.mark.parametrize("coefficients", [POLAR_EXPRESS, NEWTON_SCHULZ])
def test_batch_equals_loop(coefficients):
    X = torch.randn(5, 48, 16, generator=torch.Generator().manual_seed(0))
    loop = torch.stack([orthogonalize(x[None], coefficients)[0] for x in X])
    torch.testing.assert_close(orthogonalize(X, coefficients), loop, atol=1e-6, rtol=1e-5)


# -- the optimizer --

@pytest.mark.parametrize("momentum", [0.95, 0.8])
def test_muon_equals_torch(momentum, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16",
                        torch.Tensor.clone)  # torch takes bf16 on any device, we fp32 on CPU
    names = ("c_fc", "c_proj", "wte")                                  # tall, wide, neither
    ours, theirs = parameters(names=names), parameters(names=names)
    flags = dict(lr=0.02, weight_decay=0.1, momentum=momentum)
    train(Muon([dict(kind="muon", params=list(ours.values()), **flags)], NEWTON_SCHULZ), ours,
          range(5))
    train(torch.optim.Muon(theirs.values(), adjust_lr_fn="original", **flags), theirs, range(5))
    assert_same(ours, theirs, atol=1e-6, rtol=1e-5)


def test_adamw_equals_torch():
    ours, theirs = parameters(), parameters()
    flags = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    train(Muon([dict(kind="adamw", params=list(ours.values()), **flags)]), ours, range(5))
    train(torch.optim.AdamW(theirs.values(), **flags), theirs, range(5))
    assert_same(ours, theirs, atol=1e-6, rtol=1e-5)


def test_splits_are_separate_matrices():
    """One c_attn in three parts is q, k and v in a matrix each, scaled by their own shape; experts
    likewise."""
    whole = parameters(names=("c_attn", "experts"))

    def blocks(tensors):
        c_attn, experts = tensors
        return [*c_attn.split(16), *experts.flatten(0, 1).split(12)]

    parts = [
        torch.nn.Parameter(block.clone()) for block in blocks([p.detach() for p in whole.values()])
    ]
    flags = dict(kind="muon", lr=0.02, weight_decay=0.1)
    fused = Muon([dict(params=[whole["c_attn"]], splits=3, **flags),
                  dict(params=[whole["experts"]], splits=2, **flags)])
    apart = Muon([dict(params=parts, **flags)])
    for step in range(3):
        set_gradients(whole.values(), step)
        for part, block in zip(parts, blocks([p.grad for p in whole.values()]), strict=True):
            part.grad = block.clone()
        fused.step()
        apart.step()
    for block, part in zip(blocks(whole.values()), parts, strict=True):
        torch.testing.assert_close(block, part, atol=1e-6, rtol=1e-5)


def test_update_has_unit_scale():
    """The root mean square of a step is lr * sqrt(max(1, rows / cols) / max(rows, cols)), whatever
    the gradient's."""
    for rows, cols in ((64, 16), (16, 64)):
        p = torch.nn.Parameter(torch.zeros(rows, cols))
        p.grad = 1e-3 * torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
        Muon([dict(kind="muon", params=[p], lr=1.0)]).step()
        assert p.square().mean().sqrt().item() == pytest.approx(
            (max(1, rows / cols) / max(rows, cols))**0.5, rel=0.1)
        assert (p * p.grad).sum() < 0                                   # downhill


def test_gradients_and_others_are_left_alone():
    params = parameters()
    optimizer, before = optimizer_of(params), copy.deepcopy(params)
    set_gradients(params.values(), 0)
    params["c_proj"].grad = params["norm"].grad = None
    grads = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
    optimizer.step()
    for name, p in params.items():
        assert torch.equal(p, before[name]) == (name not in grads), name
        assert name not in grads or torch.equal(p.grad, grads[name]), name


def test_rows_that_do_not_split_are_refused():
    for shape, splits in (((48, 16), 5), ((16,), 1)):
        with pytest.raises(ValueError, match="split"):
            Muon([
                dict(kind="muon", params=[torch.nn.Parameter(torch.zeros(shape))], lr=0.1,
                     splits=splits)
            ])


def test_state_dict_continues_exactly():
    straight, stopped = parameters(), parameters()
    train(optimizer_of(straight), straight, range(6))
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
def test_gpu_step_waits_for_nothing():
    """No device sync in a step, whose result is within bf16 of the CPU's result."""
    results = []
    for device in ("cpu", "cuda"):
        params = {
            name: torch.nn.Parameter(p.detach().to(device)) for name, p in parameters().items()
        }
        optimizer = optimizer_of(params)
        gradients = parameters(seed=1)
        for name, p in params.items():
            p.grad = gradients[name].detach().to(device)
        optimizer.step()  # makes the state
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        results.append({name: p.detach().cpu() for name, p in params.items()})
    for result in results[1:]:
        assert_same(result, results[0], atol=2e-3, rtol=0)  # a step is about 0.02 / 4 an entry


# -- two processes --

def detached(params):
    return {name: p.detach().clone() for name, p in params.items()}


def go_on(saved, steps):
    """Parameters and optimizer of a saved state, trained further -> the same kind of state."""
    params = {name: torch.nn.Parameter(p.clone()) for name, p in saved["model"].items()}
    optimizer = optimizer_of(params)
    if "optimizer" in saved:
        optimizer.load_state_dict(copy.deepcopy(
            saved["optimizer"]))  # it would go on in the same tensors
    train(optimizer, params, steps)
    return {"model": detached(params), "optimizer": optimizer.state_dict()}


def record_batches():
    """-> a list that grows by how many matrices each call of `orthogonalize` takes."""
    sizes = []
    muon.orthogonalize = lambda X, coefficients: sizes.append(len(X)) or orthogonalize(
        X, coefficients)
    return sizes


def rank_main(rank, folder, start, middle):
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # each process would print it
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sizes = record_batches()
    torch.save([go_on(start, range(3)), go_on(middle, range(3, 6)), sizes], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_and_share_the_work(tmp_path, monkeypatch):
    """The same parameters and state under 1 and 2 processes; either's state goes on under the
    other."""
    monkeypatch.setattr(muon, "orthogonalize", orthogonalize)
    start, sizes = {"model": detached(parameters())}, record_batches()
    middle = go_on(start, range(3))
    end = go_on(middle, range(3, 6))
    whole = list(sizes)
    mp.spawn(rank_main, (str(tmp_path), start, middle), nprocs=2)
    for rank in range(2):
        two_middle, two_end, shares = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert shares == [-(-size // 2) for size in whole] and sum(shares) < sum(whole)
        for ours, theirs in ((two_middle, middle), (two_end, end), (go_on(two_middle,
                                                                          range(3, 6)), end)):
            assert_same(ours["model"], theirs["model"], atol=1e-6, rtol=1e-5)
            assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
            for key, state in theirs["optimizer"]["state"].items():
                assert_same(ours["optimizer"]["state"][key], state, atol=1e-6, rtol=1e-5)
