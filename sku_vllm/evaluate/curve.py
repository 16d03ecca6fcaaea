"""Draws harm and cost over the scale, as measured by `sku tune`: an SVG chart, and a table with bars for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sku_vllm.evaluate.chart import Curve, chart_svg
from sku_vllm.evaluate.shares import least, worst
from sku_vllm.evaluate.tables import percent

BAR = 6
SHORT = {
    "harmful, greedy": "greedy",
    "harmful, sampled": "sampled",
    "gibberish (worst set)": "gibberish",
    "QA accuracy": "QA",
    "over-refusal": "refusal",
    "does not end (worst set)": "no end",
    "said again (worst set)": "repeat",
    "perplexity above base": "ppl +",
}


def series(curve: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """{measure: its value at each point of the curve}; None where it was not measured, and measures without any value are left out.

    Measures: harm by mode (mean of the sets), worst gibberish, QA and refusals on the retain set, perplexity above the base's, answers
    that do not end and answers that say a sentence again in the worst set, refusals of each border set.
    """
    drawn: dict[str, list[float | None]] = {}
    for mode in ("greedy", "sampled"):
        sets = [[modes[mode]["harmful"] for modes in point["forget"].values() if mode in modes] for point in curve]
        if all(sets):
            drawn[f"harmful, {mode}"] = [sum(rates) / len(rates) for rates in sets]
    drawn["gibberish (worst set)"] = [worst(point, "gibberish") for point in curve]
    drawn["QA accuracy"] = [point["retain"]["qa_accuracy"] for point in curve]
    drawn["over-refusal"] = [point["retain"]["over_refusal"] for point in curve]
    ratios = [point["retain"]["perplexity_ratio"] for point in curve]
    drawn["perplexity above base"] = [None if ratio is None else max(0.0, ratio - 1) for ratio in ratios]
    drawn["does not end (worst set)"] = [1 - least(point, "ended") for point in curve]
    drawn["said again (worst set)"] = [worst(point, "repeated") for point in curve]
    for name in curve[0].get("border") or {}:
        drawn[f"{name} refused"] = [point["border"][name]["refusal"] for point in curve]
    return {name: values for name, values in drawn.items() if any(value is not None for value in values)}


def curve_svg(base: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], chosen: float | None) -> str:
    """An SVG chart with one line per measure over the scale. The base is drawn at scale 0, and the chosen scale is marked."""
    points = [{"scale": 0.0, **base}, *(point for point in curve if point["scale"] > 0)]
    scales = [point["scale"] for point in points]
    curves = [
        Curve(name, [(scale, value) for scale, value in zip(scales, values, strict=True) if value is not None])
        for name, values in series(points).items()
    ]
    ticks = [(scale, f"{scale:g}") for scale in scales]
    return chart_svg("Harm and cost by scale of negation", curves, "scale", ticks, None if chosen is None else (chosen, "chosen"))


def print_curve(base: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], chosen: float | None, console: Console | None = None) -> None:
    """Print one row per scale: a bar of the sampled (else greedy) harm, the measures, the answers' length, and the limits exceeded."""
    console = console or Console()
    points = [{"scale": 0.0, **base}, *curve]
    drawn = series(points)
    harm = drawn.get("harmful, sampled") or drawn["harmful, greedy"]
    table = Table("scale", "harm", title="Shares in %", title_justify="left", box=box.SIMPLE, pad_edge=False, padding=0)
    for name in drawn:
        table.add_column(SHORT.get(name, name), justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("beyond")
    for row, point in enumerate(points):
        bar = "█" * round(BAR * (harm[row] or 0.0))
        mark = " ←" if row and point["scale"] == chosen else ""
        values = [percent(values[row], 2 if name.startswith("perplexity") else 1).removesuffix(" %") for name, values in drawn.items()]
        beyond = ", ".join(name.replace("_", " ") for name in point.get("excess", ()))
        table.add_row("base" if row == 0 else f"{point['scale']:g}{mark}", f"{bar:·<{BAR}}", *values, f"{_length(point):.0f}", beyond)
    console.print(table)


def _length(measured: Mapping[str, Any]) -> float:
    """The mean length of the answers to forget prompts in tokens, over sets and modes."""
    lengths = [float(share["length_tokens"]) for modes in measured["forget"].values() for share in modes.values()]
    return sum(lengths) / len(lengths)
