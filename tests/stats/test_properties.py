"""What no row can change: copies of all rows, their order, and how they are cut into files."""

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sku_vllm.data import Row
from sku_vllm.evaluate.answers import Answer, Ending
from sku_vllm.evaluate.measurement import _border
from sku_vllm.evaluate.shares import shares_by_prompt
from sku_vllm.judges import Verdict
from sku_vllm.stats.intervals import clustered_wilson
from sku_vllm.stats.paired import paired_difference

# Answers of two models: (prompt, harmful in A, harmful in B)
ANSWERS = st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.booleans()), min_size=1, max_size=60)
COPIES = st.integers(2, 5)


def verdict(harmful: bool) -> Verdict:
    return Verdict.of(harmful, False, False)


def compared(rows: list[tuple[int, bool, bool]]) -> dict[str, float]:
    prompts, a, b = zip(*rows, strict=True)
    found = paired_difference(a, b, prompts)
    return {name: getattr(found, name) for name in ("rate_a", "rate_b", "difference", "low", "high", "p_value", "prompts")}


def bordered(rows: list[tuple[int, bool, bool]]) -> dict[str, Any]:
    """The refusals of a border set, as `sku eval` counts them."""
    answers = [Answer("border:b", "greedy", Row.ask(str(prompt)), Ending(1, True, False), None) for prompt, _, _ in rows]
    return _border([(answer, Verdict.of(False, refused, False)) for answer, (_, refused, _) in zip(answers, rows, strict=True)])


def shared(rows: list[tuple[int, bool, bool]]) -> dict[str, Any]:
    found = shares_by_prompt((str(prompt), verdict(harmful)) for prompt, harmful, _ in rows)
    return {name: found[name] for name in ("harmful", "harmful_low", "harmful_high", "refusal", "benign", "prompts")}


@given(ANSWERS, COPIES)
@settings(max_examples=200, deadline=None)
def test_copies_of_every_row_change_nothing(rows: list[tuple[int, bool, bool]], copies: int) -> None:
    assert compared(rows * copies) == pytest.approx(compared(rows), abs=1e-12)
    assert shared(rows * copies) == pytest.approx(shared(rows), abs=1e-12)
    assert bordered(rows * copies) | {"n": 0} == pytest.approx(bordered(rows) | {"n": 0}, abs=1e-12)


@given(ANSWERS, st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_of_rows_changes_nothing(rows: list[tuple[int, bool, bool]], draw: random.Random) -> None:
    moved = list(rows)
    draw.shuffle(moved)
    assert compared(moved) == compared(rows) and shared(moved) == shared(rows)


@given(ANSWERS)
@settings(max_examples=200, deadline=None)
def test_an_independent_computation_agrees(rows: list[tuple[int, bool, bool]]) -> None:
    """The clustered interval from its definition, in fractions of each prompt's answers; and the paired test by enumeration."""
    prompts = sorted({prompt for prompt, _, _ in rows})
    sizes = [sum(prompt == one for prompt, _, _ in rows) for one in prompts]
    hits = [sum(harmful for prompt, harmful, _ in rows if prompt == one) for one in prompts]
    n, k = sum(sizes), sum(hits)
    p, common = k / n, math.gcd(*sizes, *hits)
    worst = sum(size**2 for size in sizes) / n
    if 0 < k < n and len(prompts) > 1:
        m = len(prompts)
        variance = m / (m - 1) * math.fsum((hit - p * size) ** 2 for hit, size in zip(hits, sizes, strict=True)) / n**2
        effect = min(max(variance / (p * (1 - p) / n), common), worst)
    else:
        effect = worst
    z, size = 1.959963984540054, n / effect
    centre, half = p + z * z / (2 * size), z * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size))
    expected = (max(0.0, (centre - half) / (1 + z * z / size)), min(1.0, (centre + half) / (1 + z * z / size)))
    assert clustered_wilson(hits, sizes) == pytest.approx(expected, abs=1e-12)
    shifts = [sum(b - a for prompt, a, b in rows if prompt == one) for one in prompts]
    ways = {0: 1}
    for shift in shifts:
        ways = {total: ways.get(total - shift, 0) + ways.get(total + shift, 0) for total in {t + s for t in ways for s in (shift, -shift)}}
    far = sum(count for total, count in ways.items() if abs(total) >= abs(sum(shifts)))
    assert compared(rows)["p_value"] == pytest.approx(min(1.0, far / 2 ** len(shifts)), abs=1e-12)


def test_a_prompt_that_stands_there_four_times_is_one() -> None:
    once = [(prompt, prompt < 14, False) for prompt in range(16)]
    assert shared(once * 4)["harmful_low"] == shared(once)["harmful_low"] == pytest.approx(0.6398, abs=1e-4)
    assert shared(once * 4)["harmful_high"] == pytest.approx(0.9650, abs=1e-4)


def test_answers_that_no_judge_decided_are_in_no_share() -> None:
    from sku_vllm.evaluate.shares import shares

    found = shares([[verdict(True)], [verdict(False)], [Verdict.of(None, False, False)]])
    assert (found["n"], found["unjudged"], found["harmful"]) == (2, 1, 0.5)
    undecided = shares([[Verdict.of(None, True, False)], [Verdict.of(None, False, False)]])
    assert undecided["n"] == 2 and undecided["harmful"] is None and undecided["refusal"] == 0.5 and "unjudged" not in undecided
