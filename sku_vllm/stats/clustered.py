"""Sequential tests for counts that come in clusters: requests of one user resemble each other, so 1000 of them are not 1000 observations.

Requests are counted by bucket of their user's key (`BUCKETS` of them), and the bucket is the cluster. A difference is believed when two
tests agree, each of which may be read after every request:

- a self-normalised sum over buckets. Under the null a bucket's part of the difference is as likely positive as negative, so S²/V, with V
  the sum of the squared parts, has a Gaussian tail whatever the loads, the correlation or the number of users (Efron 1969; mixture over
  the effect: Robbins 1970). V is at least what the effective counts below have. It is right for few users, and for users who send most
  of the traffic.
- the test of `sequential.py` on effective counts: n / (1 + ρ(m − 1)) observations, with the correlation ρ within buckets estimated from
  all buckets of both arms, and m the size-weighted mean size of a bucket (Kish 1965). It guards the other one at rates near 0, where a
  sum is not Gaussian, and as a guard its p-value may be `GUARD` times as large.

How often the two together are wrong is simulated in tests/stats/test_clustered.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sku_vllm.stats.sequential import anytime_interval, anytime_p

BUCKETS = 64
# Effective observations in the smaller arm at which the mixture of the self-normalised test is sharpest.
SHARPEST = 20.0
GUARD = 50.0
SATURATION = 0.2

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Counts:
    """Hits and sizes by bucket: arrays (…, buckets) of the same shape; leading dimensions are independent experiments."""

    hits: Floats
    sizes: Floats

    @classmethod
    def of(cls, hits: Any, sizes: Any) -> "Counts":
        """From anything that makes an array. Raises ValueError where hits exceed sizes."""
        found = cls(np.asarray(hits, float), np.asarray(sizes, float))
        if found.hits.shape != found.sizes.shape or (found.hits > found.sizes).any() or (found.hits < 0).any():
            raise ValueError("hits and sizes by bucket: of one shape, with 0 <= hits <= sizes")
        return found


@dataclass(frozen=True, slots=True)
class Difference:
    """What two arms' counts say about their difference, arrays (…).

    p_lower, p_higher: p-values of "the first arm's rate is not lower" and "… not higher", valid at any time.
    correlation: within buckets. effective: effective observations of the first and of the second arm.
    """

    p_lower: Floats
    p_higher: Floats
    correlation: Floats
    effective: tuple[Floats, Floats]


def correlation(*arms: Counts) -> Floats:
    """ρ of two answers in one bucket, 0 to 1, from all buckets of all arms: method of moments, plus one standard error.

    A bucket's weight stops growing with its size at 1 / `SATURATION`, or a user who sends most of the traffic would be the common rate.
    """
    hits, sizes = (np.concatenate([getattr(arm, name) for arm in arms], axis=-1) for name in ("hits", "sizes"))
    safe = np.maximum(sizes, 1)
    rates, weights = hits / safe, sizes / (1 + SATURATION * (safe - 1))
    rate = (weights * rates).sum(-1) / np.maximum(weights.sum(-1), 1)
    clusters = np.maximum((sizes > 0).sum(-1), 2)
    binomial = (rate * (1 - rate))[..., None]
    squares = (rates - rate[..., None]) ** 2 * (clusters / (clusters - 1))[..., None]
    told = weights * (1 - 1 / safe)  # a bucket with one answer says nothing about correlation
    pairs = (told * binomial * (1 - 1 / safe)).sum(-1)
    pairs = np.where(pairs > 0, pairs, np.inf)
    found = np.clip((told * (squares - binomial / safe)).sum(-1) / pairs, 0.0, 1.0)
    spread = binomial * (1 / safe + found[..., None] * (1 - 1 / safe))
    return np.asarray(np.clip(found + np.sqrt((2 * (told * spread) ** 2).sum(-1)) / pairs, 0.0, 1.0))


def effective_sizes(arm: Counts, rho: Floats) -> Floats:
    """How many independent observations an arm's are worth."""
    total = arm.sizes.sum(-1)
    mean_size = (arm.sizes**2).sum(-1) / np.maximum(total, 1)
    return np.asarray(total / (1 + rho * np.maximum(mean_size - 1, 0)))


def compare_counts(tested: Counts, control: Counts) -> Difference:
    """Test the first arm's rate against the second's; see the module."""
    rho = correlation(tested, control)
    effective = effective_sizes(tested, rho), effective_sizes(control, rho)
    totals = tested.sizes.sum(-1), control.sizes.sum(-1)
    shares = tested.hits.sum(-1) / np.maximum(totals[0], 1), control.hits.sum(-1) / np.maximum(totals[1], 1)
    normal = _normalised_p(tested, control, effective)
    p = {}
    for name, sign in (("lower", -1), ("higher", 1)):
        candidate = np.where((np.sign(shares[0] - shares[1]) == sign) & (totals[0] > 0) & (totals[1] > 0), normal, 1.0)
        low, high = (0, 1) if sign < 0 else (1, 0)
        exact = _exact_p(shares[low] * effective[low], effective[low], shares[high] * effective[high], effective[high], candidate < 1)
        p[name] = np.maximum(candidate, exact / GUARD)
    return Difference(p["lower"], p["higher"], rho, effective)


def _normalised_p(tested: Counts, control: Counts, effective: tuple[Floats, Floats]) -> Floats:
    """p of "no difference in this direction" from the self-normalised sum over buckets, for the direction that is observed."""
    totals = [np.maximum(arm.sizes.sum(-1), 1)[..., None] for arm in (tested, control)]
    # The common rate weighs an arm by what it is worth: requests of one user, however many, say little of everybody's rate.
    worth = [size[..., None] for size in effective]
    rates = [arm.hits.sum(-1)[..., None] / total for arm, total in zip((tested, control), totals, strict=True)]
    rate = (worth[0] * rates[0] + worth[1] * rates[1]) / np.maximum(worth[0] + worth[1], 1e-9)
    parts = (tested.hits - rate * tested.sizes) / totals[0] - (control.hits - rate * control.sizes) / totals[1]
    squares = (parts**2).sum(-1)
    binomial = (rate * (1 - rate))[..., 0] * sum(1 / np.maximum(size, 1) for size in effective)
    squares = np.maximum(squares, binomial)
    ratio = parts.sum(-1) ** 2 / np.where(squares > 0, squares, np.inf)
    information = np.minimum(*effective) / SHARPEST
    signal = ratio * information / (1 + information)
    # Half of a Gaussian mixture over the effect: only the observed direction is tested.
    log_e = 0.5 * (signal - np.log1p(information)) + np.log1p(_erf(np.sqrt(signal / 2)))
    return np.asarray(np.exp(-np.maximum(log_e, 0.0)))


_erf = np.vectorize(math.erf, otypes=[float])
_exact_where = np.vectorize(lambda k, n, j, m, needed: anytime_p((k, n), (j, m)) if needed else 1.0, otypes=[float])


def _exact_p(k: Floats, n: Floats, j: Floats, m: Floats, needed: Any) -> Floats:
    return np.asarray(_exact_where(k, n, j, m, needed))


def clustered_interval(arm: Counts, alpha: float) -> tuple[float, float]:
    """A confidence sequence for the rate of one arm (arrays of one dimension): `anytime_interval` on effective counts."""
    total = float(arm.sizes.sum())
    if not total:
        return 0.0, 1.0
    size = float(effective_sizes(arm, correlation(arm)))
    return anytime_interval(float(arm.hits.sum()) / total * size, size, alpha)
