"""The length of a run, which with --minutes depends on the measured speed and so changes during
training."""

from collections.abc import Sequence
from typing import Any

from lib.budget import UNMEASURED, batch_size, steps_in, tokens_of

FIT_SHARE = 0.25  # share of --minutes in which the length follows the speed; then it is fixed
# With --context_warmup, steps with the whole context, which are slower, must be measured, too
WHOLE_CONTEXT = 0.15  # as a share of --minutes


class StepTimer:
    """Keeps the number of steps of a run, and fits it to --minutes of training steps.

    steps: the length so far. timed: (tokens, seconds) measured so far, saved in checkpoints.
    """

    def __init__(self, cfg: Any, steps: int, timed: Sequence[float] = (0, 0.0)):
        self.cfg = cfg
        self.steps = steps
        self.timed = tuple(timed)

    @property
    def is_fixed(self) -> bool:
        """Whether the length is final."""
        if not self.cfg.minutes:
            return True
        share = FIT_SHARE
        if self.cfg.context_warmup:
            share = max(share, self.cfg.context_warmup + WHOLE_CONTEXT)
        return self.timed[1] >= min(share, 1.0) * 60 * self.cfg.minutes

    def length(self, step: int) -> int:
        """Steps that --minutes allow, at least `step`; UNMEASURED before a step was timed."""
        tokens, seconds = self.timed
        if not seconds:
            return UNMEASURED
        left = (60 * self.cfg.minutes - seconds) * tokens / seconds
        return max(steps_in(tokens_of(step, self.cfg) + left, self.cfg), step)

    def update(self, step: int, seconds: float) -> None:
        """Called after `step` updates, the last of which took `seconds`."""
        if not self.cfg.minutes:
            return
        tokens, total = self.timed
        self.timed = (tokens + batch_size(step - 1, self.cfg), total + seconds)
        if not self.is_fixed or self.steps == UNMEASURED:
            self.steps = max(self.length(step), step + 1)
