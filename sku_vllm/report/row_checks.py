"""Checks that evaluations are of the rows they are taken for: the same questions in all, and each one's own answers beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from sku_vllm.report.check import Check
from sku_vllm.report.evaluations import Evaluation, other_rows


def row_checks(evaluations: Sequence[Evaluation], attacks: Sequence[Mapping[str, Any]] = ()) -> list[Check]:
    """Both checks, each only where the records say enough for it; answers are checked of attacks too."""
    checks = []
    if sum(bool(evaluation.rows) for evaluation in evaluations) > 1:
        other = other_rows(evaluations)
        checks.append(
            Check("Results are of the same rows", "fail" if other else "pass", "; ".join(other) or "sets of one name are the same")
        )
    found = [*(evaluation.changed for evaluation in evaluations), *(attack.get("changed") for attack in attacks)]
    if changed := list(dict.fromkeys(line for line in found if line)):
        checks.append(Check("Answers are those that were measured", "fail", "; ".join(changed)))
    return checks
