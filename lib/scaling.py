"""Predicts the loss and the speed of runs of --preset speedrun, to choose a size (lib/sizing.py).

Loss in bits per byte of N parameters after D bytes of text, after Hoffmann et al. 2022 (Chinchilla,
https://arxiv.org/abs/2203.15556):

    L = E + A / N^a + B / (D' - D0)^b        N in millions, D in megabytes

D0 is what a run spends before its loss falls as a power of the text: it matters in runs of seconds.
Below 2 D0, D'^2 / (4 D0) continues D' - D0 with the same slope, so that less text is always worse.
D' discounts repeated text after Muennighoff et al. 2023 (https://arxiv.org/abs/2305.16264): of U
different bytes, all repetitions together are worth at most R U. Time per token is proportional to
its FLOPs plus a constant, which the small matrices of small models cost.

All numbers are in scaling.json, which benchmarks/fit_scaling.py writes; it names their sources.
benchmarks/scaling_202611.md has the errors.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).parent / "scaling.json"


class Law(NamedTuple):
    """The law of the loss."""

    floor: float      # E
    size: float       # A
    size_power: float
    text: float       # B
    text_power: float
    repeats: float    # R
    delay: float      # D0

    def loss(self, parameters: float, text: float, different: float) -> float:
        """Bits per byte after `text` bytes, of which `different` are different."""
        worth = self.worth(text / 1e6, different / 1e6)
        after = worth - self.delay
        if worth < 2 * self.delay:
            after = worth**2 / (4 * self.delay)
        of_text = self.text * after**-self.text_power
        return self.floor + self.size * (parameters / 1e6) ** -self.size_power + of_text

    def worth(self, text: float, different: float) -> float:
        """The text that was never repeated and teaches as much."""
        if text <= different:
            return text
        repetitions = text / different - 1
        return different * (1 + self.repeats * (1 - math.exp(-repetitions / self.repeats)))


class Scaling(NamedTuple):
    """The content of scaling.json.

    replicas: laws fitted without one of the sizes each, for error bars. error: relative, of points
    left out of the fit. overhead: FLOPs per token of the constant. speed: FLOP/s on `card`,
    overhead included. sizes, text: the smallest and largest parameters and bytes measured.
    """

    law: Law
    replicas: list[Law]
    error: float
    overhead: float
    speed: float
    card: str
    sizes: list[float]
    text: list[float]
    sources: list[str]

    def predict(self, parameters: float, text: float, different: float) -> tuple[float, float]:
        """(bits per byte, its standard error): of the fit, by the jackknife over its sizes, and of
        a single run."""
        loss = self.law.loss(parameters, text, different)
        others = [law.loss(parameters, text, different) for law in self.replicas]
        mean = sum(others) / len(others)
        share = (len(others) - 1) / len(others)
        variance = share * sum((other - mean) ** 2 for other in others)
        return loss, math.sqrt(variance + (self.error * loss) ** 2)

    def extrapolates(self, parameters: float, text: float) -> bool:
        """Whether a prediction is outside of what was measured."""
        within = self.sizes[0] <= parameters <= self.sizes[1]
        return not (within and self.text[0] <= text <= self.text[1])


@functools.cache
def measured() -> Scaling:
    fields: dict[str, Any] = json.loads(PATH.read_text())
    fields["law"] = Law(**fields["law"])
    fields["replicas"] = [Law(*numbers) for numbers in fields["replicas"]]
    return Scaling(**fields)
