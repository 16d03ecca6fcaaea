"""An estimate of the centre of few noisy values that is robust against outliers (Hodges–Lehmann), with Wilcoxon's interval."""

import math
from collections.abc import Sequence


def hodges_lehmann(values: Sequence[float], alpha: float = 0.05) -> tuple[float, float, float]:
    """(estimate, low, high): the median of all pairwise averages, and the interval of the centres that Wilcoxon's exact signed-rank test
    does not reject at `alpha` (Hollander & Wolfe, Nonparametric Statistical Methods, 3.2–3.3). One outlier in ten values changes little.

    The distribution of the values must be symmetric, as it is for logarithms of ratios of two runs that take turns to go first. With
    fewer than six values there is no 95 % interval, and (−inf, inf) is returned. Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values")
    averages = sorted((one + other) / 2 for index, one in enumerate(values) for other in values[index:])
    middle = len(averages) // 2
    estimate = averages[middle] if len(averages) % 2 else (averages[middle - 1] + averages[middle]) / 2
    outside = rejected(len(values), alpha)
    if outside == 0:
        return estimate, -math.inf, math.inf
    return estimate, averages[outside - 1], averages[-outside]


def rejected(n: int, alpha: float) -> int:
    """How many of the smallest values of the signed-rank statistic together have a probability of at most alpha/2 under the null."""
    ways = [1] + [0] * (n * (n + 1) // 2)  # how many of the 2^n sign patterns give each sum of positive ranks
    for rank in range(1, n + 1):
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    allowed, below = alpha / 2 * 2**n, 0
    for count, each in enumerate(ways):
        below += each
        if below > allowed:
            return count
    raise AssertionError
