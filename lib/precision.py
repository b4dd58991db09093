"""Mixed precision in training: the autocast context, and in fp16 the scale of the loss."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lib.devices import autocast, dtype_of

# torch.amp.GradScaler's settings
START = 2.0**16
INTERVAL = 2000  # steps without overflow until the scale is doubled
# An overflow at this scale or below is not due to the scale.
LEAST = 1.0


class Precision:
    """The precision of a training run: `model`'s, see lib/devices.py's `dtype_of`.

    The smallest fp16 number is 6e-8, above many gradients. So the loss is multiplied by a scale
    before the backward pass, and the gradients are divided by it (Micikevicius et al. 2018,
    https://arxiv.org/abs/1710.03740, section 3.2). A step whose gradients overflow is skipped and
    halves the scale. In bf16 and fp32 the scale is always 1.

    torch.amp.GradScaler does the same, but keeps the scale on the device: it synchronizes once more
    per step, and each process decides on its own whether to skip a step.

    state: `state_dict` of a checkpoint, or None.
    """

    def __init__(self, model: torch.nn.Module, state: dict[str, Any] | None = None):
        state = state or {}
        self.model = model
        self.scaled = dtype_of(model) == torch.float16
        if self.scaled:  # sums of products would overflow
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self.scale = state.get("scale", START) if self.scaled else 1.0
        self.good_steps = state.get("good_steps", 0)  # since the scale was last changed
        self.adjustments = state.get("adjustments", 0)  # skipped steps so far that halved the scale

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes."""
        return autocast(self.model)

    @torch.no_grad()
    def unscale(self, parameters: Sequence[torch.Tensor]) -> None:
        """Divide the gradients by the scale. It is a power of two, so this is exact."""
        if self.scaled:
            gradients: Any = [p.grad for p in parameters]
            torch._foreach_mul_(gradients, 1 / self.scale)

    def grow(self) -> None:
        """Count a step that did not overflow."""
        self.good_steps += 1
        if self.scaled and self.good_steps % INTERVAL == 0:
            self.scale *= 2

    def overflowed(self, loss: float) -> bool:
        """Whether loss or gradients of a step are non-finite because the scale is too large, which
        is then halved.

        A non-finite loss is not due to the scale, which is applied after it.
        """
        if not math.isfinite(loss) or self.scale <= LEAST:
            return False
        self.good_steps = 0
        self.scale /= 2
        self.adjustments += 1
        return True

    @property
    def remedy(self) -> str:
        """What else to try after non-finite steps, as part of a sentence."""
        return " or give --dtype fp32" if self.scaled else ""

    def scalars(self) -> dict[str, float]:
        """What TensorBoard shows."""
        if not self.scaled:
            return {}
        return {"optim/loss_scale": self.scale, "optim/scale_adjustments": self.adjustments}

    def state_dict(self) -> dict[str, dict]:
        """Entries of a checkpoint, none if the loss was never scaled."""
        if self.scaled:
            state = {"scale": self.scale, "good_steps": self.good_steps,
                     "adjustments": self.adjustments}
        elif self.adjustments:  # continued in another dtype
            state = {"adjustments": self.adjustments}
        else:
            return {}
        return {"loss_scale": state}
