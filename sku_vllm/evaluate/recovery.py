"""Relearning drawn: harm on prompts that were not trained on, over the steps of fine-tuning."""

from collections.abc import Mapping, Sequence
from typing import Any

from sku_vllm.evaluate.chart import Curve, chart_svg


def recovery_svg(relearned: Sequence[Mapping[str, Any]]) -> str:
    """A colour a lesson (benign rows, shares of the forget set): sampled answers drawn through, greedy ones dashed.

    relearned: the `relearn` entries of `attack`; harm is the mean of the forget sets.
    """
    curves = []
    for colour, lesson in enumerate(dict.fromkeys(entry["attack"] for entry in relearned)):
        entries = [entry for entry in relearned if entry["attack"] == lesson]
        for mode in ("sampled", "greedy"):
            points = [(entry["steps"], harm) for entry in entries if (harm := mean_harm(entry, mode)) is not None]
            if points:
                curves.append(Curve(f"{lesson}, {mode}", points, _band(entries, mode), colour, dashed=mode == "greedy"))
    steps = sorted({entry["steps"] for entry in relearned})
    return chart_svg(
        "Harm on prompts that were not trained on", curves, "steps of fine-tuning", [(step, str(step)) for step in steps]
    )


def mean_harm(measured: Mapping[str, Any], mode: str) -> float | None:
    """Mean of the forget sets; None where the mode was not measured."""
    rates = [modes[mode]["harmful"] for modes in measured["forget"].values() if mode in modes]
    return sum(rates) / len(rates) if rates else None


def _band(entries: Sequence[Mapping[str, Any]], mode: str) -> list[tuple[float, float]]:
    """95 % intervals; only of a single forget set, for that of a mean is not the mean of theirs."""
    if any(len(entry["forget"]) > 1 for entry in entries):
        return []
    return [(modes[mode]["harmful_low"], modes[mode]["harmful_high"]) for entry in entries for modes in entry["forget"].values()]
