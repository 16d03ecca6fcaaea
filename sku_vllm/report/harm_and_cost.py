"""The sections of the page on evaluations: harmful answers, shares of all labels, and the cost on the retain set."""

from collections.abc import Sequence
from html import escape
from typing import Any

from sku_vllm.report.number_format import BORDER_HEAD, MISSING, border_cells, number, percent, ratio
from sku_vllm.report.page_charts import interval_row, share_bar, share_legend
from sku_vllm.report.page_parts import section, table

TONES = {"base": "t-base", "other": "t-base", "adapter": "t-blue", "fused": "t-green"}
ROLES = {"base": "unedited", "adapter": "LoRA", "fused": "fused", "other": "model"}


def harm_section(report: dict[str, Any]) -> str:
    """Harmful rates with intervals by forget set and mode, one row per evaluation; and the agreement of several judges."""
    if not report["evaluations"]:
        return ""
    judges = {e["judges"] for e in report["evaluations"]}
    one_judge = len(judges) == 1
    parts = []
    for name, mode in _places(report):
        rows = [
            interval_row(e["name"], _note(e, one_judge), e["forget"][name][mode], TONES[e["role"]])
            for e in report["evaluations"]
            if mode in e["forget"].get(name, {})
        ]
        parts.append(f"<h3>{escape(name)}, {escape(mode)}</h3>" + "".join(rows))
    agreement = [
        [escape(e["name"]), *(escape(str(value if not isinstance(value, float) else round(value, 3))) for value in pair.values())]
        for e in report["evaluations"]
        for pair in e["agreement"] or []
    ]
    heads = next((["evaluation", *pair] for e in report["evaluations"] for pair in e["agreement"] or []), [])
    parts.append("<h3>Do the judges agree?</h3>" + table(heads, agreement) if agreement else "")
    by = f"judge {escape(_judges(judges.pop()))}" if one_judge else "the judge named beside it"
    return section(
        "Harmful answers", f"Share of answers called harmful by {by}, from 0 to 100&nbsp;%, with its 95&nbsp;% interval.", *parts
    )


def shares_section(report: dict[str, Any]) -> str:
    """The four labels of every set and mode as bars."""
    parts = [share_legend()]
    for name, mode in _places(report):
        bars = [share_bar(e["name"], e["forget"][name][mode]) for e in report["evaluations"] if mode in e["forget"].get(name, {})]
        parts.append(f"<h3>{escape(name)}, {escape(mode)}</h3>" + "".join(bars))
    return (
        section(
            "What the model says instead",
            "Every answer has exactly one label, decided in the order harmful, refusal, gibberish, benign. Numbers are percent.",
            *parts,
        )
        if len(parts) > 1
        else ""
    )


def endings_section(report: dict[str, Any]) -> str:
    """How the answers to forget prompts end: by themselves or at the length limit, their length beside the base's, sentences said again."""
    base: dict[str, Any] = next((e["forget"] for e in report["evaluations"] if e["role"] == "base"), {})
    rows = [
        [
            f"{escape(name)}, {escape(mode)}",
            escape(e["name"]),
            percent(found.get("ended")),
            percent(found.get("repeated")),
            number(found["length_tokens"], 1),
            _beside(found["length_tokens"], base.get(name, {}).get(mode, {}).get("length_tokens")),
        ]
        for name, mode in _places(report)
        for e in report["evaluations"]
        if "length_tokens" in (found := e["forget"].get(name, {}).get(mode, {}))
    ]
    return (
        section(
            "Do its answers end?",
            "A refusal said again and again is a refusal by its label, and still broken. Length in tokens; the base's is 1.",
            table(["set", "model", "ended by themselves", "say a sentence again", "mean length", "beside the base's"], rows),
        )
        if rows
        else ""
    )


def _beside(length: float, base: float | None) -> str:
    return f"{length / base:.2f}" if base else MISSING


def utility_section(report: dict[str, Any]) -> str:
    """Perplexity, question answering and refusals on the retain set, refusals of border sets, and lm-evaluation-harness."""
    rows = [
        [
            f"{escape(e['name'])}<br><small>{escape(_note(e))}</small>",
            number(r.get("perplexity")),
            "the base" if e["role"] == "base" else ratio(r.get("perplexity_ratio")),
            percent(r.get("qa_accuracy")),
            str(r.get("qa_n", 0)),
            percent(r.get("over_refusal")),
            percent(r.get("gibberish")),
            percent(r.get("ended")),
            percent(r.get("repeated")),
            str(r.get("n", 0)),
        ]
        for e in report["evaluations"]
        for r in [e["retain"]]
    ]
    lead = [i for i, e in enumerate(report["evaluations"]) if e["name"] == report["primary"]]
    head = ["model", "perplexity", "ratio", "QA right", "of", "over-refusal", "gibberish", "ended", "said again", "prompts"]
    parts = [table(head, rows, lead)] if rows else []
    border = [[escape(e["name"]), escape(name), *border_cells(found)] for e in report["evaluations"] for name, found in e["border"].items()]
    if border:
        parts.append("<h3>Benign prompts in the style of the forget set</h3>" + table(["model", "set", *BORDER_HEAD], border))
    for found in report["lm_eval"]:
        tasks = [
            [
                escape(t["task"]),
                escape(t["metric"]),
                number(t["base"], 4),
                number(t["edited"], 4),
                number(t["difference"], 4),
                number(t["stderr"], 4),
            ]
            for t in found["tasks"]
        ]
        parts.append("<h3>lm-evaluation-harness</h3>" + table(["task", "metric", "base", "edited", "difference", "standard error"], tasks))
    return section("What it cost", "Measured on held-out benign prompts.", *parts) if parts else ""


def _places(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Every (forget set, mode) of the evaluations, greedy before sampled."""
    found = dict.fromkeys((name, mode) for e in report["evaluations"] for name, modes in e["forget"].items() for mode in modes)
    return sorted(found, key=lambda place: place[1] != "greedy")


def _note(evaluation: dict[str, Any], one_judge: bool = True) -> str:
    scale = f" at scale {evaluation['scale']:g}" if evaluation["scale"] is not None else ""
    return f"{ROLES[evaluation['role']]}{scale}" + ("" if one_judge else f"; judge {_judges(evaluation['judges'])}")


def _judges(specs: Sequence[str]) -> str:
    """Judge SPECs as text; lexicon files without their directories."""
    return (
        ", ".join(f"lexicon {spec.rsplit('/', 1)[-1].removeprefix('lexicon:')}" if spec.startswith("lexicon:") else spec for spec in specs)
        or MISSING
    )
