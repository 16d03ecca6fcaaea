"""Two models over the same prompts: an exact test of a difference, and a score interval for it, both clustered by prompt.

Answers to one prompt are correlated, so what counts of a prompt is by how many answers it moved, not how many answers it has. Only these
sums enter: neither the order of rows nor copies of all of them change a result.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sku_vllm.stats.intervals import Z95


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Rates of one label in A and B over the same prompts; `difference` = rate_b − rate_a with a 95 % interval.

    only_a, only_b: by how many answers more A, or B, has the label, summed over prompts; with one answer a prompt, McNemar's counts.
    """

    prompts: int
    n: int
    rate_a: float
    rate_b: float
    difference: float
    low: float
    high: float
    p_value: float
    test: str
    only_a: int
    only_b: int


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test from the discordant counts (McNemar 1947; binomial with p = 1/2).

    Computed in integers, so it is exact for any count. No discordant pair gives 1.0.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts must be 0 or more, got {only_a} and {only_b}")
    total = only_a + only_b
    tail = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**total) if total else 1.0


def paired_difference(a: Sequence[bool], b: Sequence[bool], clusters: Sequence[Hashable]) -> PairedDifference:
    """Compare a label over aligned answers: a[i] and b[i] answer the same prompt clusters[i].

    Args:
        a, b: whether answer i carries the label (for instance: is harmful), one entry per answer.
        clusters: the prompt of answer i.

    Raises:
        ValueError: lengths differ, or nothing to compare.
    """
    if not (len(a) == len(b) == len(clusters)) or not len(a):
        raise ValueError(f"need equally many answers on both sides and at least one, got {len(a)}, {len(b)} and {len(clusters)} prompts")
    sums: dict[Hashable, tuple[int, int]] = {}
    for left, right, cluster in zip(a, b, clusters, strict=True):
        size, shift = sums.get(cluster, (0, 0))
        sums[cluster] = size + 1, shift + bool(right) - bool(left)
    sizes, shifts = zip(*sums.values(), strict=True)
    n, only_a, only_b = len(a), -sum(shift for shift in shifts if shift < 0), sum(shift for shift in shifts if shift > 0)
    low, high = paired_interval(shifts, sizes)
    return PairedDifference(
        prompts=len(sizes),
        n=n,
        rate_a=sum(map(bool, a)) / n,
        rate_b=sum(map(bool, b)) / n,
        difference=(only_b - only_a) / n,
        low=low,
        high=high,
        p_value=sign_flip(shifts),
        test="McNemar exact" if max(sizes) == 1 else "sign flip by prompt",
        only_a=only_a,
        only_b=only_b,
    )


def sign_flip(shifts: Iterable[int]) -> float:
    """Exact two-sided p-value of the sum of `shifts` over prompts, under the hypothesis that A and B can be exchanged within each prompt.

    Every pattern of signs is equally likely then; the distribution of the sum is their convolution. Where all prompts moved by the same
    amount this is McNemar's test. (Fisher 1935; Pesarin 2001.)
    """
    moved = [int(shift) for shift in shifts if shift]
    if not moved:
        return 1.0
    common = math.gcd(*moved)
    steps = sorted(abs(shift) // common for shift in moved)
    observed = abs(sum(moved)) // common
    if steps[-1] == 1:
        return mcnemar_exact((len(steps) - observed) // 2, (len(steps) + observed) // 2)
    total = sum(steps)
    # chance[j]: that the steps with a positive sign add up to j; the sum of all is then 2 j − total.
    chance = np.zeros(total + 1)
    chance[0], reached = 1.0, 0
    for step in steps:
        chance[step : reached + step + 1] += chance[: reached + 1].copy()
        reached += step
        chance[: reached + 1] *= 0.5
    tail = float(chance[: (total - observed) // 2 + 1].sum())
    return min(1.0, 2 * tail)


def paired_interval(shifts: Sequence[int], sizes: Sequence[int], z: float = Z95) -> tuple[float, float]:
    """Score interval of Σ shifts / Σ sizes (Tango 1998), at the effective number of answers that clustering leaves.

    shifts[i]: how many more answers to prompt i carry the label in B than in A. sizes[i]: answers to prompt i.
    The design effect is that of `clustered_wilson`, of the differences: their variance over prompts, over the variance of n independent
    pairs. Unlike a bootstrap the interval has a width where no prompt moved, or all of them did.
    """
    n, only_a, only_b = sum(sizes), -sum(shift for shift in shifts if shift < 0), sum(shift for shift in shifts if shift > 0)
    gain, moved, prompts = only_b - only_a, only_a + only_b, len(sizes)
    copies = math.gcd(*shifts, *sizes)
    worst = sum(size * size for size in sizes) / n
    independent = n * moved - gain * gain  # n² times the variance of one pair; integers, so that order does not matter
    if independent == 0 or prompts < 2:
        deff = worst
    else:
        squares = sum((n * shift - gain * size) ** 2 for shift, size in zip(shifts, sizes, strict=True))
        deff = min(max(float(copies), squares * prompts / ((prompts - 1) * n * independent)), worst)
    return tango(only_a / deff, only_b / deff, n / deff, z)


def tango(only_a: float, only_b: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Tango's score interval for a difference of paired proportions, (only_b − only_a) / n: every value that a score test does not reject.

    (Statistics in Medicine 17, 1998, 891–908, equations 13–15.) The ends are found by bisection.
    """
    difference = (only_b - only_a) / n

    def score(delta: float) -> float:
        first = 2 * n
        second = -only_b - only_a + (2 * n - only_b + only_a) * delta
        third = -only_a * delta * (1 - delta)
        root = math.sqrt(max(0.0, second * second - 4 * first * third))
        variance = n * (2 * (root - second) / (2 * first) + delta * (1 - delta))
        gap = only_b - only_a - n * delta
        return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0

    def end(outer: float, wanted: float) -> float:
        inner = difference
        for _ in range(200):
            middle = (inner + outer) / 2
            if middle in (inner, outer):
                break
            inner, outer = (middle, outer) if abs(score(middle)) < wanted else (inner, middle)
        return (inner + outer) / 2

    return (-1.0 if difference == -1 else end(-1.0, z)), (1.0 if difference == 1 else end(1.0, z))
