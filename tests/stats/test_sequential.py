"""Looking early does not inflate error: shown by simulation, looking after every single observation."""

import numpy as np
import pytest

from sku_vllm.stats.sequential import Cusum, anytime_interval, anytime_p, log_likelihood, log_marginal


@pytest.mark.parametrize("rates", [(0.02, 0.02), (0.3, 0.3), (0.3, 0.1)])
def test_looking_after_every_pair_keeps_the_error_below_alpha(rates):
    """Under the null (first rate ≥ second) the test of "first is lower" rejects at some look in at most 5 % of the runs."""
    draw, runs, length = np.random.default_rng(0), 300, 400
    rejected = 0
    for _ in range(runs):
        k = np.cumsum(draw.random(length) < rates[0])
        j = np.cumsum(draw.random(length) < rates[1])
        rejected += any(anytime_p((int(k[n]), n + 1), (int(j[n]), n + 1)) <= 0.05 for n in range(length))
    assert rejected / runs <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5


def test_a_real_difference_is_found():
    draw = np.random.default_rng(1)
    found = [anytime_p((int((draw.random(300) < 0.02).sum()), 300), (int((draw.random(300) < 0.3).sum()), 300)) < 1e-6 for _ in range(20)]
    assert all(found)


def test_the_interval_holds_the_rate_at_every_look_at_once():
    draw, runs, length, missed = np.random.default_rng(2), 200, 500, 0
    for _ in range(runs):
        hits = np.cumsum(draw.random(length) < 0.1)
        for n in (*range(1, 40), *range(40, length, 7)):
            low, high = anytime_interval(int(hits[n - 1]), n)
            if not low <= 0.1 <= high:
                missed += 1
                break
    assert missed / runs <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5


def test_interval_edges():
    assert anytime_interval(0, 0) == (0.0, 1.0)
    low, high = anytime_interval(0, 100)
    assert low == 0.0 and 0.03 < high < 0.12
    low, high = anytime_interval(100, 100)
    assert high == 1.0 and low > 0.88
    with pytest.raises(ValueError):
        anytime_interval(2, 1)


def test_the_mixture_is_a_probability():
    """Summed over all sequences of length 6 the marginal is 1: it is a distribution, which is what makes the ratio an e-value."""
    from math import comb, exp

    assert sum(comb(6, k) * exp(log_marginal(k, 6)) for k in range(7)) == pytest.approx(1)
    assert log_likelihood(0, 5, 0.0) == 0.0 and log_likelihood(1, 5, 0.0) == float("-inf")


def test_cusum_alarms_when_the_rate_rises_and_seldom_before():
    draw = np.random.default_rng(3)
    quiet = Cusum(0.02, 0.1)
    assert not any(quiet.add(bool(hit)) for hit in draw.random(20_000) < 0.02)
    for _ in range(20):
        chart = Cusum(0.02, 0.1)
        delay = next(n for n, hit in enumerate(draw.random(5_000) < 0.15) if chart.add(bool(hit)))
        assert delay < 400
    with pytest.raises(ValueError):
        Cusum(0.2, 0.1)
