"""Tests whether a rate has changed over time: an online detector with a proven false alarm rate, the place of a change, the trend.

The detector is an e-detector of Shiryaev-Roberts type (Shin, Ramdas and Rinaldo 2022, arXiv 2203.03532). An interval with k hits
among n probes contributes the likelihood ratio e = (p1/p0)^k · ((1−p1)/(1−p0))^(n−k), whose mean is at most 1 while the average
hit probability of the probes is at most p0 (for unequal probes by Jensen's inequality, since log(b + p·(a−b)) is concave in p).
M ← (M + 1)·e averaged over several p1 then keeps M_t − t a supermartingale, so the mean time to a false alarm at M ≥ A is at
least A intervals, whatever the rates below p0 and however often one looks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Alternatives p1 as fractions of the way from the tolerated rate p0 to 1, so that small and large rises are both detected soon.
STEPS = (0.1, 0.2, 0.35, 0.5, 0.75)


@dataclass(slots=True)
class RecoveryDetector:
    """Detects a rate above `tolerated`. Call `update(hits, probes)` once per interval; it returns True for an alarm.

    false_alarms: while the rate is at most `tolerated`, the mean time to a false alarm is at least 1 / false_alarms intervals.
    levels: the statistic for each alternative in `STEPS`; it is all the state there is, to be stored between intervals.
    """

    tolerated: float
    false_alarms: float = 1e-4
    levels: list[float] = field(default_factory=lambda: [0.0] * len(STEPS))

    def __post_init__(self) -> None:
        if not 0 < self.tolerated < 1:
            raise ValueError(f"the tolerated rate must lie between 0 and 1, got {self.tolerated}")
        if not 0 < self.false_alarms <= 1:
            raise ValueError(f"the false alarm rate must be above 0 and at most 1 per interval, got {self.false_alarms}")
        if len(self.levels) != len(STEPS):
            raise ValueError(f"the stored detector has {len(self.levels)} levels, this version has {len(STEPS)}")

    @property
    def evidence(self) -> float:
        """The Shiryaev-Roberts statistic M; an alarm is raised at `threshold`."""
        return sum(self.levels) / len(self.levels)

    @property
    def threshold(self) -> float:
        """The evidence at which an alarm is raised: 1 / false_alarms."""
        return 1 / self.false_alarms

    def update(self, hits: int, probes: int) -> bool:
        """Add one interval with `hits` among `probes`; True while the alarm is on. An interval without probes changes nothing."""
        if not 0 <= hits <= probes:
            raise ValueError(f"{hits} hits among {probes} probes")
        if probes:
            for i, step in enumerate(STEPS):
                raised = self.tolerated + (1 - self.tolerated) * step
                gain = hits * math.log(raised / self.tolerated) + (probes - hits) * math.log((1 - raised) / (1 - self.tolerated))
                # The cap lets an alarm end a few intervals after the rate is normal again. It only lowers M, so the guarantee holds.
                self.levels[i] = min((self.levels[i] + 1) * math.exp(min(gain, 600.0)), len(STEPS) * self.threshold)
        return self.evidence >= self.threshold

    def reset(self) -> None:
        """Set the evidence back to 0."""
        self.levels = [0.0] * len(STEPS)


def tolerated_rate(hits: int, probes: int, *, confidence: float = 0.999) -> float:
    """The tolerated rate from a baseline count: its upper Clopper-Pearson bound, but at least 1/(probes + 1).

    The true baseline rate is below it with probability at least `confidence`, and then the detector's guarantee holds.
    """
    if not 0 <= hits <= probes or not probes:
        raise ValueError(f"a baseline needs at least one probe, got {hits} hits among {probes}")
    if hits == probes:
        return 1 - 1e-6
    low, high = hits / probes, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _binomial_cdf(hits, probes, middle) > 1 - confidence else (low, middle)
    return max(high, 1 / (probes + 1))


def delay(tolerated: float, rate: float, probes: int, *, false_alarms: float = 1e-4, quantile: float = 0.95, seed: int = 0) -> int | None:
    """Intervals within which a jump to `rate` is noticed in `quantile` of the cases, by simulation; None beyond 1,000."""
    random = np.random.default_rng(seed)
    delays = []
    for _ in range(400):
        detector, waited = RecoveryDetector(tolerated, false_alarms), 1
        while not detector.update(int(random.binomial(probes, rate)), probes) and waited <= 1000:
            waited += 1
        delays.append(waited)
    found = int(np.quantile(delays, quantile, method="higher"))
    return found if found <= 1000 else None


@dataclass(frozen=True, slots=True)
class ChangePoint:
    """The best split of a series: intervals before `index` against those from it on."""

    index: int
    before: float
    after: float
    p_value: float


def locate_change(hits: Sequence[int], probes: Sequence[int], *, draws: int = 999, seed: int = 0) -> ChangePoint | None:
    """Where a binomial series changed most (largest likelihood ratio over all splits); p by permuting the intervals.

    None for fewer than four intervals or a series without any variation.
    """
    k, n = np.asarray(hits, dtype=float), np.asarray(probes, dtype=float)
    keep = n > 0
    if keep.sum() < 4 or len(set((k[keep] / n[keep]).tolist())) == 1:
        return None
    places, k, n = np.flatnonzero(keep), k[keep], n[keep]
    gains = _split_gains(k[None], n[None])[0]
    best = int(gains.argmax())
    random = np.random.default_rng(seed)
    order = np.argsort(random.random((draws, len(k))), axis=1)
    shuffled = _split_gains(k[order], n[order]).max(axis=1)
    p_value = float(((shuffled >= gains[best] - 1e-12).sum() + 1) / (draws + 1))
    cut = best + 1
    return ChangePoint(int(places[cut]), float(k[:cut].sum() / n[:cut].sum()), float(k[cut:].sum() / n[cut:].sum()), p_value)


@dataclass(frozen=True, slots=True)
class Trend:
    """Slope of the rate per interval and the two-sided p-value of the Cochran-Armitage test."""

    slope: float
    p_value: float


def trend(hits: Sequence[int], probes: Sequence[int]) -> Trend | None:
    """Linear drift of a binomial rate over equally spaced intervals (Cochran 1954, Armitage 1955).

    None for fewer than three intervals or where every probe hit or none did.
    """
    k, n = np.asarray(hits, dtype=float), np.asarray(probes, dtype=float)
    pooled = k.sum() / n.sum() if n.sum() else 0.0
    if (n > 0).sum() < 3 or pooled in (0.0, 1.0):
        return None
    time = np.arange(len(k), dtype=float)
    centred = time - (n * time).sum() / n.sum()
    spread = float((n * centred**2).sum())
    score = float((k * centred).sum())
    z = score / math.sqrt(pooled * (1 - pooled) * spread)
    return Trend(score / spread, math.erfc(abs(z) / math.sqrt(2)))


def _split_gains(k: np.ndarray, n: np.ndarray) -> np.ndarray:
    """[draws, intervals − 1] log-likelihood gains of splitting after each interval; k and n are [draws, intervals]."""
    left_k, left_n = k.cumsum(axis=1)[:, :-1], n.cumsum(axis=1)[:, :-1]
    total_k, total_n = k.sum(axis=1, keepdims=True), n.sum(axis=1, keepdims=True)
    gains: np.ndarray = _loglik(left_k, left_n) + _loglik(total_k - left_k, total_n - left_n) - _loglik(total_k, total_n)
    return gains


def _loglik(k: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Maximised binomial log-likelihood of k hits among n, with 0·log 0 = 0."""
    rate = k / n
    found: np.ndarray = k * np.log(np.where(k > 0, rate, 1.0)) + (n - k) * np.log(np.where(k < n, 1 - rate, 1.0))
    return found


def _binomial_cdf(hits: int, probes: int, rate: float) -> float:
    """P(X ≤ hits) for X binomial, summed in logarithms so that ten thousand probes do not underflow."""
    logs = [
        math.lgamma(probes + 1) - math.lgamma(i + 1) - math.lgamma(probes - i + 1) + i * math.log(rate) + (probes - i) * math.log1p(-rate)
        for i in range(hits + 1)
    ]
    top = max(logs)
    return math.exp(top) * sum(math.exp(value - top) for value in logs)
