"""Mixture of Experts: in place of one MLP, several smaller ones, the experts,
of which each token uses the few its router picks.

Shazeer et al. 2017, https://arxiv.org/abs/1701.06538. No token is ever dropped: tokens are sorted
by expert and multiplied in groups of any size (MegaBlocks, Gale et al. 2022,
https://arxiv.org/abs/2211.15841). A bias that picks experts keeps their loads even, without an
auxiliary loss (Wang et al. 2024, https://arxiv.org/abs/2408.15664); the load-balance loss and the
router z-loss are options.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from lib.cli import BadInput, flag
from lib.devices import cast

MULTIPLE = 8         # of the widths that grouped_mm takes: rows of bf16 in whole 16 bytes
BIAS_RATE = 1e-2  # of a bias per step; DeepSeek-V3's 1e-3 (https://arxiv.org/abs/2412.19437, section 4.2) is for longer runs
BALANCE_LOSS = 1e-2  # coefficient of the load-balance loss (Switch Transformers, https://arxiv.org/abs/2101.03961, section 2.2)
PATIENCE = 20        # steps in a row that an expert gets next to nothing before that is said
STARVED = 0.01  # of an even share: next to nothing. In a step of many tokens even a collapsed router sends a few astray

SCORES = {"sigmoid": torch.sigmoid, "softmax": partial(F.softmax, dim=-1)}


@dataclass(frozen=True)
class ExpertConfig:
    n_experts: int = flag(
        0, "experts in place of each block's MLP, a Mixture of Experts; 0: a dense MLP", at_least=0,
        at_most=256)
    n_active: int = flag(
        2,
        "experts per token; with 1 the router learns from --balance loss and --router_z_loss alone",
        above=0, at_most=256)
    n_shared: int = flag(0, "experts that every token takes besides", at_least=0, at_most=256)
    expert_width: int | None = flag(None, "hidden units per expert, a multiple of 8; unset: the active ones take the FLOPs of "
                                    "the dense MLP", above=0, at_most=2**20)
    router: Literal["sigmoid",
                    "softmax"] = flag("sigmoid",
                                      "scores by which a token's experts are picked and weighted")
    balance: Literal["bias", "loss"] = flag(
        "bias", "even load by nudging biases after each step, or by the load-balance loss")
    router_z_loss: float = flag(0.0, "coefficient of the router z-loss, 1e-3 in ST-MoE; 0: none",
                                at_least=0, at_most=1e4)


def expert_width(config, hidden):
    """Hidden units per expert: --expert_width, or as many as make the active experts as wide
    as a dense MLP of `hidden` units."""
    return config.expert_width or hidden // (config.n_active
                                             + config.n_shared) // MULTIPLE * MULTIPLE


def check_experts(config, hidden):
    """Raises BadInput if these experts cannot be built. hidden: the hidden units of the dense MLP.
    """
    if not config.n_experts:
        return
    if config.n_active > config.n_experts:
        raise BadInput(
            f"--n_active {config.n_active} is above --n_experts {config.n_experts}: lower it")
    if not expert_width(config, hidden):
        raise BadInput(f"{config.n_active + config.n_shared} active experts share {hidden} hidden units, "
                       f"less than {MULTIPLE} each: lower --n_active or --n_shared, or give --expert_width")
    for name, width in (("expert_width", config.expert_width or 0), ("n_embd", config.n_embd)):
        if width % MULTIPLE:
            below = width // MULTIPLE * MULTIPLE
            raise BadInput(f"--{name} {width} must be a multiple of {MULTIPLE}, which grouped_mm takes: "
                           f"{f'{below} or ' if below else ''}{below + MULTIPLE} is")


# ----------------------------------------------------------------------------------------------------------------------
# Products and permutations


# operators of our own around F.grouped_mm: torch 2.11 to 2.13 compile it for bf16 alone;
# and inside them, a transposed view is no copy
@torch.library.custom_op("moe::grouped_linear", mutates_args=())
def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows x (n, in), sorted by expert, each times its expert's matrix, weight (E, out, in) -> (n,
    out).

    ends: int32 (E,), where each expert's rows end; an expert may have none, and then its gradient
    is zero.
    """
    return F.grouped_mm(x, weight.mT, offs=ends)


@torch.library.custom_op("moe::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
                            ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and weight from that of the output."""
    grad = grad.contiguous()  # an expanded one has strides that the kernel does not take
    # columns of grad times rows of x: the one layout in which it takes groups of any size along the
    # dimension that is summed
    return F.grouped_mm(grad, weight, offs=ends), F.grouped_mm(grad.mT, x, offs=ends)


grouped_linear.register_fake(lambda x, weight, ends: x.new_empty(x.size(0), weight.size(1)))
grouped_linear_backward.register_fake(lambda grad, x, weight, ends:
                                      (torch.empty_like(x), torch.empty_like(weight)))
grouped_linear.register_autograd(
    lambda ctx, grad: (*grouped_linear_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class _Permute(torch.autograd.Function):
    """x[order], whose gradient is taken back in order too. Autograd, which cannot know a
    permutation, would add rows with atomics."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return grad[inverse], None, None


# ----------------------------------------------------------------------------------------------------------------------
# The layer


class ExpertLinear(nn.Module):
    """A linear layer per expert, without bias: weight (E, out, in)."""

    def __init__(self, n_experts, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, n_out, n_in))

    def forward(self, x, ends):
        return grouped_linear(cast(x), cast(self.weight), ends)


