"""The loss of a language model's head without its logits: matrix product and cross-entropy together,
a chunk of tokens at a time.

Logits are the largest tensor of a small model: 65,536 tokens times 50,304 ids are 6.6 GB in bf16, 13 GB in fp32, and autograd
keeps them. Here a chunk's logits turn into its gradients at once, and are gone.
"""

import torch
import torch.nn.functional as F

from lib.devices import cast

CHUNK = 8_192       # tokens whose logits exist at a time; the compiler may keep those of several chunks
CPU_CHUNK = 256     # the same on a CPU: passes over the logits of so many stay in its cache ...
CPU_VOCAB = 16_384  # ... up to so many ids; with more, adding every chunk to the whole weight's gradient
                    # costs more than that saves
FAR = 60.0          # nats: exp(FAR), summed over any vocabulary, is far from the largest bf16


def soft_cap(logits, cap):
    """cap z / sqrt(z^2 + cap^2): logits bounded to -cap..cap, near 0 as they were (modded-nanogpt's form of Gemma 2's,
    https://arxiv.org/abs/2408.00118, section 2). 0: as they are."""
    return logits * (logits.square() / cap**2 + 1).rsqrt() if cap else logits


def linear_cross_entropy(x, weight, targets, cap=0.0):
    """Cross-entropy in nats of the logits x @ weight.T, summed over the targets: a scalar in fp32.

    x: (N, C). weight: (V, C). targets: int64 (N,); those of -1 are not counted. cap: of `soft_cap`, 0: none.
    Under autocast, products are in its dtype and sums in fp32, as those of a linear layer and F.cross_entropy are.
    Where gradients are wanted, a logit more than FAR above the target's counts as if it were FAR above it.
    """
    counted = (targets >= 0).float()                                                    # (N,)
    function = _LinearCrossEntropy.apply if torch.is_grad_enabled() else _forward
    return function(cast(x), cast(weight), targets.clamp(min=0), counted, cap)


def _chunks(weight, *tensors):
    chunk = CPU_CHUNK if weight.device.type == "cpu" and len(weight) <= CPU_VOCAB else CHUNK
    return zip(*(tensor.split(chunk) for tensor in tensors), strict=True)


def _forward(x, weight, targets, counted, cap):
    return sum((F.cross_entropy(soft_cap((x_c @ weight.T).float(), cap), target, reduction="none") * counted_c).sum()
               for x_c, target, counted_c in _chunks(weight, x, targets, counted))


def _slope(capped, cap):
    """The derivative of `soft_cap`, from its result."""
    t = (1 - (capped / cap).square()).clamp(min=0)  # rounding may put the result of a huge logit above the cap
    return t * t.sqrt()


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of the loss by the logits, (softmax(logits) - one_hot(target)) * counted, waits for nothing:
    compute it right away.

    With e = exp(logits - the target's logit) and its sum s over the vocabulary, the loss is log(s) and softmax(logits) is
    e / s. Such an e needs no maximum first, and the division moves to the other, narrow factor of both products: one pass over
    the logits does it all.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, counted, cap):
        loss, dx, dweight = torch.zeros((), device=x.device), [], torch.zeros(weight.shape, device=x.device)
        for x_c, target, counted_c in _chunks(weight, x, targets[:, None], counted[:, None]):
            logits = soft_cap((x_c @ weight.T).float(), cap)                            # (n, V)
            at_target = logits.gather(1, target)
            e = (logits - at_target).clamp(max=FAR).exp()
            s = e.sum(dim=1, keepdim=True)
            loss = loss + (s.log() * counted_c).sum()
            d, d_target = (e, 1 - s) if not cap else (e * _slope(logits, cap), (1 - s) * _slope(at_target, cap))
            dlogits = d.to(x.dtype).scatter(1, target, d_target.to(x.dtype))            # times s / counted
            counted_c = counted_c / s
            dx.append((dlogits @ weight) * counted_c)
            dweight += dlogits.T @ (x_c * counted_c).to(x.dtype)                        # in fp32: each chunk adds to all of it
        ctx.save_for_backward(torch.cat(dx).to(x.dtype), dweight)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None, None, None
