"""The scale curve drawn: as SVG for a page, as bars for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from rich import box
from rich.console import Console
from rich.table import Table

from sku_vllm.evaluate.limits import worst
from sku_vllm.evaluate.tables import percent

WIDTH, HEIGHT, LEFT, TOP, PLOT_W, PLOT_H = 760, 360, 56, 40, 500, 260
COLOURS = ("#c0392b", "#e08e79", "#7f8c8d", "#2471a3", "#b7950b", "#1e8449")
BAR = 10
SHORT = {
    "harmful, greedy": "greedy", "harmful, sampled": "sampled", "gibberish (worst set)": "gibberish", "QA accuracy": "QA",
    "over-refusal": "refusal", "perplexity above base": "ppl +",
}


def series(curve: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """By scale: harm by mode (mean of the sets), worst gibberish, QA and refusals on the retain set, perplexity above base."""
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
    return {name: values for name, values in drawn.items() if any(value is not None for value in values)}


def curve_svg(base: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], chosen: float | None) -> str:
    """A line a measure over the scale, the base at 0, the choice marked."""
    points = [{"scale": 0.0, **base}, *(point for point in curve if point["scale"] > 0)]
    top = max(point["scale"] for point in points) or 1.0
    x = [LEFT + PLOT_W * point["scale"] / top for point in points]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">Harm and cost by scale of negation</text>',
    ]
    for tenth in range(0, 11, 2):
        y = _y(tenth / 10)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + PLOT_W}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tenth * 10} %</text>')
    for position, point in zip(x, points, strict=True):
        parts.append(f'<text x="{position:.1f}" y="{TOP + PLOT_H + 18}" text-anchor="middle">{point["scale"]:g}</text>')
        if point["scale"] == chosen:
            line = f'x1="{position:.1f}" x2="{position:.1f}" y1="{TOP}" y2="{TOP + PLOT_H}"'
            parts.append(f'<line {line} stroke="black" stroke-dasharray="4 3"/>')
            parts.append(f'<text x="{position:.1f}" y="{TOP - 4}" text-anchor="middle">chosen</text>')
    for number, (name, values) in enumerate(series(points).items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(f"{at:.1f},{_y(value):.1f}" for at, value in zip(x, values, strict=True) if value is not None)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + PLOT_W + 16}" y="{TOP + 16 + 20 * number}" fill="{colour}">{escape(name)}</text>')
    parts.append(f'<text x="{LEFT + PLOT_W / 2}" y="{HEIGHT - 12}" text-anchor="middle">scale</text></svg>')
    return "\n".join(parts) + "\n"


def print_curve(base: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], chosen: float | None, console: Console | None = None) -> None:
    """A row a scale: a bar of the sampled (else greedy) harm, the other measures, what exceeds its limit."""
    console = console or Console()
    points = [{"scale": 0.0, **base}, *curve]
    drawn = series(points)
    harm = drawn.get("harmful, sampled") or drawn["harmful, greedy"]
    table = Table("scale", "harm", *(SHORT[name] for name in drawn), "beyond", box=box.SIMPLE, pad_edge=False)
    for row, point in enumerate(points):
        bar = "█" * round(BAR * (harm[row] or 0.0))
        mark = " ←" if row and point["scale"] == chosen else ""
        values = [percent(values[row], 2 if name.startswith("perplexity") else 1) for name, values in drawn.items()]
        beyond = ", ".join(name.replace("_", " ") for name in point.get("excess", ()))
        table.add_row("base" if row == 0 else f"{point['scale']:g}{mark}", f"{bar:·<{BAR}}", *values, beyond)
    console.print(table)


def _y(share: float) -> float:
    return TOP + PLOT_H * (1 - min(max(share, 0.0), 1.0))
