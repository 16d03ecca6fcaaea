"""A few answers to read, per set and label, edited model beside base."""

import json
from collections.abc import Sequence
from typing import Any

from sku_vllm.report.evaluations import Evaluation
from sku_vllm.report.format import short
from sku_vllm.report.verdict import baseline, primary

RETAIN = "retain"


def samples(evaluations: Sequence[Evaluation], rows: int) -> list[dict[str, Any]]:
    """Up to `rows` greedy answers per set and label of the edited model, each with the base's answer to the same prompt.

    Read from `rows.jsonl` beside the evaluation; an evaluation without that file shows none. `private` marks forget-set text.
    """
    edited = primary(evaluations)
    if edited is None or rows < 1:
        return []
    base = baseline(evaluations, edited)
    before = {(row["set"], row["prompt"]): row for row in (_greedy(base) if base else [])}
    shown: list[dict[str, Any]] = []
    count: dict[tuple[str, str], int] = {}
    for row in _greedy(edited):
        place = (row["set"], row["label"])
        count[place] = count.get(place, 0) + 1
        if count[place] > rows:
            continue
        other = before.get((row["set"], row["prompt"]))
        shown.append(
            {
                "set": row["set"],
                "private": row["set"] != RETAIN,
                "prompt": short(row["prompt"]),
                "label": row["label"],
                "response": short(row["response"]),
                "base_label": other["label"] if other else None,
                "base_response": short(other["response"]) if other else None,
            }
        )
    return shown


def _greedy(evaluation: Evaluation) -> list[dict[str, str]]:
    file = evaluation.directory / "rows.jsonl"
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row for row in rows if row.get("mode") == "greedy" and {"set", "prompt", "response", "label"} <= row.keys()]
