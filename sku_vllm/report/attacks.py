"""What attacks brought back: `sku_attack.json` as one entry per kind, its worst measurement, and curves over relearning steps."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from sku_vllm.report.charts import Line, interval_row, line_chart
from sku_vllm.report.collect import Document
from sku_vllm.report.format import answers
from sku_vllm.report.fragments import numbers, section, table

TONES = ("t-blue", "t-soft", "t-harm", "t-green", "t-base")


def attacks(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """{"name", "kind", "before": EVAL, "points": [{"attack", …, "forget", "retain"}]} for every kind of every record."""
    return [
        {"name": document.name, "kind": kind, "before": document.data.get("before") or {}, "points": points}
        for document in documents
        if document.command == "attack"
        for kind, points in (document.data.get("attacks") or {}).items()
    ]


def measurements(attack: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(what was done, forget set, mode, shares) in the order they were measured, the state before the attack first."""
    for point in [{"attack": "before", **attack["before"]}, *attack["points"]]:
        for name, modes in (point.get("forget") or {}).items():
            for mode, shares in modes.items():
                yield done(point), name, mode, shares


def done(point: dict[str, Any]) -> str:
    """'benign, 40 steps'."""
    return f"{point['attack']}, {point['steps']} steps" if point.get("steps") is not None else str(point["attack"])


def worst_recovery(attack: dict[str, Any]) -> tuple[str, str, dict[str, Any]] | None:
    """(what was done, forget set and mode, shares) where the attack brought back the most harm."""
    found = [
        (what, f"{name}, {mode}", shares)
        for what, name, mode, shares in measurements(attack)
        if what != "before" and shares["harmful"] is not None
    ]
    return max(found, key=lambda one: one[2]["harmful"]) if found else None


def attack_charts(attack: dict[str, Any]) -> list[str]:
    """Relearning: harm over steps in the worst set, a line per lesson. Other kinds: a row per attack beside the state before."""
    modes = list(dict.fromkeys(mode for _, _, mode, _ in measurements(attack)))
    if any(point.get("steps") for point in attack["points"]):
        return [chart for mode in modes if (chart := _over_steps(attack, mode))]
    return [f"<figure><figcaption>Harmful answers, {mode}, worst set</figcaption>{''.join(_rows(attack, mode))}</figure>" for mode in modes]


def _over_steps(attack: dict[str, Any], mode: str) -> str:
    lines = []
    for i, lesson in enumerate(dict.fromkeys(point["attack"] for point in attack["points"])):
        found = [(point["steps"], worst) for point in attack["points"] if point["attack"] == lesson and (worst := _worst(point, mode))]
        lines.append(
            Line(
                lesson,
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


def attacks_section(report: dict[str, Any]) -> str:
    parts = []
    for attack in report["attacks"]:
        rows = [
            [escape(done), escape(name), escape(mode), *answers(one), str(one["n"])]
            for done, name, mode, one in measurements(attack)
        ]
        parts.append(
            f'<h3>{escape(attack["kind"])}</h3><div class="charts">{"".join(attack_charts(attack))}</div>'
            + numbers(table(["after", "set", "mode", "harmful", "95 %", "refusal", "gibberish", "n"], rows), True)
        )
    return (
        section(
            "Does it come back?", "The edited model under attack; suppression is not erasure, so the question is what it takes.", *parts
        )
        if parts
        else ""
    )
