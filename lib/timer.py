"""The length of a run, which with --minutes depends on the measured speed and so changes during
training."""

from collections.abc import Sequence
from typing import Any

from lib.budget import UNMEASURED, batch_size, half_steps, steps_in, tokens_of

FIT_SHARE = 0.25  # share of --minutes in which the length follows the speed; then it is fixed
# With --context_warmup, steps with the whole context, which are slower, must be measured, too
WHOLE_CONTEXT = 0.15  # as a share of --minutes
# Whole batches after --batch_warmup are faster per token. Once they have had the first share, their
# speed alone sets the length; once the second, it is fixed
WHOLE_BATCH = (0.05, 0.15)


class StepTimer:
    """Keeps the number of steps of a run, and fits it to --minutes of training steps.

    steps: the length so far. timed: tokens and seconds measured so far, then those of half batches
    and the first whole one, which loads kernels; saved in checkpoints. Older ones lack the latter.
    """

    def __init__(self, cfg: Any, steps: int, timed: Sequence[float] = (0, 0.0)):
        self.cfg = cfg
        self.steps = steps
        self.timed = (*timed, 0, 0.0)[:4]

    @property
    def total(self) -> float:
        """Seconds of --minutes."""
        return 60 * self.cfg.minutes

    @property
    def is_fixed(self) -> bool:
        """Whether the length is final."""
        if not self.cfg.minutes:
            return True
        _, seconds, _, half_seconds = self.timed
        share = FIT_SHARE
        if self.cfg.context_warmup:
            share = max(share, self.cfg.context_warmup + WHOLE_CONTEXT)
        if self.steps > half_steps(self.cfg):
            share = max(share, half_seconds / self.total + WHOLE_BATCH[1])
        return seconds >= min(share, 1.0) * self.total

    def length(self, step: int) -> int:
        """Steps that --minutes allow, at least `step`; UNMEASURED before a step was timed."""
        tokens, seconds, half_tokens, half_seconds = self.timed
        if not seconds:
            return UNMEASURED
        rate = tokens / seconds
        if seconds >= half_seconds + WHOLE_BATCH[0] * self.total:
            rate = (tokens - half_tokens) / (seconds - half_seconds)
        left = (self.total - seconds) * rate
        return max(steps_in(tokens_of(step, self.cfg) + left, self.cfg), step)

    def update(self, step: int, seconds: float) -> None:
        """Called after `step` updates, the last of which took `seconds`."""
        if not self.cfg.minutes:
            return
        tokens = batch_size(step - 1, self.cfg)
        added = (tokens, seconds, 0, 0.0)
        if step - 1 <= half_steps(self.cfg):
            added = (tokens, seconds, tokens, seconds)
        self.timed = tuple(before + new for before, new in zip(self.timed, added))
        if not self.is_fixed or self.steps == UNMEASURED:
            self.steps = max(self.length(step), step + 1)
