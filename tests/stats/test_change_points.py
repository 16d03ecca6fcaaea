"""The detector's stated rates, by simulation; location and trend against independent computation."""

import math

import numpy as np
import pytest
from scipy.stats import beta, chi2_contingency

from sku_vllm.stats.change_points import RecoveryDetector, delay, locate_change, tolerated_rate, trend


def false_alarms(rate: np.ndarray, tolerated: float, stated: float, intervals: int, seed: int) -> int:
    """Alarms over quiet intervals, the detector starting again after each; rate is per probe."""
    random = np.random.default_rng(seed)
    detector, alarms = RecoveryDetector(tolerated, stated), 0
    for _ in range(intervals):
        if detector.update(int((random.random(len(rate)) < rate).sum()), len(rate)):
            alarms += 1
            detector.reset()
    return alarms


@pytest.mark.parametrize(
    "rate", [np.full(32, 0.05), np.full(8, 0.05), np.repeat([0.0, 0.2], [24, 8])], ids=["32 probes", "8 probes", "unequal"]
)
def test_false_alarms_over_ten_thousand_quiet_intervals(rate: np.ndarray) -> None:
    """At the very edge of what is tolerated, at most the stated number of alarms."""
    tolerated = max(float(rate.mean()), 0.05)
    # Stated: at most 0.01 a quiet interval, 100 in 10,000; the count is roughly Poisson, so three deviations are 30.
    alarms = false_alarms(rate, tolerated, 0.01, 10_000, seed=3)
    assert alarms <= 130
    assert false_alarms(rate, tolerated, 1e-4, 10_000, seed=4) <= 4


def test_a_learned_baseline_keeps_the_stated_rate() -> None:
    """100 servers, each with a baseline learned from 5 intervals of 32 probes and 10,000 quiet intervals in all."""
    random = np.random.default_rng(0)
    alarms = 0
    for server in range(100):
        tolerated = tolerated_rate(int(random.binomial(5 * 32, 0.08)), 5 * 32)
        alarms += false_alarms(np.full(32, 0.08), tolerated, 1e-4, 100, seed=server)
    assert alarms <= 4


def test_a_recovery_is_noticed_within_the_stated_delay() -> None:
    stated = delay(0.05, 0.5, 16)
    assert stated is not None and stated <= 2
    random = np.random.default_rng(11)
    late = 0
    for _ in range(300):
        detector = RecoveryDetector(0.05)
        for _ in range(20):
            detector.update(int(random.binomial(16, 0.02)), 16)
        noticed = next(i for i in range(1, 100) if detector.update(int(random.binomial(16, 0.5)), 16))
        late += noticed > stated
    # Stated for 95 %; 300 runs have a standard error of 1.3 points.
    assert late / 300 <= 0.09


def test_a_small_relapse_is_noticed_too() -> None:
    assert (delay(0.05, 0.15, 32) or 999) <= 15
    assert delay(0.05, 0.02, 32) is None


def test_detector_refuses_nonsense_and_survives_extremes() -> None:
    detector = RecoveryDetector(0.01)
    for _ in range(50):
        detector.update(1000, 1000)
    assert math.isfinite(detector.evidence) and detector.evidence >= detector.threshold
    # Once the cause is gone the alarm goes too.
    assert not [detector.update(0, 1000) for _ in range(3)][-1]
    stored = RecoveryDetector(0.01, levels=list(detector.levels))
    assert stored.evidence == detector.evidence
    for wrong in ({"tolerated": 0.0}, {"tolerated": 1.0}, {"tolerated": 0.1, "false_alarms": 0.0}, {"tolerated": 0.1, "levels": [0.0]}):
        with pytest.raises(ValueError):
            RecoveryDetector(**wrong)
    with pytest.raises(ValueError, match="5 hits among 4"):
        detector.update(5, 4)


@pytest.mark.parametrize(("hits", "probes"), [(0, 32), (3, 160), (40, 64), (900, 5000)])
def test_tolerated_rate_is_clopper_pearson(hits: int, probes: int) -> None:
    expected = max(beta.ppf(0.999, hits + 1, probes - hits), 1 / (probes + 1))
    assert tolerated_rate(hits, probes) == pytest.approx(expected, abs=1e-7)


def test_change_is_located_where_it_was_made() -> None:
    random = np.random.default_rng(2)
    hits = [*random.binomial(32, 0.05, 20), *random.binomial(32, 0.4, 6)]
    found = locate_change(hits, [32] * 26)
    assert found is not None and abs(found.index - 20) <= 1 and found.p_value < 0.01 and found.before < 0.1 < 0.3 < found.after
    assert locate_change([1, 1, 1, 1], [32] * 4) is None
    assert locate_change([0, 3], [32, 32]) is None
    gap = locate_change([0, 0, 0, 0, 9, 9, 9], [9, 9, 0, 9, 9, 9, 9])
    assert gap is not None and gap.index == 4


def test_change_point_p_value_is_honest() -> None:
    random = np.random.default_rng(5)
    small = 0
    for run in range(200):
        found = locate_change(random.binomial(20, 0.2, 15), [20] * 15, draws=99, seed=run)
        small += found is not None and found.p_value <= 0.05
    assert small / 200 <= 0.10


def test_trend_matches_the_two_group_test_and_finds_a_drift() -> None:
    # With two informative groups the Cochran-Armitage test is the chi-squared test without correction.
    ours = trend([5, 0, 15], [50, 0, 50])
    assert ours is None
    ours = trend([5, 10, 15], [50, 50, 50])
    assert ours is not None and ours.slope == pytest.approx(0.1)
    merged = chi2_contingency([[5, 10, 15], [45, 40, 35]], correction=False)
    # The linear part explains all of the departure here, since the rates lie on a line.
    assert ours.p_value == pytest.approx(math.erfc(math.sqrt(merged.statistic / 2)), rel=1e-6)
    assert trend([0, 0, 0], [9, 9, 9]) is None