def is_capturable(model, device):
    """Whether a forward pass on `device`, a GPU, can be captured as a CUDA graph. grouped_mm has a
    kernel for bf16 on GPUs of capability 9 and 10; elsewhere it waits for the GPU, to learn where
    each group ends."""
    weights = [module.weight for module in model.modules() if isinstance(module, ExpertLinear)]
    return not weights or (weights[0].dtype == torch.bfloat16
                           and torch.cuda.get_device_capability(device)[0] in (9, 10))


class _LinearInFloat32(torch.autograd.Function):
    """x weight^T without autocast, in backward too: a compiled backward runs under the autocast of
    its forward."""

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
    """The linear layer that scores experts: its input, weight and logits are fp32 whatever the
    others compute in. On CUDA, the product itself is TF32 in training, which sets
    set_float32_matmul_precision("high"): factors of 10 bits, summed in fp32."""

    def forward(self, x):
        return _LinearInFloat32.apply(x, self.weight)


def top(scores, k):
    """Indices of the k largest along the last dimension, as topk's, which the compiler cannot fuse
    and which is slow for so few."""
    if k > 8:  # so many passes take long to compile
        return scores.topk(k).indices
    places, picked = torch.arange(scores.size(-1), device=scores.device), []
    for _ in range(k):
        picked.append(scores.argmax(dim=-1, keepdim=True))
        scores = torch.where(places == picked[-1], -torch.inf, scores)
    return torch.cat(picked, dim=-1)


class NoShared(nn.Module):
    """Stands where there is no shared expert."""

    def forward(self, x):
        return 0.0


def load_balance_loss(logits, probs, counts):
    """E sum_e f_e P_e, summed over tokens: f the share of picks that went to expert e,
    P its mean probability (Switch Transformers, eq. 4).

    Each sequence is a group of its own (as in GShard, Lepikhin et al. 2020,
    https://arxiv.org/abs/2006.16668, section 2.2): then the gradient does not depend on how a batch
    is cut into micro-batches and shared out over processes.
    """
    T, E = probs.shape[1:]
    f = counts / counts.sum(dim=-1, keepdim=True)                                       # (B, E)
    return BALANCE_LOSS * E * T * (f * probs.mean(dim=1)).sum()


def router_z_loss(logits, probs, counts, coefficient):
    """logsumexp(logits)^2, summed over tokens: keeps logits small
    (ST-MoE, Zoph et al. 2022, https://arxiv.org/abs/2202.08906, eq. 5)."""
    return coefficient * logits.logsumexp(dim=-1).square().sum()


