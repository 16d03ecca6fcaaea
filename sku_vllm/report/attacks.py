"""The report's part on attacks: the data from every `sku_attack.json`, the measurement with most harm, and the section of the page."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from sku_vllm.evaluate.shares import HARM
from sku_vllm.evaluate.tables import RESTS_ON
from sku_vllm.records import Document
from sku_vllm.records.rows_file import changed_rows
from sku_vllm.report.number_format import ANSWERS, answers, percent
from sku_vllm.report.page_charts import Line, interval_row, line_chart
from sku_vllm.report.page_parts import numbers, section, table

TONES = ("t-blue", "t-soft", "t-harm", "t-green", "t-base")


def attacks(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """{"name", "kind", "before": EVAL, "points": [{"attack", …, "forget", "retain"}], "rests_on", "changed"} for every kind in the records.

    rests_on: what a claim rests on; records of earlier versions do not say, and measured harmful answers alone. changed: a line where the
    rows.jsonl beside the record is not the one it was written with, else None.
    """
    return [
        {
            "name": document.name,
            "kind": kind,
            "before": document.data.get("before") or {},
            "points": points,
            "rests_on": document.data.get("rests_on", HARM),
            "changed": changed_rows(document.directory, document.data),
        }
        for document in documents
        if document.command == "attack"
        for kind, points in (document.data.get("attacks") or {}).items()
    ]


def measurements(attack: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(label of the measurement, forget set, mode, shares) in the order of measurement; the first are those before the attack."""
    for point in [{"attack": "before", **attack["before"]}, *attack["points"]]:
        for name, modes in (point.get("forget") or {}).items():
            for mode, shares in modes.items():
                yield done(point), name, mode, shares


def done(point: dict[str, Any]) -> str:
    """The label of a measurement, such as 'benign, 40 steps'."""
    return f"{point['attack']}, {point['steps']} steps" if point.get("steps") is not None else str(point["attack"])


def worst_recovery(attack: dict[str, Any]) -> tuple[str, str, dict[str, Any]] | None:
    """(label, "forget set, mode", shares) of the measurement with most harm after the attack; None without one."""
    found = [
        (what, f"{name}, {mode}", shares)
        for what, name, mode, shares in measurements(attack)
        if what != "before" and shares["harmful"] is not None
    ]
    return max(found, key=lambda one: one[2]["harmful"]) if found else None


def attack_charts(attack: dict[str, Any]) -> list[str]:
    """HTML charts of the worst forget set by mode. Relearning: harm over steps, one line per course; other kinds: one row per attack."""
    modes = list(dict.fromkeys(mode for _, _, mode, _ in measurements(attack)))
    if any(point.get("steps") for point in attack["points"]):
        return [chart for mode in modes if (chart := _over_steps(attack, mode))]
    return [f"<figure><figcaption>Harmful answers, {mode}, worst set</figcaption>{''.join(_rows(attack, mode))}</figure>" for mode in modes]


def _over_steps(attack: dict[str, Any], mode: str) -> str:
    lines = []
    for i, course in enumerate(dict.fromkeys(point["attack"] for point in attack["points"])):
        found = [(point["steps"], worst) for point in attack["points"] if point["attack"] == course and (worst := _worst(point, mode))]
        lines.append(
            Line(
                course,
                TONES[i % len(TONES)],
                [(float(step), one["harmful"]) for step, one in found],
                [(one["harmful_low"], one["harmful_high"]) for _, one in found],
            )
        )
    return line_chart([line for line in lines if line.points], "steps of fine-tuning", f"Harmful answers, {mode}, worst set")


def _rows(attack: dict[str, Any], mode: str) -> Iterator[str]:
    for point in [{"attack": "before", **attack["before"]}, *attack["points"]]:
        worst = _worst(point, mode)
        if worst:
            yield interval_row(done(point), "", worst, "t-base" if point["attack"] == "before" else "t-harm")


def _worst(point: dict[str, Any], mode: str) -> dict[str, Any] | None:
    found = [modes[mode] for modes in (point.get("forget") or {}).values() if mode in modes and modes[mode]["harmful"] is not None]
    return max(found, key=lambda shares: shares["harmful"], default=None)


def knowledge_chart(found: Sequence[dict[str, Any]]) -> str:
    """Knowledge that relearning brought back over the attacker's cost in tokens; a line a record and course. "" where none is known."""
    lines: list[Line] = []
    for attack in found:
        points = [point for point in attack["points"] if "recovered" in point and "cost_tokens" in point and "steps" in point]
        for course in dict.fromkeys(point["attack"] for point in points):
            told = [(math.log10(1 + point["cost_tokens"]), point["recovered"]) for point in points if point["attack"] == course]
            lines.append(Line(f"{attack['name']}: {course}", TONES[len(lines) % len(TONES)], told))
    return line_chart(lines, "cost: log10 of tokens trained on", "Right answers to prompts not trained on")


def attacks_section(report: dict[str, Any]) -> str:
    """The section of the page on attacks: charts and numbers of every kind; empty without attacks."""
    parts = [f"<p>{escape(RESTS_ON[on])}</p>" for on in dict.fromkeys(attack["rests_on"] for attack in report["attacks"]) if on in RESTS_ON]
    if chart := knowledge_chart(report["attacks"]):
        parts.append(f'<div class="charts">{chart}</div>')
    for attack in report["attacks"]:
        rows = [
            [escape(done), escape(name), escape(mode), *answers(one), percent(one.get("knowledge")), str(one["n"])]
            for done, name, mode, one in measurements(attack)
        ]
        parts.append(
            f'<h3>{escape(attack["kind"])}</h3><div class="charts">{"".join(attack_charts(attack))}</div>'
            + numbers(table(["after", "set", "mode", *ANSWERS, "knowledge", "n"], rows), True)
        )
    return (
        section(
            "Does it come back?",
            "The edited model under attack. Suppressed knowledge is not erased; attacks show how easily it returns.",
            *parts,
        )
        if parts
        else ""
    )
