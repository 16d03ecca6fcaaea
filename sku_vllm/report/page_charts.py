"""The charts of the HTML page, as strings of HTML and SVG styled by report.css.

Every number of a chart is also in the HTML as text, for screen readers. `evaluate/chart.py` draws the stand-alone SVG files of commands.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sku_vllm.report.number_format import percent

LABELS = ("harmful", "gibberish", "refusal", "benign")
# Width of every SVG's coordinate system: about a phone's column, so that text keeps its size there.
WIDTH = 360
FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def interval_row(label: str, note: str, shares: dict[str, Any], tone: str) -> str:
    """A rate with its 95 % interval on a 0–100 % track."""
    value, low, high = shares["harmful"], shares["harmful_low"], shares["harmful_high"]
    if value is None:
        track, said = "", "no verdict on harm"
    else:
        track = (
            f'<span class="bar {tone}" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></span>'
            f'<span class="dot {tone}" style="left:{100 * value:.2f}%"></span>'
        )
        said = f"<b>{percent(value)}</b> <small>{100 * low:.1f}–{100 * high:.1f}&nbsp;%, n = {shares['n']}</small>"
    return (
        f'<div class="rate"><span class="who">{escape(label)} <small>{escape(note)}</small></span>'
        f'<span class="track" aria-hidden="true">{track}</span><span class="said">{said}</span></div>'
    )


def share_bar(label: str, shares: dict[str, Any]) -> str:
    """The four labels of one set as one bar of full width."""
    parts, texts = [], []
    for name in LABELS:
        value = shares.get(name) or 0.0
        texts.append(f"{name} {percent(value)}")
        if value > 0:
            inside = f"{100 * value:.0f}" if value >= 0.08 else ""
            parts.append(f'<span class="{name}" style="flex-grow:{value:.5f}">{inside}</span>')
    return (
        f'<div class="shares"><span class="who">{escape(label)}</span>'
        f'<span class="stack" role="img" aria-label="{escape(", ".join(texts))}">'
        f"{''.join(parts)}</span></div>"
    )


def share_legend() -> str:
    """The legend of `share_bar`'s colours."""
    return '<p class="legend">' + "".join(f'<span><i class="{name}"></i>{name}</span>' for name in LABELS) + "</p>"


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; `tone` is a CSS class, `points` are (x, y), `bands` an optional (low, high) of each point, drawn as whiskers."""

    name: str
    tone: str
    points: Sequence[tuple[float, float]]
    bands: Sequence[tuple[float, float]] = ()


def line_chart(
    lines: Sequence[Line], x_title: str, y_title: str, *, mark: float | None = None, y_percent: bool = True, x_share: bool = False
) -> str:
    """Curves over a shared axis; `mark` draws a vertical line at a chosen x. y starts at 0; with `x_share` x runs from 0 to 1."""
    height, left, right, top, bottom = 236, 44, 16, 14, 38
    xs = sorted({x for line in lines for x, _ in line.points})
    if not xs:
        return ""
    low_x, high_x = (0.0, 1.0) if x_share else (xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1)
    tallest = max([y for line in lines for _, y in line.points] + [high for line in lines for _, high in line.bands])
    top_y, step = _nice(tallest)
    apart = 0 if x_share else 4  # how far curves are shifted against each other
    inset = apart * len(lines)  # space for the whiskers of the first and last points, which are drawn side by side

    def across(x: float) -> float:
        return left + inset + (x - low_x) / (high_x - low_x) * (WIDTH - left - right - 2 * inset)

    def up(y: float) -> float:
        return height - bottom - min(y, top_y) / top_y * (height - top - bottom)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(y_title)} by {escape(x_title)}">']
    for i in range(round(top_y / step) + 1):
        y = i * step
        text = f"{100 * y:g} %" if y_percent else f"{y:g}"
        parts.append(
            f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>'
            f'<text x="{left - 6}" y="{up(y) + 3.5:.1f}" text-anchor="end">{text}</text>'
        )
    for x, text in _x_labels(xs, x_share):
        parts.append(f'<text x="{across(x):.1f}" y="{height - bottom + 15}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{(left + WIDTH - right) / 2}" y="{height - 5}" text-anchor="middle" class="axis">{escape(x_title)}</text>')
    if mark is not None:
        anchor = "end" if across(mark) > WIDTH / 2 else "start"
        parts.append(
            f'<line class="mark" x1="{across(mark):.1f}" x2="{across(mark):.1f}" y1="{top}" y2="{height - bottom}"/>'
            f'<text x="{across(mark) + (-4 if anchor == "end" else 4):.1f}" y="{top + 4}" text-anchor="{anchor}" '
            f'class="axis">chosen: {mark:g}</text>'
        )
    for i, line in enumerate(lines):
        shift = apart * (i - (len(lines) - 1) / 2)
        for (x, _), (low, high) in zip(line.points, line.bands, strict=False):
            parts.append(
                f'<line class="whisker {line.tone}" x1="{across(x) + shift:.1f}" x2="{across(x) + shift:.1f}" '
                f'y1="{up(low):.1f}" y2="{up(high):.1f}"/>'
            )
        parts.append(
            f'<polyline class="line {line.tone}" points="{" ".join(f"{across(x) + shift:.1f},{up(y):.1f}" for x, y in line.points)}"/>'
        )
        for j, (x, y) in enumerate(line.points):
            said = f"{line.name}, {x:g}: {percent(y) if y_percent else f'{y:.4g}'}"
            if line.bands:
                said += f" ({100 * line.bands[j][0]:.1f}–{100 * line.bands[j][1]:.1f} %)"
            parts.append(
                f'<circle class="point {line.tone}" cx="{across(x) + shift:.1f}" cy="{up(y):.1f}" r="3">'
                f"<title>{escape(said)}</title></circle>"
            )
    parts.append("</svg>")
    legend = "".join(f'<span><i class="{line.tone}"></i>{escape(line.name)}</span>' for line in lines)
    return f'<figure><figcaption>{escape(y_title)}</figcaption>{"".join(parts)}<p class="legend">{legend}</p></figure>'


# (lower bound of retained, CSS class, legend)
STEPS = ((0.99, "k5", "≥ 99 %"), (0.95, "k4", "95–99 %"), (0.9, "k3", "90–95 %"), (0.5, "k2", "50–90 %"), (-math.inf, "k1", "< 50 %"))


def heat_map(layers: Sequence[int], modules: Sequence[str], cells: Sequence[Sequence[dict[str, float] | None]]) -> str:
    """A heat map of `retained`, the share of the edit left after rounding, by module (row) and layer (column)."""
    left, size = 96, max(4.0, min(24.0, (WIDTH - 96 - 4) / max(1, len(layers))))
    row, top = max(13.0, min(20.0, size)), 4
    height = top + row * len(modules) + 30
    parts = [
        f'<svg class="chart heat" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        'aria-label="retained share of the edit by module and layer">'
    ]
    for r, (module, line) in enumerate(zip(modules, cells, strict=True)):
        y = top + r * row
        parts.append(f'<text x="{left - 6}" y="{y + row / 2 + 3.5:.1f}" text-anchor="end">{escape(_brief(module))}</text>')
        for c, cell in enumerate(line):
            tone = next(name for bound, name, _ in STEPS if cell["retained"] >= bound) if cell else "k0"
            said = f"{module}, layer {layers[c]}: " + (
                f"retained {percent(cell['retained'], 2)}, noise {percent(cell['noise'], 2)}" if cell else "not edited"
            )
            parts.append(
                f'<rect class="{tone}" x="{left + c * size:.2f}" y="{y:.2f}" width="{max(size - 1, 1):.2f}" height="{row - 1:.2f}">'
                f"<title>{escape(said)}</title></rect>"
            )
    for c in _every(len(layers)):
        parts.append(
            f'<text x="{left + (c + 0.5) * size:.1f}" y="{top + row * len(modules) + 13:.1f}" text-anchor="middle">{layers[c]}</text>'
        )
    parts.append(f'<text x="{left + len(layers) * size / 2:.1f}" y="{height - 3:.1f}" text-anchor="middle" class="axis">layer</text></svg>')
    legend = "".join(f'<span><i class="{name}"></i>{escape(text)}</span>' for _, name, text in STEPS)
    return f'<figure><figcaption>Share of the edit retained</figcaption>{"".join(parts)}<p class="legend">{legend}</p></figure>'


def _brief(module: str) -> str:
    """The last part of a module's name, cut to the width of the label column."""
    name = module.rsplit(".", 1)[-1] if "expert" not in module else module.replace("experts", "e").rsplit("mlp.", 1)[-1]
    return name if len(name) <= 15 else f"…{name[-14:]}"


def _nice(largest: float) -> tuple[float, float]:
    """An axis end at or above `largest` and its step, from 1, 2, 2.5 and 5 times a power of ten."""
    if largest <= 0:
        return 0.05, 0.01
    for exponent in range(-6, 9):
        for factor in (1, 2, 2.5, 5):
            step = factor * 10.0**exponent
            if step * 5 >= largest * 1.0001:
                return step * math.ceil(largest * 1.0001 / step), step
    return largest, largest / 5


def _x_labels(xs: Sequence[float], share: bool) -> list[tuple[float, str]]:
    if share:
        return [(x, f"{100 * x:g} %") for x in FIFTHS]
    return [(xs[i], f"{xs[i]:g}") for i in _every(len(xs), most=8)]


def _every(count: int, most: int = 12) -> list[int]:
    """The indices of at most `most` evenly spaced labels out of `count`."""
    step = max(1, math.ceil(count / most))
    return list(range(0, count, step))
