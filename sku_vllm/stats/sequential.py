"""Sequential tests, valid when read after every observation: an interval for a rate, a comparison of two rates, an alarm (CUSUM).

Interval and comparison are e-processes: the expectation under the null is at most 1 at every stopping time, so by Ville's inequality
P(it ever reaches 1/α) ≤ α, however often it is read. Beta-mixture: Robbins 1970; universal inference: Wasserman, Ramdas,
Balakrishnan, PNAS 2020; CUSUM: Page 1954, false alarm bound Lorden 1971.
"""

import math
from dataclasses import dataclass

# Jeffreys' prior: near-optimal regret for a Bernoulli rate, also at the rates near 0 that matter here.
PRIOR = 0.5


def log_marginal(hits: float, n: float) -> float:
    """log ∫ p^hits (1−p)^(n−hits) dBeta(½,½)(p): the likelihood of a sequence with these counts under the mixture."""
    return _log_beta(hits + PRIOR, n - hits + PRIOR) - _log_beta(PRIOR, PRIOR)


def log_likelihood(hits: float, n: float, p: float) -> float:
    """log p^hits (1−p)^(n−hits), with 0·log 0 = 0."""
    if (hits and p <= 0) or (n - hits and p >= 1):
        return -math.inf
    return (hits * math.log(p) if hits else 0.0) + ((n - hits) * math.log1p(-p) if n - hits else 0.0)


def anytime_interval(hits: float, n: float, alpha: float = 0.05) -> tuple[float, float]:
    """A confidence sequence for a rate: with probability ≥ 1 − alpha, the intervals for all n contain the true rate.

    Effective counts of clustered observations need not be whole numbers.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n}")
    if n == 0:
        return 0.0, 1.0
    limit = log_marginal(hits, n) - math.log(1 / alpha)
    rate = hits / n
    return _edge(hits, n, limit, 0.0, rate), _edge(hits, n, limit, 1.0, rate)


def _edge(hits: float, n: float, limit: float, outside: float, inside: float) -> float:
    """The end of the interval by bisection: where the log-likelihood crosses `limit`.

    outside: 0 or 1, returned if it is within the interval too. inside: the estimate.
    """
    if log_likelihood(hits, n, outside) >= limit:
        return outside
    for _ in range(60):
        middle = (outside + inside) / 2
        if log_likelihood(hits, n, middle) >= limit:
            inside = middle
        else:
            outside = middle
    return outside


def log_evidence_lower(low: tuple[float, float], high: tuple[float, float]) -> float:
    """log e-value against "the first arm's rate is at least the second's", from (hits, n) of both.

    Mixture likelihood over the largest likelihood the null allows, so it is valid for any null rates, any order in which
    the arms were served, and any stopping rule.
    """
    (k, n), (j, m) = low, high
    if n == 0 or m == 0:
        return 0.0
    if k * m >= j * n:  # the observed rates satisfy the null, so they are its maximum-likelihood estimate
        best = log_likelihood(k, n, k / n) + log_likelihood(j, m, j / m)
    else:
        best = log_likelihood(k + j, n + m, (k + j) / (n + m))
    return log_marginal(k, n) + log_marginal(j, m) - best


def anytime_p(low: tuple[float, float], high: tuple[float, float]) -> float:
    """The p-value of "the first arm's rate is at least the second's", valid at any time: min(1, 1 / e-value). Arguments: (hits, n)."""
    return math.exp(-max(0.0, log_evidence_lower(low, high)))


@dataclass(slots=True)
class Cusum:
    """Detects that a rate rose from `normal` to `bad`. On average at most one false alarm in `every` observations (Lorden).

    statistic: log-likelihood ratio of `bad` to `normal` over the latest observations, from the start that makes it largest.
    """

    normal: float
    bad: float
    every: int = 100_000
    statistic: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.normal < self.bad < 1:
            raise ValueError(f"need 0 < normal < bad < 1, not {self.normal} and {self.bad}")

    def add(self, hit: bool) -> bool:
        """One observation; True when the alarm is on."""
        step = math.log(self.bad / self.normal) if hit else math.log((1 - self.bad) / (1 - self.normal))
        self.statistic = max(0.0, self.statistic + step)
        return self.statistic >= math.log(self.every)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
