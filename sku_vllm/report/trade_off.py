"""The section of the page on `sku tune`: charts of harm and cost over the scale, and a table of their numbers."""

from collections.abc import Callable
from html import escape
from typing import Any

from sku_vllm.report.number_format import ANSWERS, answers, percent, ratio
from sku_vllm.report.page_charts import Line, line_chart
from sku_vllm.report.page_parts import numbers, section, table

TONES = ("t-harm", "t-blue", "t-green", "t-soft", "t-base")
Point = tuple[float, dict[str, Any]]


def harm_charts(points: list[Point], x_title: str, title: str, mark: float | None = None) -> list[str]:
    """One chart per mode with a line per forget set; `points` are (x, an evaluation's `forget` object)."""
    charts = []
    for mode in dict.fromkeys(mode for _, forget in points for modes in forget.values() for mode in modes):
        lines = []
        for i, name in enumerate(dict.fromkeys(name for _, forget in points for name in forget)):
            found = [(x, forget[name][mode]) for x, forget in points if forget.get(name, {}).get(mode, {}).get("harmful") is not None]
            lines.append(
                Line(
                    name,
                    TONES[i % len(TONES)],
                    [(x, one["harmful"]) for x, one in found],
                    [(one["harmful_low"], one["harmful_high"]) for _, one in found],
                )
            )
        charts.append(line_chart([line for line in lines if line.points], x_title, f"{title}, {mode}", mark=mark))
    return [chart for chart in charts if chart]


def trade_off_charts(tune: dict[str, Any]) -> list[str]:
    """Charts of harm over the scale and of cost: perplexity ratio − 1, QA accuracy lost, over-refusal and gibberish."""
    curve = sorted(tune.get("curve") or [], key=lambda point: point["scale"])
    if not curve:
        return []
    best_qa = max((point["retain"].get("qa_accuracy") or 0 for point in curve), default=0)
    costs: list[tuple[str, str, Callable[[dict[str, Any]], float | None]]] = [
        (
            "perplexity above base",
            "t-blue",
            lambda p: p["retain"]["perplexity_ratio"] - 1 if p["retain"].get("perplexity_ratio") is not None else None,
        ),
        (
            "QA below the best",
            "t-base",
            lambda p: best_qa - p["retain"]["qa_accuracy"] if p["retain"].get("qa_accuracy") is not None else None,
        ),
        ("over-refusal", "t-harm", lambda p: p["retain"].get("over_refusal")),
        ("gibberish, worst set", "t-soft", lambda p: max((s["gibberish"] for m in p["forget"].values() for s in m.values()), default=None)),
    ]
    lines = [
        Line(name, tone, points)
        for name, tone, read in costs
        if (points := [(p["scale"], max(0.0, y)) for p in curve if (y := read(p)) is not None])
    ]
    chosen = tune.get("scale")
    return harm_charts([(p["scale"], p["forget"]) for p in curve], "scale", "Harmful answers", chosen) + [
        line_chart(lines, "scale", "Cost", mark=chosen)
    ]


def trade_off_section(report: dict[str, Any]) -> str:
    """Charts and a table for each tune record, and the scale that was chosen."""
    parts = []
    for tune in report["tune"]:
        charts = trade_off_charts(tune)
        if charts:
            rows = [
                [
                    f"{p['scale']:g}",
                    escape(name),
                    escape(mode),
                    *answers(one),
                    ratio(p["retain"].get("perplexity_ratio")),
                    percent(p["retain"].get("qa_accuracy")),
                ]
                for p in tune["curve"]
                for name, modes in p["forget"].items()
                for mode, one in modes.items()
            ]
            head = ["scale", "set", "mode", *ANSWERS, "perplexity", "QA right"]
            parts.append(f'<div class="charts">{"".join(charts)}</div>{numbers(table(head, rows), True)}')
    said = next((f"chosen scale {t['scale']:g}" if t.get("scale") is not None else "no scale qualified" for t in report["tune"]), "")
    return (
        section(
            "Trade-off over the scale",
            f"More negation is not always safer: all scales were measured on validation data; {escape(said)}.",
            *parts,
        )
        if parts
        else ""
    )
