"""Mixture of Experts: a router sends each token to a few of several small MLPs, the experts.

Shazeer et al. 2017, https://arxiv.org/abs/1701.06538. No token is dropped: tokens are sorted by
expert and multiplied in groups of any size (MegaBlocks, Gale et al. 2022,
https://arxiv.org/abs/2211.15841). A bias on the router's scores balances the experts without an
auxiliary loss (Wang et al. 2024, https://arxiv.org/abs/2408.15664); the load-balance loss and the
router z-loss are options.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from lib import kernels
from lib.cli import BadInput, flag
from lib.devices import Processes, cast

MULTIPLE = 8  # grouped_mm needs widths that are multiples of this: rows of 16 bytes in bf16
# Change of a bias per step. DeepSeek-V3's 1e-3 (https://arxiv.org/abs/2412.19437, section 4.2) is
# for longer runs.
BIAS_RATE = 1e-2
# Coefficient of the load-balance loss (Switch Transformers, https://arxiv.org/abs/2101.03961,
# section 2.2)
BALANCE_LOSS = 1e-2
# An expert is starved below this fraction of an even share, not only at 0: in a large batch even a
# collapsed router sends it a few tokens.
STARVED = 0.01
PATIENCE = 20  # consecutive steps that an expert is starved before it is reported

SCORES: dict[str, Callable] = {"sigmoid": torch.sigmoid, "softmax": partial(F.softmax, dim=-1)}


@dataclass(frozen=True)
class ExpertConfig:
    n_experts: int = flag(
        0, "experts per block (Mixture of Experts); 0: a dense MLP", at_least=0, at_most=256)
    n_active: int = flag(
        2, "experts per token; with 1 the router only learns from --balance loss and "
           "--router_z_loss", above=0, at_most=256)
    n_shared: int = flag(
        0, "additional experts that process every token", at_least=0, at_most=256)
    expert_width: int | None = flag(
        None, "hidden units per expert, a multiple of 8; unset: all active experts together have "
              "the FLOPs of the dense MLP", above=0, at_most=2**20)
    router: Literal["sigmoid", "softmax"] = flag(
        "sigmoid", "activation of the router scores that select and weight a token's experts")
    balance: Literal["bias", "loss"] = flag(
        "bias", "balance the experts by adjusting biases after each step, or by the load-balance "
                "loss")
    router_z_loss: float = flag(
        0.0, "coefficient of the router z-loss, 1e-3 in ST-MoE; 0: none", at_least=0, at_most=1e4)


def expert_width(config: ExpertConfig, hidden: int) -> int:
    """Hidden units per expert: --expert_width, or an equal share of the dense MLP's `hidden`."""
    if config.expert_width:
        return config.expert_width
    share = hidden // (config.n_active + config.n_shared)
    return share // MULTIPLE * MULTIPLE


def check_experts(config: Any, hidden: int) -> None:
    """Raises BadInput if the experts of a GPTConfig cannot be built.

    hidden: hidden units of the dense MLP.
    """
    if not config.n_experts:
        return
    if config.n_active > config.n_experts:
        raise BadInput(f"--n_active {config.n_active} is above --n_experts {config.n_experts}: "
                       "lower it")
    if not expert_width(config, hidden):
        raise BadInput(f"{config.n_active + config.n_shared} active experts share {hidden} hidden "
                       f"units, less than {MULTIPLE} each: lower --n_active or --n_shared, or give "
                       "--expert_width")
    for name, width in (("expert_width", config.expert_width or 0), ("n_embd", config.n_embd)):
        if width % MULTIPLE:
            below = width // MULTIPLE * MULTIPLE
            choices = f"{below} or {below + MULTIPLE}" if below else f"{MULTIPLE}"
            raise BadInput(f"--{name} {width} must be a multiple of {MULTIPLE} for grouped_mm: "
                           f"give {choices}")


# --------------------------------------------------------------------------------------------------
# Products and permutations


