"""Wilson's interval against published values, and the clustered one against simulated clusters."""

import numpy as np
import pytest

from sku_vllm.stats import clustered_wilson, wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_newcombe(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 128)[0] == 0.0 and wilson(0, 128)[1] < 0.0292
    assert wilson(128, 128)[1] == 1.0


def test_clusters_of_one_are_wilson_and_copies_add_nothing() -> None:
    hits = [1, 0, 0, 1, 0, 0, 0, 1, 0, 0] * 3
    # n/(n-1) of the cluster variance is all that differs
    assert clustered_wilson(hits, [1] * 30) == pytest.approx(wilson(9, 30), abs=1e-9)
    assert clustered_wilson([4 * hit for hit in hits], [4] * 30) == pytest.approx(wilson(9, 30), abs=0.005)
    assert clustered_wilson([0] * 128, [4] * 128) == wilson(0, 128)
    assert clustered_wilson([], []) == (0.0, 1.0)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.4])
def test_clustered_wilson_covers_where_plain_wilson_does_not(rate: float) -> None:
    random = np.random.default_rng(0)
    covered = plain = 0
    for _ in range(600):
        # Prompts differ a lot: intra-cluster correlation 1 / (a + b + 1) = 0.5.
        probabilities = random.beta(rate, 1 - rate, 128)
        hits = random.binomial(4, probabilities)
        low, high = clustered_wilson(hits.tolist(), [4] * 128)
        covered += low <= rate <= high
        low, high = wilson(int(hits.sum()), 512)
        plain += low <= rate <= high
    assert covered / 600 > 0.92
    assert plain / 600 < 0.87
