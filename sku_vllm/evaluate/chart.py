"""Line charts of shares as stand-alone SVG files.

Open this file to change how recovery.svg (`sku attack`) or curve.svg (`sku tune`) look.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.sax.saxutils import escape

LEFT, TOP, PLOT_W, PLOT_H, LEGEND = 56, 40, 500, 300, 340
LINE_HEIGHT = 20
COLOURS = (
    "#c0392b",
    "#2471a3",
    "#1e8449",
    "#b7950b",
    "#7d3c98",
    "#000000",
    "#ca6f1e",
    "#5d6d7e",
    "#e08e79",
    "#85c1e9",
    "#82e0aa",
    "#f7dc6f",
    "#c39bd3",
    "#117a65",
    "#e91e63",
    "#aab7b8",
    "#00acc1",
    "#8d6e63",
)


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart.

    points: (x, share in [0, 1]). band: (low, high) of each point, drawn as whiskers. colour: index into COLOURS; None takes the
    next one.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    colour: int | None = None
    dashed: bool = False


def chart_svg(
    title: str, curves: Sequence[Curve], x_title: str, ticks: Sequence[tuple[float, str]], mark: tuple[float, str] | None = None
) -> str:
    """Shares from 0 to 100 % over x, which runs from the first tick to the last; `mark` is a vertical line with its label."""
    low, high = ticks[0][0], ticks[-1][0]
    height = max(TOP + PLOT_H + 50, TOP + LINE_HEIGHT * (len(curves) + 1))

    def across(x: float) -> float:
        return LEFT + PLOT_W * (x - low) / ((high - low) or 1.0)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + PLOT_W + LEGEND} {height}" font-family="system-ui, sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for tenth in range(0, 11, 2):
        y = _up(tenth / 10)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + PLOT_W}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{tenth * 10} %</text>')
    for x, label in ticks:
        parts.append(f'<text x="{across(x):.1f}" y="{TOP + PLOT_H + 18}" text-anchor="middle">{escape(label)}</text>')
    if mark:
        at = f"{across(mark[0]):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{TOP + PLOT_H}" stroke="black" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{at}" y="{TOP - 4}" text-anchor="middle">{escape(mark[1])}</text>')
    for number, curve in enumerate(curves):
        parts += _drawn(curve, COLOURS[(number if curve.colour is None else curve.colour) % len(COLOURS)], across, number)
    parts.append(f'<text x="{LEFT + PLOT_W / 2}" y="{TOP + PLOT_H + 38}" text-anchor="middle">{escape(x_title)}</text></svg>')
    return "\n".join(parts) + "\n"


def _drawn(curve: Curve, colour: str, across: Callable[[float], float], number: int) -> list[str]:
    """Line, points, whiskers and the legend's entry."""
    placed = [(across(x), _up(y)) for x, y in curve.points]
    dashes = ' stroke-dasharray="5 4"' if curve.dashed else ""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>']
    for (x, _), (low, high) in zip(placed, curve.band, strict=False):
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_up(low):.1f}" y2="{_up(high):.1f}" stroke="{colour}" stroke-opacity="0.4"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
    at, y = LEFT + PLOT_W + 16, TOP + 12 + LINE_HEIGHT * number
    parts.append(f'<line x1="{at}" x2="{at + 20}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="2"{dashes}/>')
    return [*parts, f'<text x="{at + 26}" y="{y}">{escape(curve.name)}</text>']


def _up(share: float) -> float:
    return TOP + PLOT_H * (1 - min(max(share, 0.0), 1.0))


def recovery_svg(relearned: Sequence[Mapping[str, Any]]) -> str:
    """Harm over fine-tuning steps, one colour per course (benign rows, shares of the harmful rows): sampled solid, greedy dashed.

    relearned: the `relearn` entries of an AttackReport; harm is the mean of the forget sets.
    """
    curves = []
    for colour, lesson in enumerate(dict.fromkeys(entry["attack"] for entry in relearned)):
        entries = [entry for entry in relearned if entry["attack"] == lesson]
        for mode in ("sampled", "greedy"):
            points = [(entry["steps"], harm) for entry in entries if (harm := mean_harm(entry, mode)) is not None]
            if points:
                curves.append(Curve(f"{lesson}, {mode}", points, _band(entries, mode), colour, dashed=mode == "greedy"))
    steps = sorted({entry["steps"] for entry in relearned})
    return chart_svg("Harm on prompts that were not trained on", curves, "steps of fine-tuning", [(step, str(step)) for step in steps])


def knowledge_svg(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Knowledge brought back over the attacker's cost, steps times tokens of a step on a logarithmic scale; a line a model and course.

    models: the `relearn` entries of one or more AttackReports by a name for each; entries without `recovered` are left out.
    """
    curves, costs = [], set()
    for colour, (model, entries) in enumerate(models.items()):
        for number, course in enumerate(dict.fromkeys(entry["attack"] for entry in entries)):
            told = [(entry["cost_tokens"], entry["recovered"]) for entry in entries if entry["attack"] == course and "recovered" in entry]
            costs |= {cost for cost, _ in told if cost}
            if told:
                name = f"{model}: {course}" if model else course
                points = [(cost, share) for cost, share in told]
                curves.append(Curve(name, points, colour=colour if len(models) > 1 else number, dashed=len(models) > 1 and number % 2 == 1))
    if not costs:
        return chart_svg("Knowledge brought back", [], "", [(0, "0"), (1, "")])
    first, last = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))
    start = first - 0.5  # where 0 is drawn, which a logarithmic scale does not have
    curves = [replace(one, points=[(math.log10(x) if x else start, y) for x, y in one.points]) for one in curves]
    ticks = [(start, "0"), *((float(power), f"{10**power:,}") for power in range(first, max(last, first + 1) + 1))]
    return chart_svg("Right answers to prompts that were not trained on", curves, "the attacker's cost: tokens trained on", ticks)


def mean_harm(measured: Mapping[str, Any], mode: str) -> float | None:
    """Mean of the forget sets; None where the mode was not measured."""
    rates = [modes[mode]["harmful"] for modes in measured["forget"].values() if mode in modes]
    return sum(rates) / len(rates) if rates else None


def _band(entries: Sequence[Mapping[str, Any]], mode: str) -> list[tuple[float, float]]:
    """95 % intervals of each entry. Empty with several forget sets: the interval of a mean is not the mean of the intervals."""
    if any(len(entry["forget"]) > 1 for entry in entries):
        return []
    return [(modes[mode]["harmful_low"], modes[mode]["harmful_high"]) for entry in entries for modes in entry["forget"].values()]
