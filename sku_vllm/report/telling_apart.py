"""How well a base can tell harmful prompts from benign ones, as `sku train` recorded it, and what the measured models made of it."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sku_vllm.records import Document
from sku_vllm.report.evaluations import Evaluation
from sku_vllm.report.number_format import percent
from sku_vllm.report.page_charts import Line, line_chart
from sku_vllm.report.page_parts import section, table

LEAD = (
    "A linear probe on the hidden states of the unedited base, asked about prompts it was not trained on. No method can be expected to "
    "choose much better than its model sees; one that lies above the curve refuses more than it needs to."
)
HEAD = ("harmful against", "AUC", "refused where 90 % of the harmful prompts are")
POINTS = ("model", "harmful prompts answered", "benign prompts", "refused")
TONES = ("t-harm", "t-green", "t-soft")
BENIGN = {"retain": "the retain set", "border": "border prompts"}


def separations(documents: Sequence[Document], evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """One entry for each run that recorded a probe, with the evaluations of its base and of its adapter.

    Returns:
        [{"name", "separation", "points": [{"model", "kind", "answered", "set", "refused"}]}]. A point is one evaluation against one
        benign set: the mean harmful share of its forget sets, greedy, and the share of that set that is refused.
    """
    found = []
    fused_from = {one.name: str(one.config.get("model")) for one in documents if one.command == "fuse"}
    for document in documents:
        separation = document.data.get("separation") if document.command == "train" else None
        if separation:
            base = str(document.data.get("base") or document.config.get("model"))
            points = [point for one in evaluations if _is_from(one, base, fused_from) for point in _points(one)]
            found.append({"name": document.name, "separation": separation, "points": points})
    return found


def _is_from(evaluation: Evaluation, base: str, fused_from: Mapping[str, str]) -> bool:
    """Whether an evaluation is of this base, of an adapter on it, or of a checkpoint that was fused from it."""
    return evaluation.model == base or any(fused_from.get(name) == base for name in evaluation.checkpoints)


def _points(evaluation: Evaluation) -> list[dict[str, Any]]:
    rates = [modes["greedy"]["harmful"] for modes in evaluation.forget.values() if "greedy" in modes]
    if not rates or None in rates:
        return []
    refused = [("retain", "retain", evaluation.retain.get("over_refusal"))]
    refused += [("border", name, share["refusal"]) for name, share in evaluation.border.items()]
    return [
        {"model": evaluation.name, "kind": kind, "answered": sum(rates) / len(rates), "set": name, "refused": share}
        for kind, name, share in refused
        if share is not None
    ]


def telling_apart_section(report: dict[str, Any]) -> str:
    """A table and a chart for each run: the probe's curve against every kind of benign prompts, the measured models as points."""
    parts = []
    for found in report["separations"]:
        if len(report["separations"]) > 1:
            parts.append(f"<h3>{escape(found['name'])}</h3>")
        parts.append(table(HEAD, [[escape(cell) for cell in row] for row in rows(found)]))
        charts = [_chart(found, kind) for kind in found["separation"]["curve"]]
        parts.append(f'<div class="charts">{"".join(charts)}</div>')
        if found["points"]:
            parts.append(table(POINTS, [[escape(cell) for cell in row] for row in point_rows(found)]))
    return section("How well this base can tell them apart", LEAD, *parts) if parts else ""


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The cells under HEAD, a row a kind of benign prompts."""
    separation = found["separation"]
    return [[BENIGN.get(kind, kind), f"{area:.3f}", percent(separation["refused"][kind])] for kind, area in separation["auc"].items()]


def point_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The cells under POINTS."""
    return [[one["model"], percent(one["answered"]), one["set"], percent(one["refused"])] for one in found["points"]]


def _chart(found: Mapping[str, Any], kind: str) -> str:
    lines = [Line("linear probe", "t-blue", [(answered, refused) for answered, refused in found["separation"]["curve"][kind]])]
    for number, point in enumerate(point for point in found["points"] if point["kind"] == kind):
        name = point["model"] if kind == "retain" else f"{point['model']}, {point['set']}"
        lines.append(Line(name, TONES[number % len(TONES)], [(point["answered"], point["refused"])]))
    return line_chart(lines, "harmful prompts answered", f"Refused of {BENIGN.get(kind, kind)}", x_share=True)
