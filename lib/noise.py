"""How far losses of runs differ by their seeds alone."""

import math
import statistics

# 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom; the last serves for more
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_quantile(freedom: int) -> float:
    return T_QUANTILES[min(freedom, len(T_QUANTILES)) - 1]


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95% confidence interval) of a figure over the seeds.

    Student's t: the spread of a few seeds is itself only an estimate. The width is infinite for a
    single seed.
    """
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, math.inf
    standard_error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, t_quantile(len(values) - 1) * standard_error


def noise_of(groups: list[list[float]]) -> float | None:
    """The difference that two runs exceed by chance in 5% of cases, if they differ only in their
    seed: Student's t times sqrt(2) times the standard deviation.

    groups: losses of runs that differ only in their seed, with one standard deviation in all
    groups. None if no group has two.
    """
    squares = 0.0
    freedom = 0
    for losses in groups:
        mean = statistics.mean(losses)
        squares += sum((loss - mean) ** 2 for loss in losses)
        freedom += len(losses) - 1
    if not freedom:
        return None
    return t_quantile(freedom) * math.sqrt(2 * squares / freedom)
