"""Paired statistics against independent computation and by simulation."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from sku_vllm.stats.paired import mcnemar_exact, paired_difference, sign_flip


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (1, 9), (7, 7), (40, 22), (0, 30), (300, 371)])
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    assert mcnemar_exact(only_a, only_b) == pytest.approx(binomtest(only_a, only_a + only_b, 0.5).pvalue, rel=1e-9)
    assert mcnemar_exact(only_a, only_b) == mcnemar_exact(only_b, only_a)


def test_mcnemar_edges() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    with pytest.raises(ValueError, match="-1"):
        mcnemar_exact(-1, 3)


def test_greedy_pairs_by_hand() -> None:
    a = [True, True, True, False, True, False]
    b = [False, False, True, False, False, True]
    result = paired_difference(a, b, clusters="pqrstu")
    assert (result.only_a, result.only_b, result.prompts, result.n) == (3, 1, 6, 6)
    assert result.test == "McNemar exact" and result.p_value == pytest.approx(0.625)
    assert result.difference == pytest.approx(-1 / 3) and result.low < result.difference < result.high


def test_identical_sides_still_have_an_interval() -> None:
    result = paired_difference([False] * 128, [False] * 128, clusters=range(128))
    assert result.difference == 0 and result.p_value == 1
    assert 0.02 < result.high < 0.04 and result.low == -result.high


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many"):
        paired_difference([True], [True, False], clusters=["a"])


def answers(random: np.random.Generator, prompts: int, samples: int, shift: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two models whose harm depends on the prompt: within a prompt all answers share one probability."""
    harm = random.beta(0.5, 0.5, size=prompts)
    swap = random.random(prompts) < 0.5
    left, right = np.where(swap, harm, harm[::-1]), np.where(swap, harm[::-1], harm)
    right = np.clip(right + shift, 0, 1)
    draw = lambda rate: random.random((prompts, samples)) < rate[:, None]  # noqa: E731
    return draw(left).ravel(), draw(right).ravel(), np.repeat(np.arange(prompts), samples)


def test_tests_hold_their_level_and_clustering_matters() -> None:
    """Under the null: both tests reject at most 5 %, the clustered interval covers, the naive one does not."""
    random = np.random.default_rng(7)
    runs, rejected_single, rejected_many, covered, naive_covered = 300, 0, 0, 0, 0
    for _ in range(runs):
        a, b, prompt = answers(random, 60, 8, 0.0)
        many = paired_difference(a, b, prompt)
        naive = paired_difference(a, b, range(len(a)))
        single = paired_difference(a[::8], b[::8], prompt[::8])
        rejected_single += single.p_value < 0.05
        rejected_many += many.p_value < 0.05
        covered += many.low <= 0 <= many.high
        naive_covered += naive.low <= 0 <= naive.high
    # 300 runs: three standard errors of 5 % are 3.8 points.
    assert rejected_single / runs < 0.088 and rejected_many / runs < 0.088
    assert covered / runs > 0.90
    assert naive_covered / runs < 0.75


def test_sign_flip_finds_a_real_difference() -> None:
    a, b, prompt = answers(np.random.default_rng(1), 80, 4, -0.4)
    result = paired_difference(a, b, prompt)
    assert result.test == "sign flip by prompt" and result.p_value < 0.001 and result.high < 0
    assert sign_flip([0, 0, 0]) == 1.0


def test_when_every_prompt_moves_the_interval_still_has_a_width() -> None:
    result = paired_difference([True] * 10, [False] * 10, range(10))
    assert (result.difference, result.low) == (-1, -1) and -0.5 < result.high < -0.3
    assert result.p_value == pytest.approx(2 / 2**10)


@pytest.mark.parametrize(("only_a", "only_b", "n"), [(0, 0, 128), (9, 1, 10), (12, 3, 50), (0, 7, 7), (1, 0, 300), (40, 41, 90)])
def test_the_interval_holds_what_a_score_test_does_not_reject(only_a: int, only_b: int, n: int) -> None:
    """Tango's definition, with the nuisance parameter from a numeric maximum of the likelihood instead of his formula."""
    from scipy.optimize import minimize_scalar

    from sku_vllm.stats.paired import tango

    def rejected(delta: float) -> float:
        """Chi-square of the score test of difference = delta; q is the probability of only A."""

        def against(q: float) -> float:
            pieces = [(only_a, q), (only_b, q + delta), (n - only_a - only_b, 1 - 2 * q - delta)]
            return -sum(count * np.log(max(p, 1e-300)) for count, p in pieces if count)

        low, high = max(0.0, -delta), (1 - delta) / 2
        q = minimize_scalar(against, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        return (only_b - only_a - n * delta) ** 2 / (n * (2 * q + delta - delta**2))

    for end in tango(only_a, only_b, n):
        if abs(end) < 1:
            assert rejected(end) == pytest.approx(1.959963984540054**2, rel=1e-5)


@pytest.mark.parametrize("shifts", [[3, -1, 2, 2, -4, 1, 1], [1, 1, -1], [4, 4, 4, 4, 4, 4], [5], [2, -2, 6, 1], [0, 0, 1, -3]])
def test_sign_flip_counts_every_pattern_of_signs(shifts: list[int]) -> None:
    patterns = list(itertools.product([1, -1], repeat=len(shifts)))
    far = sum(abs(sum(sign * shift for sign, shift in zip(signs, shifts, strict=True))) >= abs(sum(shifts)) for signs in patterns)
    assert sign_flip(shifts) == pytest.approx(far / len(patterns), abs=1e-12)
