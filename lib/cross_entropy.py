"""The loss of a language model's head without its logits: matrix product and cross-entropy
together, a chunk of tokens at a time.

Logits are the largest tensor of a small model: 65,536 tokens times 50,304 ids are 6.6 GB in bf16,
13 GB in fp32, and autograd keeps them. Here a chunk's logits turn into its gradients at once, and
are gone. All chunks have one size, so compiling one of them compiles the loss.
"""

import torch
import torch.nn.functional as F

from lib.devices import cast

CHUNK = 16_384  # tokens whose logits exist at a time: 1.6 GB in bf16 with 50,304 ids
CPU_CHUNK = 256  # the same on a CPU: the logits of a chunk stay in its cache
# The largest vocabulary for CPU_CHUNK: with more ids, adding each chunk's gradient to the whole
# weight's costs more than the cache saves.
CPU_VOCAB = 16_384
FAR = 60.0  # nats: exp(FAR), summed over any vocabulary, is far from the largest bf16


def soft_cap(logits, cap):
    """cap z / sqrt(z^2 + cap^2): logits bounded to -cap..cap, near 0 as they were (modded-nanogpt's
    form of Gemma 2's, https://arxiv.org/abs/2408.00118, section 2). 0: as they are."""
    return logits * (logits.square() / cap**2 + 1).rsqrt() if cap else logits


class LinearCrossEntropy(torch.nn.Module):
    """Cross-entropy in nats of the logits x @ weight.T, summed over the targets: a scalar in fp32.

    x: (N, C). weight: (V, C). targets: int64 (N,); those of -1 are not counted. cap: of `soft_cap`,
    0: none. Under autocast, products are in its dtype and sums in fp32, as those of a linear layer
    and F.cross_entropy are. In training mode a logit more than FAR above the target's counts as if
    it were FAR above it, and there are gradients; in eval mode there are none.
    """

    def __init__(self, cap=0.0):
        super().__init__()
        self.cap = cap
        self.loss = _loss
        self.loss_and_gradients = _loss_and_gradients

    def compile(self, **settings):
        """torch.compile what happens to a chunk; the loop over chunks stays in Python."""
        self.loss = torch.compile(_loss, **settings)
        self.loss_and_gradients = torch.compile(_loss_and_gradients, **settings)

    def forward(self, x, weight, targets):
        counted = (targets >= 0).float()                                                # (N,)
        args = cast(x), cast(weight), targets.clamp(min=0)[:, None], counted[:, None]
        if self.training and torch.is_grad_enabled():
            return _LinearCrossEntropy.apply(*args, self.cap, self.loss_and_gradients)
        with torch.no_grad():
            x, weight, targets, counted = args
            return sum(self.loss(part, weight, target, counted_part, self.cap)
                       for part, target, counted_part in _chunks(weight, x, targets, counted))


def _chunks(weight, *tensors):
    """Tensors of N rows -> tuples of their chunks, all of one size where N has a fitting divisor.
    """
    most = CPU_CHUNK if weight.device.type == "cpu" and len(weight) <= CPU_VOCAB else CHUNK
    n = len(tensors[0])
    fewest = -(-n // most)
    even = next((k for k in range(fewest, 2 * fewest) if n % k == 0), fewest)
    return zip(*(tensor.split(-(-n // even)) for tensor in tensors), strict=True)


def _loss(x, weight, targets, counted, cap):
    """Of a chunk of n tokens. x: (n, C). targets, counted: (n, 1)."""
    logits = soft_cap((x @ weight.T).float(), cap)                                      # (n, V)
    nats = F.cross_entropy(logits, targets.squeeze(1), reduction="none")
    return (nats * counted.squeeze(1)).sum()


def _loss_and_gradients(x, weight, targets, counted, dweight, cap):
    """The same -> (loss, its gradient by x); adds the gradient by the weight to dweight, fp32 (V,
    C).

    The gradient of the loss by the logits, (softmax(logits) - one_hot(target)) * counted, waits for
    nothing: compute it right away. With e = exp(logits - the target's logit) and its sum s over the
    vocabulary, the loss is log(s) and softmax(logits) is e / s. Such an e needs no maximum first,
    and the division moves to the other, narrow factor of both products: one pass over the logits
    does it all.
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
    dlogits = d.to(x.dtype).scatter(1, targets, d_target.to(x.dtype))  # times s / counted
    share = counted / s
    dx = ((dlogits @ weight) * share).to(x.dtype)
    dweight += dlogits.T @ (x * share).to(x.dtype)  # in fp32: each chunk adds to all of it
    return loss, dx


def _slope(capped, cap):
    """The derivative of `soft_cap`, from its result."""
    t = (1 - (capped / cap).square()).clamp(
        min=0)  # rounding may put the result of a huge logit above the cap
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
