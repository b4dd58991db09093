"""The hours and dollars that a run has used so far, and their limits --max_hours and --max_cost.

They count from the start of each process to its end, so they include imports, compilation,
evaluations and earlier starts. Checkpoints store them, so the time that a killed run spent after
its last one is not counted.
"""

import math
import time
from typing import Any

from lib import startup
from lib.budget import hours_and_dollars


class Spending:
    """Hours and dollars that a run has used so far, over all its starts.

    cfg: a TrainConfig. before: the checkpoint that it continues from, or {}. Earlier hours without
    a price get the current one.
    """

    def __init__(self, cfg: Any, before: dict[str, Any]):
        self.cfg = cfg
        self.started = startup.take_start()
        self.hours_before = before.get("hours", 0.0)
        self.dollars_before = before.get("dollars")
        if self.dollars_before is None:
            self.dollars_before = self.hours_before * (cfg.price_per_hour or 0)

    @property
    def hours(self) -> float:
        return self.hours_before + self._now()

    @property
    def dollars(self) -> float | None:
        """None if the price is unknown."""
        if not self.cfg.price_per_hour:
            return None
        return self.dollars_before + self._now() * self.cfg.price_per_hour

    def _now(self) -> float:
        """Hours since this start."""
        return (time.monotonic() - self.started) / 3600

    def state(self) -> dict[str, Any]:
        """Entries for the checkpoint."""
        return {"hours": self.hours, "dollars": self.dollars}

    def limit(self) -> str | None:
        """The limit that is reached, as text; None if there is none."""
        return reached(self.cfg, self.state())

    def hours_left(self) -> float:
        """Hours until a limit is reached; infinite without limits."""
        left = [math.inf]
        if self.cfg.max_hours:
            left.append(self.cfg.max_hours - self.hours)
        if self.cfg.max_cost and self.dollars is not None:
            left.append((self.cfg.max_cost - self.dollars) / self.cfg.price_per_hour)
        return max(min(left), 0.0)

    def foresee(self, step: int, steps: int, seconds: float) -> str | None:
        """A warning if a limit will stop the run before its end, else None.

        seconds: training time of the `steps` - `step` that are left.
        """
        share = 3600 * self.hours_left() / max(seconds, 1e-9)
        if share >= 1:
            return None
        last = step + int(share * (steps - step))
        return (f"warning: --max_hours or --max_cost will stop this run near step {last:,} of "
                f"{steps:,}, before its learning rate has decayed: shorten the run, or raise them")

    def summary(self) -> str | None:
        """A line about what was spent, if a flag asks for it."""
        cfg = self.cfg
        if not (cfg.price_per_hour or cfg.max_hours):
            return None
        text = hours_and_dollars(3600 * self.hours, None)
        if self.dollars is not None:
            text += f", ${self.dollars:,.2f}"
        return f"spent   {text}, start-up and earlier starts included"


def reached(cfg: Any, spent: dict[str, Any]) -> str | None:
    """The limit that `spent`, a checkpoint or the `state` of a Spending, has reached, as text; None
    if there is none."""
    hours = spent.get("hours", 0.0)
    dollars = spent.get("dollars")
    if dollars is None:
        dollars = hours * (cfg.price_per_hour or 0)
    if cfg.max_hours and hours >= cfg.max_hours:
        return f"--max_hours {cfg.max_hours:g}"
    if cfg.max_cost and dollars >= cfg.max_cost:
        return f"--max_cost {cfg.max_cost:g}"
    return None
