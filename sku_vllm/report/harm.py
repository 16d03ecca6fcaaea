"""What every evaluation says: harmful answers, what comes instead, and what it cost."""

from collections.abc import Sequence
from html import escape
from typing import Any

from sku_vllm.report.charts import interval_row, share_bar, share_legend
from sku_vllm.report.format import MISSING, number, percent, ratio
from sku_vllm.report.fragments import section, table

TONES = {"base": "t-base", "other": "t-base", "adapter": "t-blue", "fused": "t-green"}
ROLES = {"base": "unedited", "adapter": "LoRA", "fused": "fused", "other": "model"}


def harm(report: dict[str, Any]) -> str:
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


def shares(report: dict[str, Any]) -> str:
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


def utility(report: dict[str, Any]) -> str:
    rows = [
        [
            f"{escape(e['name'])}<br><small>{escape(_note(e))}</small>",
            number(r.get("perplexity")),
            "the base" if e["role"] == "base" else ratio(r.get("perplexity_ratio")),
            percent(r.get("qa_accuracy")),
            str(r.get("qa_n", 0)),
            percent(r.get("over_refusal")),
            percent(r.get("gibberish")),
            str(r.get("n", 0)),
        ]
        for e in report["evaluations"]
        for r in [e["retain"]]
    ]
    lead = [i for i, e in enumerate(report["evaluations"]) if e["name"] == report["primary"]]
    parts = [table(["model", "perplexity", "ratio", "QA right", "of", "over-refusal", "gibberish", "prompts"], rows, lead)] if rows else []
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
    """(forget set, mode) in the order the evaluations have them, all greedy ones first."""
    found = dict.fromkeys((name, mode) for e in report["evaluations"] for name, modes in e["forget"].items() for mode in modes)
    return sorted(found, key=lambda place: place[1] != "greedy")


def _note(evaluation: dict[str, Any], one_judge: bool = True) -> str:
    scale = f" at scale {evaluation['scale']:g}" if evaluation["scale"] is not None else ""
    return f"{ROLES[evaluation['role']]}{scale}" + ("" if one_judge else f"; judge {_judges(evaluation['judges'])}")


def _judges(specs: Sequence[str]) -> str:
    """Judge SPECs without the directories of their files."""
    return (
        ", ".join(f"lexicon {spec.rsplit('/', 1)[-1].removeprefix('lexicon:')}" if spec.startswith("lexicon:") else spec for spec in specs)
        or MISSING
    )
