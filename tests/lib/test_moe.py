"""Mixture of Experts against a plain loop over experts: python -m pytest tests/lib/test_moe.py"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY_FLAGS, read_log, tiny
from runs import again, assert_same_runs, cut, scalars, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_gpt2
from lib import checkpoint
from lib.cli import BadInput
from lib.decoding import Decoder, SampleConfig, generate, sample
from lib.moe import BALANCE_LOSS, BIAS_RATE, PATIENCE, LoadBalancer, MoE, grouped_linear, top
from lib.muon import orthogonalize
from lib.tokenizers import load_tokenizer
from train_gpt2 import GPT, MLPS, TrainConfig

EXPERTS = ["--n_experts", 4, "--mlp", "swiglu", "--optimizer", "muon",
           "--max_lr", 0.02, "--vector_lr", 5e-3, "--embedding_lr", 5e-3]
ALONE = SimpleNamespace(distributed=False)


def layer_of(std=0.2, **settings):
    """A MoE of width 32 with random weights, and biases that change which experts are picked."""
    torch.manual_seed(1)
    config = tiny(**dict(n_experts=5, n_active=2) | settings)
    layer = MoE(config, MLPS[config.mlp])
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=std)
    torch.nn.init.normal_(layer.bias, std=0.1)
    return config, layer


def plain(config, layer, x):
    """The same, token by token and expert by expert."""
    out = []
    for token in x.flatten(0, 1):
        scores = scores_of(config.router, layer.router.weight @ token)
        picked = (scores + layer.bias).argsort(descending=True)[:config.n_active]
        y = torch.zeros_like(token)
        for e in picked:
            h = activation(config.mlp, layer.c_fc.weight[e] @ token)
            y = y + scores[e] * (layer.c_proj.weight[e] @ h)
        y = y / scores[picked].sum()
        if config.n_shared:
            h = activation(config.mlp, layer.shared.c_fc.weight @ token)
            y = y + layer.shared.c_proj.weight @ h
        out.append(y)
    return torch.stack(out).view_as(x)


def scores_of(router, z):
    if router == "sigmoid":
        return torch.sigmoid(z)
    return z.exp() / z.exp().sum(-1, keepdim=True)


def activation(mlp, h):
    if mlp == "swiglu":
        return F.silu(h[:len(h) // 2]) * h[len(h) // 2:]
    if mlp == "relu2":
        return h.clamp(min=0) ** 2
    return F.gelu(h, approximate="tanh")


# --------------------------------------------------------------------------------------------------
# The layer


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
@pytest.mark.parametrize("n_shared", [0, 1])
def test_equals_a_plain_loop_over_experts(mlp, router, n_shared):
    config, layer = layer_of(mlp=mlp, router=router, n_shared=n_shared, bias=False)
    x = torch.randn(2, 7, 32, requires_grad=True)
    inputs = [x, *layer.parameters()]
    grad = torch.randn(2, 7, 32)
    want = plain(config, layer, x)
    have = layer(x)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(have, inputs, grad)
    torch.testing.assert_close(grads, torch.autograd.grad(want, inputs, grad), rtol=1e-4, atol=1e-5)
    assert all(part.any() for part in grads)


@pytest.mark.parametrize("mlp", MLPS)
def test_one_expert_is_the_dense_mlp(mlp):
    config, layer = layer_of(mlp=mlp, n_experts=1, n_active=1, bias=False)
    dense = MLPS[mlp](config)
    pairs = [(layer.c_fc, dense.c_fc), (layer.c_proj, dense.c_proj)]
    for experts, matrix in pairs:
        assert experts.weight.shape[1:] == matrix.weight.shape
        matrix.weight.data = experts.weight[0].data
    x = torch.randn(2, 9, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    dense(y).square().sum().backward()
    torch.testing.assert_close(layer(x), dense(y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    for experts, matrix in pairs:
        torch.testing.assert_close(experts.weight.grad[0], matrix.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_groups_of_any_size_and_empty_ones_in_bf16(device):
    torch.manual_seed(0)
    sizes = [0, 1, 7, 0, 300, 13, 0]
    ends = torch.tensor(sizes, device=device).cumsum(0).int()
    a = torch.randn(sum(sizes), 64, device=device).bfloat16().requires_grad_()
    w = torch.randn(len(sizes), 40, 64, device=device).bfloat16().requires_grad_()
    grad = torch.randn(sum(sizes), 40, device=device).bfloat16()
    want = torch.cat([part @ matrix.T for part, matrix in zip(a.split(sizes), w, strict=True)])
    have = grouped_linear(a, w, ends)
    torch.testing.assert_close(have, want, rtol=2e-2, atol=0.1)
    torch.testing.assert_close(torch.autograd.grad(have, (a, w), grad),
                               torch.autograd.grad(want, (a, w), grad), rtol=2e-2, atol=0.5)
    # an expanded gradient; that of an empty group is zero
    total = grouped_linear(a, w, ends).sum()
    assert not torch.autograd.grad(total, w)[0][0].any()


def test_the_router_is_in_fp32_under_autocast():
    config, layer = layer_of(bias=False)
    x = torch.randn(2, 64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
        gates, _, _ = layer.route(x)
    assert low.dtype == torch.bfloat16
    assert torch.equal(gates, layer.route(x)[0])
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.1)


def test_the_router_is_in_fp32_in_a_compiled_backward_too():
    _, layer = layer_of(n_experts=64)
    x = torch.randn(2, 64, 32).bfloat16().requires_grad_()
    grad = torch.randn(2, 64, 64)
    want_weight = grad.flatten(0, 1).T @ x.float().flatten(0, 1)
    want_x = (grad @ layer.router.weight).bfloat16()
    for router in (layer.router, torch.compile(layer.router, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = router(x)
        grad_weight, grad_x = torch.autograd.grad(z, (layer.router.weight, x), grad)
        torch.testing.assert_close(grad_weight, want_weight, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_x, want_x, rtol=0, atol=0)


def test_the_bias_changes_which_experts_are_picked_not_their_weights():
    _, layer = layer_of()
    x = torch.randn(1, 50, 32)
    layer.bias.zero_()
    gates, picked, _ = layer.route(x)
    layer.bias += torch.tensor([0, 0, 0, 9.0, 0])
    forced_gates, forced, counts = layer.route(x)
    assert (forced == 3).any(-1).all()
    assert counts[0, 3] == 50
    assert not (picked == 3).any(-1).all()
    scores = torch.sigmoid(x @ layer.router.weight.T).gather(-1, forced)
    torch.testing.assert_close(forced_gates, scores / scores.sum(-1, keepdim=True))
    same = (forced == picked).all(-1)
    assert same.any()
    assert torch.equal(gates[same], forced_gates[same])


@pytest.mark.parametrize("k", [1, 2, 8, 12])
def test_picks_are_those_of_topk(k):
    torch.manual_seed(0)
    rows = [torch.randperm(12) for _ in range(200)]  # no ties
    scores = torch.stack(rows).float().view(4, 50, 12) - 6
    assert torch.equal(top(scores, k), scores.topk(k).indices)


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_auxiliary_losses_change_only_gradients_by_their_formulas(router):
    settings = dict(router=router, bias=False, n_experts=5, mlp="relu2")
    model = GPT(tiny(balance="loss", router_z_loss=0.3, **settings))
    without = GPT(tiny(**settings))
    without.load_state_dict(model.state_dict())
    idx = torch.randint(61, (3, 17))
    x = idx[:, :-1]
    targets = idx[:, 1:]
    inputs = record_inputs(model)
    loss = model(x, targets)
    assert torch.equal(loss, without(x, targets))

    written_out = sum(auxiliary_loss(router, row, layer.router.weight)
                      for layer, rows in inputs for row in rows)
    auxiliary = gradients(written_out, model)
    want = gradients(without(x, targets), without)
    for name, grad in gradients(loss, model).items():
        torch.testing.assert_close(grad, want[name] + auxiliary[name], rtol=1e-4, atol=1e-4,
                                   msg=lambda text, name=name: f"{name}: {text}")
    # in masked data, where the loop divides by fewer targets, their weight per token stays
    learned = torch.where(torch.rand(3, 16) < 0.25, targets, -1)
    share = (learned >= 0).sum() / learned.numel()
    LoadBalancer(model, ALONE, print).weigh(share)
    want = gradients(without(x, learned), without)
    for name, grad in gradients(model(x, learned), model).items():
        if "router" in name:
            torch.testing.assert_close(grad, want[name] + auxiliary[name] * share,
                                       rtol=1e-4, atol=1e-4)


def record_inputs(model):
    """A list that gets (MoE layer, its input) of every later pass."""
    inputs = []

    def record(layer, args):
        inputs.append((layer, args[0]))

    for block in model.transformer.h:
        block.mlp.register_forward_pre_hook(record)
    return inputs


def auxiliary_loss(router, row, weight):
    """The losses of one sequence (T, C), written out; 5 experts, 2 of them active."""
    T = len(row)
    z = row @ weight.T  # (T, E)
    p = scores_of(router, z)
    p = p / p.sum(-1, keepdim=True)
    f = torch.zeros(5)
    for t in range(T):
        f[p[t].topk(2).indices] += 1 / (T * 2)
    z_loss = z.exp().sum(-1).log().square().sum()
    return T * BALANCE_LOSS * 5 * (f * p.mean(0)).sum() + 0.3 * z_loss


def gradients(loss, model):
    """{name: gradient of the parameter}."""
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True,
                                allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("settings", [
    dict(),
    dict(router="softmax", balance="loss", router_z_loss=1e-3, n_shared=1, mlp="swiglu"),
], ids=["bias", "loss"])
def test_compiles_without_a_graph_break_and_evaluation_does_not_count(settings):
    torch._dynamo.reset()
    idx = torch.randint(61, (2, 17))
    model = GPT(tiny(n_experts=4, **settings))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    layers = [block.mlp for block in model.transformer.h]
    loss = model(idx[:, :-1], idx[:, 1:])
    want = torch.autograd.grad(loss, list(model.parameters()))
    seen = [layer.seen.clone() for layer in layers]
    for passes in (2, 3):
        have = compiled(idx[:, :-1], idx[:, 1:])
        torch.testing.assert_close(have, loss)
        torch.testing.assert_close(torch.autograd.grad(have, list(model.parameters())), want)
        torch.testing.assert_close([layer.seen for layer in layers], [passes * s for s in seen])
    compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(idx[:, 1:]), model(idx[:, 1:]))
    torch.testing.assert_close([layer.seen for layer in layers], [3 * s for s in seen])
    assert not [name for name in model.state_dict() if "seen" in name]


# --------------------------------------------------------------------------------------------------
# Balance


def test_biases_are_adjusted_by_hand():
    model = GPT(tiny(n_layer=2, n_experts=4, n_active=2))
    first, second = (block.mlp for block in model.transformer.h)
    first.seen += 99  # of earlier passes, such as a probe of the memory
    lines = []
    balance = LoadBalancer(model, ALONE, lines.append)
    # 12 picks by 6 tokens: an even load is 3 per expert
    first.seen += torch.tensor([6.0, 2.0, 0.0, 4.0, 30.0, 12.0])
    second.seen += torch.tensor([3.0, 3.0, 3.0, 3.0, 6.0, 6.0])
    report = balance(True)
    assert (first.bias / BIAS_RATE).tolist() == pytest.approx([-1, 1, 1, -1])
    assert not second.bias.any()
    assert report["moe/load_00"] == pytest.approx([2, 2 / 3, 0, 4 / 3])
    assert report["moe/load_01"] == [1, 1, 1, 1]
    assert (report["moe/max_load_00"], report["moe/dead_00"]) == (2, 1)
    assert (report["moe/logit_norm_00"], report["moe/entropy_00"]) == (5, 2)
    before = first.bias.clone()
    first.seen += torch.tensor([9.0, 1.0, 1.0, 1.0, math.nan, 0.0])
    second.seen += torch.ones(6)
    balance(False)  # a skipped step
    assert torch.equal(first.bias, before)
    assert not first.seen.any()
    assert lines == []


def test_a_dense_model_has_nothing_to_balance():
    assert LoadBalancer(GPT(tiny()), ALONE, print)(True) == {}


def test_the_report_is_over_all_micro_batches():
    idx = torch.randint(61, (3, 16))
    model = GPT(tiny(n_layer=1, n_experts=4, n_active=2, router="softmax", bias=False))
    inputs = record_inputs(model)
    balance = LoadBalancer(model, ALONE, print)
    for _ in range(2):
        model(idx)
    report = balance(True)
    weight = model.transformer.h[0].mlp.router.weight
    z = (torch.cat([x for _, x in inputs]) @ weight.T).detach()
    picked = z.topk(2).indices.flatten().bincount(minlength=4)
    entropy = torch.distributions.Categorical(logits=z).entropy().mean().item()
    assert report["moe/load_00"] == pytest.approx((picked / picked.float().mean()).tolist())
    assert report["moe/logit_norm_00"] == pytest.approx(z.norm(dim=-1).mean().item(), rel=1e-5)
    assert report["moe/entropy_00"] == pytest.approx(entropy, rel=1e-5)


def test_a_collapsed_router_is_reported_and_balanced():
    torch.manual_seed(0)
    idx = torch.randint(61, (4, 16))
    model = GPT(tiny(n_layer=2, n_experts=4, n_active=2, emb_norm=True))
    lines = []
    balance = LoadBalancer(model, ALONE, lines.append)
    model.transformer.h[1].mlp.bias[:2] = 1.0  # more than any sigmoid
    for step in range(PATIENCE + 5):
        assert len(lines) == (step > PATIENCE - 1)
        model(idx)
        report = balance(True)
        assert report["moe/dead_00"] == 0
        assert report["moe/dead_01"] == 2
        assert report["moe/max_load_01"] == 2.0
    assert lines[0].endswith(": layer 1 2 of 4, its router has collapsed")
    for _ in range(round(1.1 / BIAS_RATE / 2)):
        model(idx)
        report = balance(True)
    assert report["moe/dead_01"] == 0
    assert report["moe/max_load_01"] < 1.5


def test_a_few_stray_tokens_do_not_hide_a_collapse():
    model = GPT(tiny(n_layer=1, n_experts=4, n_active=2))
    layer = model.transformer.h[0].mlp
    lines = []
    balance = LoadBalancer(model, ALONE, lines.append)
    for strays in (10, 9):  # 1% of an even share of 1,000, and less
        for _ in range(PATIENCE):
            assert not lines
            layer.seen += torch.tensor([2000.0 - strays, 2000.0 - strays, strays, strays, 1.0, 1.0])
            balance(True)
        assert len(lines) == (strays < 10)
    assert "layer 0 2 of 4, its router has collapsed" in lines[0]


# --------------------------------------------------------------------------------------------------
# In the model


def test_parameters_and_flops_by_hand():
    with torch.device("meta"):
        dense = GPT(tiny(pos="rope", bias=False))
        model = GPT(tiny(pos="rope", bias=False, n_experts=8, n_active=2))
    expert = 2 * 32 * 64  # half as wide as the dense MLP's 128
    router = 8 * 32
    total = dense.parameter_counts()["total"]
    assert dense.parameter_counts()["active"] == total
    assert model.parameter_counts()["total"] == total + 2 * (6 * expert + router)
    assert model.parameter_counts()["active"] == total + 2 * router
    assert model.flops_per_token() == dense.flops_per_token() + 6 * 2 * router


@pytest.mark.parametrize("settings, width", [(dict(), 64), (dict(n_shared=1), 40),
                                             (dict(mlp="swiglu", n_active=4), 16),
                                             (dict(expert_width=24), 24)])
def test_experts_are_as_wide_as_the_flops_of_the_dense_mlp_allow(settings, width):
    with torch.device("meta"):
        mlp = GPT(tiny(n_experts=6, **settings)).transformer.h[0].mlp
    fused = 2 if settings.get("mlp") == "swiglu" else 1
    assert mlp.c_fc.weight.shape == (6, fused * width, 32)
    assert mlp.c_proj.weight.shape == (6, 32, width)
    if "n_shared" in settings:
        assert mlp.shared.c_proj.weight.shape == (32, width)


@pytest.mark.parametrize("init", ["gpt2", "xavier", "kaiming", "zero_proj"])
def test_each_expert_is_initialized_as_a_matrix_of_its_own(init):
    torch.manual_seed(0)
    model = GPT(tiny(n_embd=128, n_experts=4, init=init, mlp="swiglu", n_layer=1, expert_width=256))
    mlp = model.transformer.h[0].mlp
    std = {"gpt2": 0.02, "xavier": (2 / (128 + 256)) ** 0.5, "kaiming": (2 / 128) ** 0.5,
           "zero_proj": (1 / 3 / 128) ** 0.5}[init]
    std_proj = {"gpt2": 0.02, "xavier": (2 / (128 + 256)) ** 0.5, "kaiming": (1 / 256) ** 0.5,
                "zero_proj": 0.0}[init] * 2 ** -0.5  # residual scaling of one layer
    for weight, want in ((mlp.c_fc.weight, std), (mlp.c_proj.weight, std_proj)):
        assert weight.flatten(1).std(dim=1).tolist() == pytest.approx([want] * 4, rel=0.03)
        assert not want or not torch.equal(weight[0], weight[1])


def test_muon_orthogonalizes_each_expert_alone():
    model = GPT(tiny(n_experts=3, mlp="swiglu", bias=False))
    optimizer = train_gpt2.make_optimizer(
        model, TrainConfig(optimizer="muon", max_lr=0.1, weight_decay=0.0, momentum=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    tried = 0
    for name, p in model.named_parameters():
        if p.dim() < 3:
            continue
        fused = 2 if "c_fc" in name else 1  # SwiGLU's two matrices in one
        parts = [t.unflatten(1, (fused, -1)).flatten(0, 1) for t in (p, before[name], p.grad)]
        for new, old, grad in zip(*parts, strict=True):
            rows, cols = new.shape
            want = old - 0.1 * max(1, rows / cols) ** 0.5 * orthogonalize(grad[None])[0]
            torch.testing.assert_close(new, want, rtol=1e-4, atol=1e-5)
            tried += 1
    assert tried == 2 * 3 * 3


@pytest.mark.parametrize("settings, says", [
    (dict(n_active=5), "--n_active 5 is above --n_experts 4"),
    (dict(expert_width=20), "--expert_width 20 .* 16 or 24"),
    (dict(expert_width=3), "--expert_width 3 .* 8"),
    (dict(n_embd=36), "--n_embd 36 .* 32 or 40"),
    (dict(n_active=4, n_shared=20), "lower --n_active or --n_shared"),
])
def test_experts_that_cannot_be_are_refused(settings, says):
    with pytest.raises(BadInput, match=says):
        train_gpt2.check_model(tiny(**dict(n_experts=4) | settings))


# --------------------------------------------------------------------------------------------------
# Real runs


def test_generation_with_a_cache_equals_full_passes():
    torch.manual_seed(0)
    model = GPT(tiny(n_experts=4, init="xavier", pos="rope")).eval()
    idx = torch.randint(61, (3, 4))
    decoder = Decoder(model, 3, 16)
    cached = list(generate(decoder, idx.tolist(), 10, lambda logits: logits.argmax(-1)))
    with torch.no_grad():
        for _ in range(10):
            idx = torch.cat((idx, model(idx)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert cached == idx[:, -10:].T.tolist()  # 10 steps of 3 tokens


@pytest.mark.parametrize("balance", ["bias", "loss"])
def test_samples_in_bf16_between_training_steps(balance):
    torch.manual_seed(0)
    model = GPT(tiny(n_experts=4, n_shared=1, balance=balance, init="xavier", pos="rope"))
    idx = torch.randint(61, (3, 8))
    balancer = LoadBalancer(model, ALONE, print)
    with torch.autocast("cpu", torch.bfloat16):
        model(idx, idx).backward()
        balancer(True)
        decoder = Decoder(model.eval(), 3, 16)
        with torch.no_grad():
            want = model(idx)[:, -1].float()
            torch.testing.assert_close(decoder.fill(range(3), idx.tolist()), want,
                                       atol=0.02, rtol=0.02)


def test_a_run_with_experts_learns_is_logged_and_resumes_exactly(data, tmp_path, capsys):
    whole = train(data, tmp_path / "whole", *EXPERTS, "--max_steps", 24, "--sample_every", 12)
    assert "active per token" in capsys.readouterr().out
    log = read_log(whole)
    assert log[23, "train"] < log[0, "train"] - 1
    assert log[24, "val"] < log[0, "train"] - 1
    shown = scalars(whole)
    for name in ("max_load", "dead", "entropy", "logit_norm"):
        assert len(shown[f"moe/{name}_00"]) == len(shown[f"moe/{name}_01"]) == 24
    events = EventAccumulator(str(whole), size_guidance={"histograms": 0}).Reload()
    loads = [sum(event.histogram_value.bucket) for event in events.Histograms("moe/load_00")]
    assert loads == pytest.approx([4] * 24)  # 4 experts, mean load 1

    path = whole / "ckpt_00024.pt"
    weights = checkpoint.read(path)["model"]
    assert weights["transformer.h.1.mlp.bias"].any()
    assert not [name for name in weights if "seen" in name]
    for weight in weights.values():
        if weight.dim() == 3:  # experts stay different
            experts = F.normalize(weight.flatten(1), dim=1)
            assert (experts @ experts.T).fill_diagonal_(0).abs().max() < 0.5
    assert_same_runs(again(cut(whole, tmp_path / "half", 8)), whole)
    model, tokenizer, _ = train_gpt2.load_checkpoint(path)
    config = json.loads((whole / "config.json").read_text())
    assert config["parameters"] == model.parameter_counts()
    assert sample(model, tokenizer, ["The"], SampleConfig(max_new_tokens=5))
    assert load_tokenizer(tokenizer.spec).vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("flags", [
    ["--router", "softmax", "--n_shared", 1], ["--balance", "loss", "--router_z_loss", 0.1]
], ids=["bias", "loss"])
def test_two_processes_and_accumulation_have_the_losses_of_one(flags, launch, data, tmp_path):
    flags = [*TINY_FLAGS, "--data", data, *EXPERTS, *flags, "--max_steps", 12]
    for name, processes, micro_batch in (("one", 1, 8), ("accumulated", 1, 2), ("two", 2, 2)):
        done = launch("train_gpt2.py", *flags, "--run_name", name, "--micro_batch", micro_batch,
                      processes=processes)
        assert done.returncode == 0, done.stderr
    one = tmp_path / "log" / "one"
    weights = checkpoint.read(one / "ckpt_00012.pt")["model"]
    for other in (tmp_path / "log" / "accumulated", tmp_path / "log" / "two"):
        assert read_log(other) == pytest.approx(read_log(one), rel=1e-5)
        for tag in ("moe/max_load_00", "moe/max_load_01"):
            assert scalars(other)[tag] == scalars(one)[tag]
        others = checkpoint.read(other / "ckpt_00012.pt")["model"]
        for name in weights:
            assert not name.endswith("mlp.bias") or torch.equal(weights[name], others[name])


def test_the_balance_may_change_to_biases_but_not_from_them(data, tmp_path, capsys):
    """With the loss, learned biases would no longer change and still pick experts. Those of a run
    with the loss are zero and begin to change."""
    folder = train(data, tmp_path / "bias", *EXPERTS, "--max_steps", 4)
    with pytest.raises(BadInput, match="--balance bias -> loss"):
        again(folder, "--balance", "loss", "--max_steps", 8)
    folder = train(data, tmp_path / "loss", *EXPERTS, "--balance", "loss", "--max_steps", 4)
    assert not checkpoint.read(folder / "ckpt_00004.pt")["model"]["transformer.h.1.mlp.bias"].any()
    again(folder, "--balance", "bias", "--max_steps", 8)
    assert "changed: --max_steps 4 -> 8, --balance loss -> bias" in capsys.readouterr().out
    assert checkpoint.read(folder / "ckpt_00008.pt")["model"]["transformer.h.1.mlp.bias"].any()


def test_a_dense_run_cannot_get_experts(data, tmp_path):
    folder = train(data, tmp_path / "dense", "--max_steps", 2, "--warmup_steps", 0)
    path = folder / "ckpt_00002.pt"
    with pytest.raises(BadInput, match="--n_experts 0 -> 4"):
        again(folder, "--n_experts", 4, "--max_steps", 4)
    state = checkpoint.read(path)
    for name in ("n_experts", "expert_width"):  # a checkpoint older than experts
        del state["model_config"][name]
    checkpoint.write(path, state)
    with pytest.raises(BadInput, match="--n_experts 0 -> 4"):
        again(folder, "--n_experts", 4, "--max_steps", 4)
    again(folder, "--max_steps", 4)


def test_settings_of_experts_need_experts(data, tmp_path):
    with pytest.raises(BadInput, match="--n_active, --router: .*--n_experts"):
        train(data, tmp_path / "a", "--n_active", 2, "--router", "softmax")
