"""Checks that evaluations are of the rows they are taken for: the same questions in all, and each one's own answers beside it."""

from collections.abc import Sequence

from sku_vllm.report.check import Check
from sku_vllm.report.evaluations import Evaluation, other_rows


def row_checks(evaluations: Sequence[Evaluation]) -> list[Check]:
    """Both checks, each only where the records say enough for it."""
    checks = []
    if sum(bool(evaluation.rows) for evaluation in evaluations) > 1:
        other = other_rows(evaluations)
        checks.append(
            Check("Results are of the same rows", "fail" if other else "pass", "; ".join(other) or "sets of one name are the same")
        )
    if changed := [evaluation.changed for evaluation in evaluations if evaluation.changed]:
        checks.append(Check("Answers are those that were measured", "fail", "; ".join(changed)))
    return checks