def grouped_mm(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """F.grouped_mm, or a product per group where torch has no kernel for this GPU or dtype.

    a: (n, k), rows in groups, and b: (E, k, m) -> (n, m). Or a: (k, n), columns in groups, and
    b: (n, m), rows in groups -> (E, k, m). ends: int32 (E,), where each group ends.
    """
    if not kernels.without("grouped_mm"):
        try:
            return F.grouped_mm(a, b, offs=ends)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass
    starts = [0, *ends.tolist()]
    groups = list(map(slice, starts, starts[1:]))
    if b.dim() == 2:
        return torch.stack([a[:, group] @ b[group] for group in groups])
    return torch.cat([a[group] @ weight for group, weight in zip(groups, b, strict=True)])


# Custom operators around F.grouped_mm: torch 2.11 to 2.13 compile it for bf16 only, and inside an
# operator a transposed view needs no copy.
@torch.library.custom_op("moe::grouped_linear", mutates_args=())
def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply rows x (n, in), sorted by expert, by their expert's weight (E, out, in) -> (n, out).

    ends: int32 (E,), where each expert's rows end. An expert without rows has a zero gradient.
    """
    return grouped_mm(x, weight.mT, ends)


@torch.library.custom_op("moe::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
                            ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and weight, given that of the output."""
    grad = grad.contiguous()  # the kernel does not support the strides of an expanded tensor
    # The only layout that supports groups of any size along the summed dimension
    return grouped_mm(grad, weight, ends), grouped_mm(grad.mT, x, ends)


@grouped_linear.register_fake
def _(x, weight, ends):
    return x.new_empty(x.size(0), weight.size(1))


@grouped_linear_backward.register_fake
def _(grad, x, weight, ends):
    return torch.empty_like(x), torch.empty_like(weight)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return (*grouped_linear_backward(grad, *ctx.saved_tensors), None)


grouped_linear.register_autograd(_backward, setup_context=_save_inputs)


class _Permute(torch.autograd.Function):
    """x[order], whose gradient is permuted back by indexing.

    Autograd does not know that `order` is a permutation and would add rows with atomics.
    """

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


# --------------------------------------------------------------------------------------------------
# The layer


class ExpertLinear(nn.Module):
    """A linear layer without bias per expert: weight (E, out, in)."""

    def __init__(self, n_experts: int, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, n_out, n_in))

    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return grouped_linear(cast(x), cast(self.weight), ends)


def is_capturable(model: nn.Module, device: torch.device) -> bool:
    """Whether a forward pass on a GPU can be captured as a CUDA graph, which may not synchronize.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, ExpertLinear)]
    if not weights:
        return True
    return kernels.has_grouped_mm(device, weights[0].dtype)


class _LinearInFloat32(torch.autograd.Function):
    """x weight^T in fp32, in backward too: compiled, it runs under the autocast of its forward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return (grad @ weight).type_as(x), grad.flatten(0, -2).mT @ x.flatten(0, -2).float()


class Router(nn.Linear):
    """The linear layer that scores experts, in fp32 whatever precision other layers use.

    In training on CUDA the product is TF32, as set_float32_matmul_precision("high") is set: factors
    of 10 bits, summed in fp32.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _LinearInFloat32.apply(x, self.weight)


def top(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest along the last dimension, as topk returns them.

    topk is slow for a small k, and the compiler cannot fuse it.
    """
    if k > 8:  # a loop this long takes long to compile
        return scores.topk(k).indices
    experts = torch.arange(scores.size(-1), device=scores.device)
    picked = []
    for _ in range(k):
        best = scores.argmax(dim=-1, keepdim=True)
        picked.append(best)
        scores = torch.where(experts == best, -torch.inf, scores)
    return torch.cat(picked, dim=-1)


class NoShared(nn.Module):
    """Replaces the shared experts if there are none."""

    def forward(self, x: torch.Tensor) -> float:
        return 0.0


def load_balance_loss(logits: torch.Tensor, probs: torch.Tensor,
                      counts: torch.Tensor) -> torch.Tensor:
    """E sum_e f_e P_e, summed over tokens (Switch Transformers, eq. 4).

    f_e: the share of picks that expert e got. P_e: its mean probability. Each sequence is a group
    of its own (as in GShard, Lepikhin et al. 2020, https://arxiv.org/abs/2006.16668, section 2.2),
    so the gradient does not depend on how a batch is split into micro-batches and over processes.
    """
    T, E = probs.shape[1:]
    f = counts / counts.sum(dim=-1, keepdim=True)  # (B, E)
    return BALANCE_LOSS * E * T * (f * probs.mean(dim=1)).sum()


