"""Hodges–Lehmann's estimate with Wilcoxon's interval: against enumeration, and by simulation with wild values."""

import itertools
import math
import random
import statistics

import pytest

from sku_vllm.stats.signed_rank import hodges_lehmann, rejected


@pytest.mark.parametrize("n", range(1, 13))
def test_the_null_distribution_is_that_of_all_sign_patterns(n):
    sums = sorted(sum(rank for rank, sign in enumerate(signs, 1) if sign) for signs in itertools.product((0, 1), repeat=n))
    count = rejected(n, 0.05)
    assert sum(each < count for each in sums) <= 0.025 * 2**n < sum(each <= count for each in sums)


def test_values_of_a_textbook():
    # tables of the signed-rank statistic: at n = 10, T ≤ 8 is significant at 5 % (two-sided), at n = 6 T ≤ 0, at n = 20 T ≤ 52
    assert [rejected(n, 0.05) for n in (5, 6, 10, 20)] == [0, 1, 9, 53]
    assert hodges_lehmann([1.0, 2.0, 3.0, 4.0]) == (2.5, -math.inf, math.inf)
    estimate, low, high = hodges_lehmann([float(value) for value in range(1, 7)])
    assert (estimate, low, high) == (3.5, 1.0, 6.0)


def test_the_interval_covers_and_one_wild_pair_in_ten_does_not_widen_it_as_it_does_student_s():
    draw, runs, covered, ours, theirs = random.Random(0), 400, 0, 0.0, 0.0
    for _ in range(runs):
        values = [draw.gauss(0, 0.05) * (20 if draw.random() < 0.1 else 1) for _ in range(20)]
        _, low, high = hodges_lehmann(values)
        covered += low <= 0 <= high
        ours += high - low
        theirs += 2 * 2.093 * statistics.stdev(values) / math.sqrt(20)
    assert covered / runs >= 0.95 - 2 * (0.05 * 0.95 / runs) ** 0.5
    assert ours < 0.6 * theirs