class MoE(nn.Module):
    """x (B, T, C) -> the sum of each token's K of E experts, weighted by its router's normalized
    scores, plus the shared experts'.

    mlp: the class of the dense MLP: its `act` and `fused` make the experts, which have no biases; S
    shared experts are one MLP of S times their width. For the LoadBalancer, `seen` sums up training
    passes: tokens per expert (E), then the norms of logits and the entropies of probabilities of
    all tokens. `penalty` is the auxiliary losses of the latest pass as a number that is 0 and has
    their gradient.
    """

    def __init__(self, config, mlp):
        super().__init__()
        E, C, width = config.n_experts, config.n_embd, expert_width(config,
                                                                    mlp.width(config.n_embd))
        self.n_active, self.score, self.act = config.n_active, SCORES[config.router], mlp.act
        self.router = Router(C, E, bias=False)
        self.c_fc, self.c_proj = ExpertLinear(E, C, mlp.fused * width), ExpertLinear(E, width, C)
        self.shared = mlp(config, config.n_shared * width) if config.n_shared else NoShared()
        self.bias_rate = BIAS_RATE if config.balance == "bias" else 0.0
        self.losses = [loss for loss, on in (
            (load_balance_loss, config.balance == "loss"),
            (partial(router_z_loss, coefficient=config.router_z_loss), config.router_z_loss)) if on]
        self.penalty = 0.0
        self.register_buffer("bias", torch.zeros(E))
        self.register_buffer("seen", torch.zeros(E + 2), persistent=False)
        self.register_buffer("scale", torch.ones(()),
                             persistent=False)  # of the penalty, see LoadBalancer.weigh

    def forward(self, x):
        B, T, C = x.shape
        gates, picked, counts = self.route(x)
        # 1) sort (token, pick) by expert; bytes sort in the fewest passes
        order = picked.flatten().to(torch.uint8).argsort(stable=True)                   # (B T K,)
        inverse = torch.empty_like(order).scatter_(0, order,
                                                   torch.arange(len(order), device=x.device))
        ends = counts.sum(dim=0).cumsum(0).to(torch.int32)                              # (E,)
        # 2) every expert on its rows
        rows = cast(x).view(-1, 1, C).expand(-1, self.n_active, -1).reshape(-1, C)      # (B T K, C)
        rows = _Permute.apply(rows, order, inverse)
        # on hidden units: what comes out is just summed
        weights = _Permute.apply(gates.view(-1, 1), order, inverse)
        rows = self.act(self.c_fc(rows, ends))
        rows = self.c_proj((rows * weights).type_as(rows), ends)
        # 3) back in order, and the sum over a token's experts
        y = _Permute.apply(rows, inverse, order).view(B, T, self.n_active, C)
        return y.sum(dim=2) + self.shared(x)

    def route(self, x):
        """-> gates (B, T, K), which add up to 1 for each token; the experts picked (B, T, K);
        tokens per sequence and expert (B, E)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x)  # (B, T, E), in fp32
            scores = self.score(logits)
            picked = top(scores.detach() + self.bias,
                         self.n_active)  # the bias picks, and does not weigh
            chosen = picked[..., None] == torch.arange(len(self.bias),
                                                       device=x.device)  # (B, T, K, E)
            gates = (scores[..., None, :] * chosen).sum(
                dim=-1)  # not gather: its gradient takes atomics
            gates = gates / gates.sum(dim=-1, keepdim=True).clamp_min(1e-20)
            counts, probs = chosen.sum(
                dim=(1, 2)), scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)
            self.penalty = 0.0
            if self.training:
                for loss_of in self.losses:
                    loss = loss_of(logits, probs, counts)
                    self.penalty = self.penalty + self.scale * (loss - loss.detach())
                entropies = torch.special.entr(probs.detach()).sum()
                self.seen += torch.cat(
                    (counts.sum(dim=0), torch.stack(
                        (logits.detach().norm(dim=-1).sum(), entropies))))
        return gates, picked, counts


# ----------------------------------------------------------------------------------------------------------------------
# Balance


class LoadBalancer:
    """Once per step: nudges the biases of all MoE layers and tells how their tokens were shared
    out. Does nothing for a dense model."""

    def __init__(self, model, processes, say):
        """say: called with a line about experts that get next to no tokens. Passes made before,
        to probe the memory, are forgotten."""
        self.layers, self.distributed, self.say = [
            m for m in model.modules() if isinstance(m, MoE)
        ], processes.distributed, say
        self.idle = [[0] * len(layer.bias)
                     for layer in self.layers]  # steps in a row that an expert was starved
        self.told = ""
        self._forget()

    def _forget(self):
        for layer in self.layers:
            layer.seen.zero_()
            layer.penalty = 0.0  # a tensor of the graph of a pass, which could not be copied

    def weigh(self, share):
        """The share of a step's tokens that are targets, a tensor: the loop divides all losses by
        the number of targets, and auxiliary losses are of all tokens."""
        for layer in self.layers:
            layer.scale.copy_(share)

    @torch.no_grad()
    def __call__(self, finite):
        """-> per layer {tag: number, or list of loads by expert}; finite: False for a step that is
        skipped, which nudges nothing.

        Called by every process. Waits for the device: where the loop has just done so, a few
        numbers more cost nothing.
        """
        if not self.layers:
            return {}
        seen = torch.stack([layer.seen for layer in self.layers])  # (layers, E + 2)
        if self.distributed:
            dist.all_reduce(seen)  # every process sees the same, and its biases stay the others'
        self._forget()
        for layer, counts in zip(self.layers, seen[:, :-2], strict=True):
            if finite:
                layer.bias += layer.bias_rate * (counts.mean() - counts).sign()
        report = {}
        for i, (*counts, norms, entropies) in enumerate(seen.tolist()):
            mean = sum(counts) / len(counts)
            tokens = sum(counts) / self.layers[i].n_active
            report |= {
                f"moe/load_{i:02d}": [n / mean for n in counts],
                f"moe/max_load_{i:02d}": max(counts) / mean, f"moe/dead_{i:02d}": counts.count(0.0),
                f"moe/entropy_{i:02d}": entropies / tokens,
                f"moe/logit_norm_{i:02d}": norms / tokens
            }
            self.idle[i] = [
                0 if n >= STARVED * mean else steps + 1
                for n, steps in zip(counts, self.idle[i], strict=True)
            ]
        self._tell()
        return report

    def _tell(self):
        """Say which layers have experts that get next to no tokens, whenever that has changed."""
        found = []
        for i, (layer, idle) in enumerate(zip(self.layers, self.idle, strict=True)):
            if dead := sum(steps >= PATIENCE for steps in idle):
                collapsed = dead == len(idle) - layer.n_active
                found.append(
                    f"layer {i} {dead} of {len(idle)}{', its router has collapsed' if collapsed else ''}"
                )
        told = "; ".join(found)
        if told and told != self.told:
            self.say(
                f"experts with less than {STARVED:.0%} of an even share of the tokens in each of {PATIENCE} steps: {told}"
            )
        self.told = told
