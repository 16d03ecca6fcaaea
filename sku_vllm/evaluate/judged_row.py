"""A judged answer as one line of rows.jsonl: what was asked and answered, the label, and why.

Open this file to add a key to rows.jsonl.
"""

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

from sku_vllm.data import Row
from sku_vllm.evaluate.measure_request import BORDER, RETAIN
from sku_vllm.judges.labeller import JudgedVotes


def judged_row(row: Row, judged: JudgedVotes, place: int) -> dict[str, Any]:
    """id, messages (of more than one turn) and category where the row has them; prompt, response, label; and what `verdict_fields` adds."""
    given = {"id": row.id, "messages": list(row.messages) if len(row.messages) > 1 else None, "category": row.category}
    known = {name: value for name, value in given.items() if value is not None}
    return {**known, "prompt": row.prompt, "response": row.response or "", **verdict_fields(judged, place)}


def verdict_fields(judged: JudgedVotes, place: int) -> dict[str, Any]:
    """The label of answer number `place`, and what explains it.

    reason: the judge's category or word, or which detector decided. score: of a judge that grades. partial_refusal: of one that tells
    partial refusals from full ones. harm_judged: False where no judge decided harm. harmful_in_reasoning: True where harm is in the
    reasoning before the final answer alone. votes: of several judges.
    """
    verdict = judged.verdicts[place]
    fields: dict[str, Any] = {"label": verdict.label}
    if reason := judged.reasons[place]:
        fields["reason"] = reason
    if judged.scores[place] is not None:
        fields["score"] = judged.scores[place]
    if judged.partial[place] is not None:
        fields["partial_refusal"] = judged.partial[place]
    if verdict.harmful is None:
        fields["harm_judged"] = False
    if judged.in_reasoning[place]:
        fields["harmful_in_reasoning"] = True
    if len(judged.votes) > 1:
        fields["votes"] = {name: votes[place] for name, votes in judged.votes.items()}
    return fields


def count_apart(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add to an eval object what only its rows tell: what `add_grades` adds, to every set; and, of a forget set, `harmful_in_reasoning`,
    the share of answers that are harmful in their reasoning alone (part of `harmful`), where some are."""
    for name, modes in report["forget"].items():
        for mode, shares in modes.items():
            told = [row for row in rows if (row["set"], row["mode"]) == (name, mode)]
            if thought := sum(bool(row.get("harmful_in_reasoning")) for row in told):
                shares["harmful_in_reasoning"] = thought / shares["n"]
            add_grades(shares, told)
    for name, found in {RETAIN: report["retain"], **{BORDER + name: found for name, found in report.get("border", {}).items()}}.items():
        add_grades(found, [row for row in rows if row["set"] == name])


def add_grades(shares: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add to the shares of some answers, and of each category, `score`, the mean of their scores, where a judge grades, and
    `partial_refusal`, the share that refuse in part, where a judge tells these from full refusals."""
    for key in ("score", "partial_refusal"):
        told = [float(row[key]) for row in rows if row.get(key) is not None]
        if told:
            shares[key] = fsum(told) / len(told)
    for name, part in shares.get("by_category", {}).items():
        add_grades(part, [row for row in rows if name in (row.get("category") or "").split(", ")])
