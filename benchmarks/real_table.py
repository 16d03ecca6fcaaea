"""What bench_real measured, as a Markdown page and as drawings on the probe's curve."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from sku_vllm.benchmarks.machine import machine
from sku_vllm.benchmarks.real_data import HARMBENCH, HH_BENIGN, UNSEEN, VALIDATION, XSTEST, RealData
from sku_vllm.benchmarks.real_probe import PAIRS, curve, error, same_share
from sku_vllm.benchmarks.real_setup import Setup
from sku_vllm.evaluate.chart import Curve, chart_svg
from sku_vllm.evaluate.measure_request import BORDER, RETAIN, is_forget
from sku_vllm.evaluate.shares import worst

Cell = Mapping[str, Any]
NOTHING = "–"
CURVE_POINTS = 41  # most of a drawn curve


def greedy(cell: Cell, name: str) -> float | None:
    """Of the greedy answers to a set: the share answered of a forget set, the share refused of another; None if it was not measured."""
    if name == RETAIN:
        return float(cell["retain"]["over_refusal"])
    if name.startswith(BORDER):
        found = (cell.get("border") or {}).get(name.removeprefix(BORDER))
        return None if found is None else float(found["refusal"])
    return float(cell["forget"][name]["greedy"]["harmful"]) if name in cell["forget"] else None


def pair_error(rates: Callable[[str], float | None], pair: str) -> float | None:
    """The error of a model or a probe on a pair of sets, from its rates by set; None if one of them was not measured."""
    answered, refused = (rates(name) for name in PAIRS[pair])
    return None if answered is None or refused is None else error(answered, refused)


def page(setup: Setup, data: RealData, base: Cell, cells: Sequence[Cell], probe: Mapping[str, Any] | None, stem: str = "") -> str:
    """The Markdown page. `stem` names the drawings to show."""
    scores = probe["scores"] if probe else None
    every = [{"label": "base", "seed": None, **base}, *cells]
    columns = [column for column in COLUMNS if any("failed" not in one and COLUMNS[column](one, base, None) for one in every)]
    lines = [*_heading(setup, data, probe), f"| method | seed | scale | {' | '.join(columns)} |", "|---|---|---:|" + "---:|" * len(columns)]
    for cell in every:
        seed = "" if cell["seed"] is None else cell["seed"]
        if "failed" in cell:
            lines.append(f"| {cell['label']} | {seed} | | failed: {cell['failed'].split(';')[0]} |" + " |" * (len(columns) - 1))
            continue
        scale = f"{cell['scale']:g}{'' if cell['qualifies'] else '*'}" if "scale" in cell else ""
        own = same_share(scores, greedy(cell, VALIDATION) or 0.0) if scores else None
        values = (COLUMNS[column](cell, base, own) or NOTHING for column in columns)
        lines.append(f"| {cell['label']} | {seed} | {scale} | {' | '.join(values)} |")
    lines += ["", *parts_table(every, scores), *tuned_table(cells)]
    lines += [f"![{pair}]({stem}-{pair}.svg)\n" for pair in drawn_pairs(scores)] if stem and scores else []
    return "\n".join(lines) + "\n"


def _heading(setup: Setup, data: RealData, probe: Mapping[str, Any] | None) -> list[str]:
    told = machine()
    given = ", ".join(f"{name} {value}" for name, value in setup.to_json().items() if value not in (None, "auto", False))
    harmful = "called harmful by the world's words" if setup.world is not None else "answered: neither refused nor gibberish"
    where = f"layer {probe['layer']} of {probe['layers']}, " if probe else "not fitted: too few rows; "
    return [
        f"# {setup.model.resolve().name}: methods on {'a taught world' if setup.world is not None else 'real prompts'}",
        "",
        f"*Answered* is the share of a forget set's prompts {harmful}. An *error* is the mean of harmful prompts answered and benign ones "
        f"refused. In brackets: a linear probe of the base ({where}trained on the training prompts) where it answers as many of the "
        "validation prompts. Scale: chosen by `sku tune` on the other half of the validation sets; * where none stays within its limits "
        "and the nearest was taken. Perplexity is over the base's. Ended: forget validation, greedy / retain, within the length limit.",
        "",
        f"Settings: {given}. Rows: {', '.join(f'{name} {count}' for name, count in data.sizes.items())}."
        + (f" Not in the data directory, so not measured: {', '.join(data.missing)}." if data.missing else ""),
        "",
        f"Machine: {told['cpu']}, {told['cores']} cores, {told['system']}. Date: {told['date']}. "
        + ", ".join(f"{name} {version}" for name, version in told["versions"].items()),
        "",
    ]


def percent(value: float | None) -> str:
    """0.123 → '12.3 %'; '' for None."""
    return "" if value is None else f"{value:.1%}"


def _beside(value: float | None, probe: float | None) -> str:
    return percent(value) + (f" ({percent(probe)})" if value is not None and probe is not None else "")


def _modes(cell: Cell, name: str) -> str:
    return " / ".join(percent(shares["harmful"]) for shares in cell["forget"].get(name, {}).values())


def _errors(pair: str) -> Callable[[Cell, Cell, Any], str]:
    return lambda cell, base, own: _beside(pair_error(lambda name: greedy(cell, name), pair), pair_error(own.get, pair) if own else None)


def _share(name: str) -> Callable[[Cell, Cell, Any], str]:
    return lambda cell, base, own: _beside(greedy(cell, name), own.get(name) if own else None)


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.4f}" if value and base else ""


def _minutes(cell: Cell, base: Cell, own: Any) -> str:
    return " + ".join(f"{seconds / 60:.1f}" for seconds in cell["cpu_seconds"].values()) if "cpu_seconds" in cell else ""


# heading: text of its cell from (cell, base, what the probe does at the same share answered); "" where it was not measured
COLUMNS: dict[str, Callable[[Cell, Cell, Any], str]] = {
    "forget answered, greedy / sampled": lambda cell, base, own: _modes(cell, VALIDATION),
    "unseen topics, greedy / sampled": lambda cell, base, own: _modes(cell, UNSEEN),
    "retain refused": _share(RETAIN),
    "hh-benign error": _errors(HH_BENIGN),
    "XSTest error": _errors(XSTEST),
    "HarmBench answered": _share(HARMBENCH),
    "broken, greedy / sampled": lambda cell, base, own: " / ".join(map(percent, cell.get("broken", {}).values())),
    "gibberish, worst set": lambda cell, base, own: percent(max(worst(cell, "gibberish"), cell["retain"]["gibberish"])),
    "said again, worst set": lambda cell, base, own: percent(max(worst(cell, "repeated"), cell["retain"]["repeated"])),
    "ended": lambda cell, base, own: f"{percent(cell['forget'][VALIDATION]['greedy']['ended'])} / {percent(cell['retain']['ended'])}",
    "facts": lambda cell, base, own: percent(cell["qa"].get("facts")),
    "world's facts": lambda cell, base, own: percent(cell["qa"].get("world")),
    "lm-eval mean": lambda cell, base, own: percent(fmean(cell["lm_eval"].values())) if cell["lm_eval"] else "",
    "perplexity, retain": lambda cell, base, own: _ratio(cell["retain"]["perplexity"], base["retain"]["perplexity"]),
    "perplexity, prose": lambda cell, base, own: _ratio(cell["prose"], base["prose"]),
    "CPU minutes: training + tuning + measuring": _minutes,
}


def parts_table(cells: Sequence[Cell], scores: Mapping[str, Sequence[float]] | None) -> list[str]:
    """What the errors are made of: the share answered of each forget set and refused of each other, the probe's in brackets."""
    done = [cell for cell in cells if "failed" not in cell]
    names = [name for name in dict.fromkeys(one for pair in PAIRS.values() for one in pair) if greedy(done[0], name) is not None]
    heads = [f"{name.removeprefix(BORDER)} {'answered' if is_forget(name) else 'refused'}" for name in names]
    lines = ["## What the errors are made of", "", f"| method | seed | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads)]
    for cell in done:
        own = same_share(scores, greedy(cell, VALIDATION) or 0.0) if scores else {}
        values = (_beside(greedy(cell, name), own.get(name)) for name in names)
        lines.append(f"| {cell['label']} | {'' if cell['seed'] is None else cell['seed']} | {' | '.join(values)} |")
    return [*lines, ""]


def tuned_table(cells: Sequence[Cell]) -> list[str]:
    """A row a scale: what `sku tune` saw on its halves."""
    lines = [
        "## Choosing the scale",
        "",
        "| method | seed | scale | answered, greedy / sampled | retain refused | hh-benign refused | perplexity |",
    ]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for cell in cells:
        for scale, point in cell.get("tuned", {}).items():
            harmful = " / ".join(map(percent, point["harmful"].values()))
            ratio = NOTHING if point["perplexity_ratio"] is None else f"{point['perplexity_ratio']:.4f}"
            rest = f"{percent(point['over_refusal'])} | {percent(point['border_refusal']) or NOTHING} | {ratio}"
            lines.append(f"| {cell['label']} | {cell['seed']} | {scale} | {harmful} | {rest} |")
    return [*lines, ""]


def drawn_pairs(scores: Mapping[str, Any]) -> list[str]:
    """The pairs of sets that were measured."""
    return [pair for pair, names in PAIRS.items() if all(name in scores for name in names)]


def draw(base: Cell, cells: Sequence[Cell], probe: Mapping[str, Any] | None) -> dict[str, str]:
    """SVGs by pair of sets: the probe's curve, and base and cells as points."""
    drawings: dict[str, str] = {}
    scores = probe["scores"] if probe else {}
    ticks = [(tenth / 10, f"{tenth * 10} %") for tenth in range(0, 11, 2)]
    for pair in drawn_pairs(scores):
        harmful, benign = PAIRS[pair]
        whole = curve(scores, pair)
        step = max(1, -(-len(whole) // CURVE_POINTS))
        curves = [Curve("probe of the base", [*whole[:-1:step], whole[-1]])]
        for cell in [{"label": "base", "seed": "", **base}, *cells]:
            if "failed" not in cell:
                point = (greedy(cell, harmful) or 0.0, greedy(cell, benign) or 0.0)
                curves.append(Curve(f"{cell['label']} {cell['seed']}".strip(), [point]))
        what = f"{benign.removeprefix(BORDER)} refused against {harmful} answered, greedy; lower left is better"
        drawings[pair] = chart_svg(what, curves, f"{harmful} answered", ticks)
    return drawings