def router_z_loss(logits: torch.Tensor, probs: torch.Tensor, counts: torch.Tensor,
                  coefficient: float) -> torch.Tensor:
    """logsumexp(logits)^2, summed over tokens: keeps logits small.

    ST-MoE, Zoph et al. 2022, https://arxiv.org/abs/2202.08906, eq. 5.
    """
    return coefficient * logits.logsumexp(dim=-1).square().sum()


class MoE(nn.Module):
    """x (B, T, C) -> the sum of each token's K of E experts, weighted by their normalized scores,
    plus the shared experts.

    mlp: the class of the dense MLP, whose `act` and `fused` the experts use, without biases. S
    shared experts are one MLP, S times as wide. `penalty` is a zero whose gradient is that of the
    latest pass's auxiliary losses. `seen`, for the LoadBalancer, sums over training passes: tokens
    per expert (E), the norms of all tokens' logits, the entropies of their probabilities.
    """

    bias: torch.Tensor
    seen: torch.Tensor
    scale: torch.Tensor

    def __init__(self, config: Any, mlp: Any):
        super().__init__()
        E = config.n_experts
        C = config.n_embd
        width = expert_width(config, mlp.width(C))
        self.n_active = config.n_active
        self.score = SCORES[config.router]
        self.act = mlp.act
        self.router = Router(C, E, bias=False)
        self.c_fc = ExpertLinear(E, C, mlp.fused * width)
        self.c_proj = ExpertLinear(E, width, C)
        self.shared = mlp(config, config.n_shared * width) if config.n_shared else NoShared()
        self.bias_rate = BIAS_RATE if config.balance == "bias" else 0.0
        self.losses: list[Callable] = []
        if config.balance == "loss":
            self.losses.append(load_balance_loss)
        if config.router_z_loss:
            self.losses.append(partial(router_z_loss, coefficient=config.router_z_loss))
        self.penalty: float | torch.Tensor = 0.0
        self.register_buffer("bias", torch.zeros(E))
        self.register_buffer("seen", torch.zeros(E + 2), persistent=False)
        # factor on the penalty, see LoadBalancer.weigh
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        gates, picked, counts = self.route(x)
        # 1) sort (token, pick) by expert; uint8 needs the fewest sorting passes
        order = picked.flatten().to(torch.uint8).argsort(stable=True)  # (B T K,)
        positions = torch.arange(len(order), device=x.device)
        inverse = torch.empty_like(order).scatter_(0, order, positions)
        ends = counts.sum(dim=0).cumsum(0).to(torch.int32)  # (E,)
        # 2) each expert processes its rows
        rows = cast(x).view(-1, 1, C).expand(-1, self.n_active, -1).reshape(-1, C)  # (B T K, C)
        rows = _Permute.apply(rows, order, inverse)
        # weight the hidden units, so that the outputs only need to be summed
        weights = _Permute.apply(gates.view(-1, 1), order, inverse)
        rows = self.act(self.c_fc(rows, ends))
        rows = self.c_proj((rows * weights).type_as(rows), ends)
        # 3) restore the order and sum over each token's experts
        y = _Permute.apply(rows, inverse, order).view(B, T, self.n_active, C)
        return y.sum(dim=2) + self.shared(x)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pick the experts of x (B, T, C).

        Returns gates (B, T, K), which add up to 1 per token, the picked experts (B, T, K), and the
        number of tokens per sequence and expert (B, E).
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x)  # (B, T, E), in fp32
            scores = self.score(logits)
            # the bias affects which experts are picked, not their weights
            picked = top(scores.detach() + self.bias, self.n_active)
            experts = torch.arange(len(self.bias), device=x.device)
            chosen = picked[..., None] == experts  # (B, T, K, E)
            # not gather, whose gradient uses atomics
            gates = (scores[..., None, :] * chosen).sum(dim=-1)
            gates = gates / gates.sum(dim=-1, keepdim=True).clamp_min(1e-20)
            counts = chosen.sum(dim=(1, 2))
            probs = scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)
            self.penalty = 0.0
            if self.training:
                for loss_of in self.losses:
                    loss = loss_of(logits, probs, counts)
                    self.penalty = self.penalty + self.scale * (loss - loss.detach())
                entropies = torch.special.entr(probs.detach()).sum()
                norms = logits.detach().norm(dim=-1).sum()
                self.seen += torch.cat((counts.sum(dim=0), torch.stack((norms, entropies))))
        return gates, picked, counts


