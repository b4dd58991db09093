"""Fused output head and cross-entropy, one chunk of tokens at a time, without keeping the logits.

Logits are the largest tensor of a small model: 65,536 tokens times 50,304 ids are 6.6 GB in bf16,
13 GB in fp32, and autograd keeps them. Here the gradients of a chunk are computed together with its
logits, which are then freed. All chunks have the same size, so they share one compiled graph.
"""

from typing import Any

import torch
import torch.nn.functional as F

from lib.devices import cast

LOGITS = 2**30  # logits in memory at a time: 2 GB in bf16
# On a CPU, the logits of 256 tokens stay in its cache. With a larger vocabulary, adding each chunk
# to the gradient of the weight costs more than that saves.
CPU_CHUNK = 256
CPU_VOCAB = 16_384
FAR = 60.0      # nats: exp(FAR), summed over any vocabulary, is far from the largest bf16
# In fp16, which spans 6e-8 to 65,504, probabilities are multiplied by UP, so that those of 1e-6
# keep their digits, and x by DOWN, so that sums over the tokens of a chunk do not overflow.
UP = 2.0**8
DOWN = 2.0**-10


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Bound logits z to -cap..cap, nearly unchanged around 0: cap z / sqrt(z^2 + cap^2).

    modded-nanogpt's variant of soft-capping in Gemma 2 (https://arxiv.org/abs/2408.00118, section
    2). cap 0: no-op.
    """
    if not cap:
        return logits
    return logits * (logits.square() / cap**2 + 1).rsqrt()


class LinearCrossEntropy(torch.nn.Module):
    """Cross-entropy in nats of the logits x @ weight.T, summed over the targets: a scalar in fp32.

    x: (N, C). weight: (V, C). targets: int64 (N,), -1 is ignored. cap: as in `soft_cap`.
    Under autocast, products are in its dtype and sums in fp32, as in a linear layer and
    F.cross_entropy. In training mode, a logit more than FAR above the target's counts as FAR above
    it. In eval mode there are no gradients.
    """

    def __init__(self, cap: float = 0.0):
        super().__init__()
        self.cap = cap
        self.loss = _loss
        self.loss_and_gradients = _loss_and_gradients

    def compile(self, **settings: Any) -> None:
        """torch.compile the work on a chunk; the loop over chunks stays in Python."""
        self.loss = torch.compile(_loss, **settings)
        self.loss_and_gradients = torch.compile(_loss_and_gradients, **settings)

    def forward(self, x: torch.Tensor, weight: torch.Tensor,
                targets: torch.Tensor) -> torch.Tensor:
        counted = (targets >= 0).float()                                                # (N,)
        args = cast(x), cast(weight), targets.clamp(min=0)[:, None], counted[:, None]
        if self.training and torch.is_grad_enabled():
            return _LinearCrossEntropy.apply(*args, self.cap, self.loss_and_gradients)
        x, weight, targets, counted = args
        loss = torch.zeros((), device=x.device)
        with torch.no_grad():
            for x_c, target, counted_c in _chunks(weight, x, targets, counted):
                loss = loss + self.loss(x_c, weight, target, counted_c, self.cap)
        return loss


def chunk_size(weight: torch.Tensor) -> int:
    """Tokens per chunk, at most. weight: (V, C)."""
    if weight.device.type == "cpu" and len(weight) <= CPU_VOCAB:
        return CPU_CHUNK
    return LOGITS // len(weight)


def _chunks(weight, *tensors):
    """Tensors of N rows -> tuples of their chunks, all of one size if N has a suitable divisor."""
    n = len(tensors[0])
    fewest = -(-n // chunk_size(weight))
    even = next((k for k in range(fewest, 2 * fewest) if n % k == 0), fewest)
    return zip(*(tensor.split(-(-n // even)) for tensor in tensors), strict=True)


def _loss(x, weight, targets, counted, cap):
    """The loss of a chunk of n tokens. x: (n, C). targets, counted: (n, 1)."""
    logits = soft_cap((x @ weight.T).float(), cap)                                      # (n, V)
    nats = F.cross_entropy(logits, targets.squeeze(1), reduction="none")
    return (nats * counted.squeeze(1)).sum()


def _loss_and_gradients(x, weight, targets, counted, dweight, cap):
    """The loss of a chunk and its gradient with respect to x; adds the gradient with respect to the
    weight to dweight, fp32 (V, C).

    The gradient with respect to the logits is (softmax(logits) - one_hot(target)) * counted. With
    e = exp(logits - the target's logit) and its sum s over the vocabulary, the loss is log(s) and
    softmax(logits) is e / s. This e does not need the maximum first, and the division by s moves to
    the narrow factor of both products, so one pass over the logits is enough. In fp16, e would
    overflow, so it is divided by s first: two passes.
    """
    logits = soft_cap((x @ weight.T).float(), cap)                                      # (n, V)
    at_target = logits.gather(1, targets)
    e = (logits - at_target).clamp(max=FAR).exp()
    s = e.sum(dim=1, keepdim=True)
    loss = (s.log() * counted).sum()
    d, d_target = e, 1 - s
    if cap:
        d = e * _slope(logits, cap)
        d_target = (1 - s) * _slope(at_target, cap)
    up = 1.0
    down = 1.0
    share = counted / s
    if x.dtype == torch.float16:
        up = UP
        down = DOWN
        d = d * (up / s)
        d_target = d_target * (up / s)
        share = counted
    dlogits = d.to(x.dtype).scatter(1, targets, d_target.to(x.dtype))  # times s / counted
    dx = ((dlogits @ weight) * (share / up)).to(x.dtype)
    over_tokens = dlogits.T @ (x * (share * down)).to(x.dtype)
    dweight.add_(over_tokens, alpha=1 / (up * down))  # in fp32: each chunk adds to all of it
    return loss, dx


def _slope(capped, cap):
    """The derivative of `soft_cap`, computed from its result."""
    t = 1 - (capped / cap).square()
    t = t.clamp(min=0)  # rounding may put the result of a huge logit above the cap
    return t * t.sqrt()


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients of all chunks in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(ctx, x, weight, targets, counted, cap, loss_and_gradients):
        loss = torch.zeros((), device=x.device)
        dx = []
        dweight = torch.zeros(weight.shape, device=x.device)
        for x_c, target, counted_c in _chunks(weight, x, targets, counted):
            loss_c, dx_c = loss_and_gradients(x_c, weight, target, counted_c, dweight, cap)
            loss = loss + loss_c
            dx.append(dx_c)
        ctx.save_for_backward(torch.cat(dx), dweight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None, None, None, None
