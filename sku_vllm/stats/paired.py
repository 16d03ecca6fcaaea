"""Two models over the same prompts: McNemar's exact test, a bootstrap clustered by prompt, a sign-flip test clustered by prompt.

Answers to one prompt resemble each other, so the prompt, not the answer, is the unit that is resampled. McNemar's test
needs one answer per prompt (greedy); with several, the sign-flip test takes its place.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

# 10,000 draws put the Monte Carlo error of a p-value near .05 at .002 and of an interval's bound far below its width.
DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Rates of one label in A and B over the same prompts; `difference` = rate_b − rate_a with a 95 % interval."""

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


def paired_difference(
    a: Sequence[bool],
    b: Sequence[bool],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> PairedDifference:
    """Compare a label over aligned answers: a[i] and b[i] answer the same prompt clusters[i].

    Args:
        a, b: whether answer i carries the label (for instance: is harmful), one entry per answer.
        clusters: the prompt of answer i; answers to one prompt are resampled together.

    Raises:
        ValueError: lengths differ, or nothing to compare.
    """
    if not (len(a) == len(b) == len(clusters)) or not len(a):
        raise ValueError(f"need equally many answers on both sides and at least one, got {len(a)}, {len(b)} and {len(clusters)} prompts")
    left, right = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    _, index = np.unique(np.asarray([str(cluster) for cluster in clusters]), return_inverse=True)
    sizes = np.bincount(index)
    shift = np.bincount(index, weights=right.astype(float) - left.astype(float))
    low, high = _bootstrap(shift, sizes, draws, seed)
    only_a, only_b = int((left & ~right).sum()), int((right & ~left).sum())
    single = int(sizes.max()) == 1
    return PairedDifference(
        prompts=len(sizes),
        n=len(left),
        rate_a=float(left.mean()),
        rate_b=float(right.mean()),
        difference=float(shift.sum() / sizes.sum()),
        low=low,
        high=high,
        p_value=mcnemar_exact(only_a, only_b) if single else sign_flip(shift, seed=seed, draws=draws),
        test="McNemar exact" if single else "sign flip by prompt",
        only_a=only_a,
        only_b=only_b,
    )


def sign_flip(shift: Sequence[float], *, seed: int = 0, draws: int = DRAWS) -> float:
    """Two-sided p-value that the sum over prompts of `shift` is 0 when A and B may be exchanged within every prompt.

    Monte Carlo with the observed assignment counted among the draws, so the p-value is valid and never 0.
    """
    shift = np.asarray([value for value in shift if value], dtype=float)
    if not len(shift):
        return 1.0
    signs = np.random.default_rng(seed).integers(0, 2, size=(draws, len(shift)), dtype=np.int8) * 2 - 1
    extreme = np.abs(signs @ shift) >= abs(shift.sum()) - 1e-9
    return float((extreme.sum() + 1) / (draws + 1))


def _bootstrap(shift: np.ndarray, sizes: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of Σ shift / Σ sizes over resampled prompts, widened where no pair is discordant.

    A bootstrap of zeros has no spread; there the rule of three bounds how many prompts could still differ.
    """
    prompts = len(shift)
    if not shift.any():
        bound = 1 - 0.025 ** (1 / prompts)
        return -bound, bound
    random = np.random.default_rng(seed)
    ratios = np.empty(draws)
    # In slices of about 8 MB: 10,000 draws of 10,000 prompts at once would take 800 MB.
    step = max(1, 1_000_000 // prompts)
    for start in range(0, draws, step):
        pick = random.integers(0, prompts, size=(min(step, draws - start), prompts))
        ratios[start : start + step] = shift[pick].sum(axis=1) / sizes[pick].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