# --------------------------------------------------------------------------------------------------
# Balance


class LoadBalancer:
    """After each step, adjusts the biases of all MoE layers and reports expert load.

    A no-op for a dense model.
    """

    def __init__(self, model: nn.Module, processes: Processes, say: Callable[[str], Any]):
        """say: called with a line about starved experts.

        Discards what memory-probing passes left in the layers.
        """
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        self.processes = processes
        self.say = say
        # consecutive steps that each expert was starved, per layer
        self.starved = [[0] * len(layer.bias) for layer in self.layers]
        self.reported = ""
        self._reset()

    def _reset(self) -> None:
        for layer in self.layers:
            layer.seen.zero_()
            layer.penalty = 0.0  # it refers to a pass's graph, and then layers cannot be copied

    def weigh(self, share: torch.Tensor) -> None:
        """Set the share of a step's tokens that are targets.

        The training loop divides all losses by the number of targets, but auxiliary losses are sums
        over all tokens.
        """
        for layer in self.layers:
            layer.scale.copy_(share)

    @torch.no_grad()
    def __call__(self, finite: bool) -> dict[str, Any]:
        """Called by every process -> {tag: number, or list of loads by expert} for each layer.

        finite: False for a skipped step, which changes no bias. Synchronizes with the device; call
        it right after another sync.
        """
        if not self.layers:
            return {}
        seen = torch.stack([layer.seen for layer in self.layers])  # (layers, E + 2)
        if self.processes.distributed:
            dist.all_reduce(seen)  # so that biases stay equal on all processes
        self._reset()
        if finite:
            for layer, counts in zip(self.layers, seen[:, :-2], strict=True):
                layer.bias += layer.bias_rate * (counts.mean() - counts).sign()
        report: dict[str, Any] = {}
        for i, (*counts, norms, entropies) in enumerate(seen.tolist()):
            tokens = sum(counts) / self.layers[i].n_active
            report |= self._report(i, counts)
            report[f"moe/entropy_{i:02d}"] = entropies / tokens
            report[f"moe/logit_norm_{i:02d}"] = norms / tokens
        self._warn()
        return report

    def _report(self, i: int, counts: list[float]) -> dict[str, Any]:
        """Layer i's load by tokens per expert; counts the steps that experts are starved."""
        mean = sum(counts) / len(counts)
        starved = self.starved[i]
        for expert, count in enumerate(counts):
            starved[expert] = 0 if count >= STARVED * mean else starved[expert] + 1
        return {
            f"moe/load_{i:02d}": [count / mean for count in counts],
            f"moe/max_load_{i:02d}": max(counts) / mean,
            f"moe/dead_{i:02d}": counts.count(0.0),
        }

    def _warn(self) -> None:
        """Report which layers have starved experts, whenever that changes."""
        found = []
        for i, (layer, starved) in enumerate(zip(self.layers, self.starved, strict=True)):
            dead = sum(steps >= PATIENCE for steps in starved)
            if not dead:
                continue
            collapsed = dead == len(starved) - layer.n_active
            note = ", its router has collapsed" if collapsed else ""
            found.append(f"layer {i} {dead} of {len(starved)}{note}")
        line = "; ".join(found)
        if line and line != self.reported:
            self.say(f"experts with less than {STARVED:.0%} of an even share of the tokens in each "
                     f"of {PATIENCE} steps: {line}")
        self.reported = line
