"""The report as Markdown for a pull request or a ticket, without prompts and answers. There is one function per heading."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from sku_vllm.report import categories, served_arms, telling_apart
from sku_vllm.report.attacks import measurements
from sku_vllm.report.number_format import ANSWERS, BORDER_HEAD, SPACE, STATES, answers, border_cells, number, percent, points, ratio

MARKS = {**STATES, "fail": "FAILS"}
# What CommonMark and GitHub read as markup within a line. An underscore between letters or digits is none.
_MARKUP = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")


def markdown(report: dict[str, Any]) -> str:
    """`build_report`'s dict as Markdown."""
    sections = (
        _verdict,
        _checks,
        _evaluations,
        _categories,
        _separations,
        _tuning,
        _attacks,
        _benchmarks,
        _comparisons,
        _fidelity,
        _agreement,
        _arms,
        _provenance,
    )
    lines = [line for section in sections for line in section(report)]
    return "\n".join(lines).rstrip().replace(SPACE, " ") + "\n"


def _verdict(report: dict[str, Any]) -> list[str]:
    verdict = report["verdict"]
    reasons = [f"- Not verified because {plain(reason)}." for reason in verdict["reasons"]]
    return [
        f"# {plain(report['title'])}",
        "",
        f"{report['generated']}, sku_vllm {report['versions']['sku_vllm']}",
        "",
        f"**{'Verified' if verdict['status'] == 'verified' else 'Not verified'}.** {plain(verdict['headline'])} {plain(verdict['basis'])}",
        "",
        *reasons,
        *[""] * bool(reasons),
    ]


def _checks(report: dict[str, Any]) -> list[str]:
    rows = [[check["name"], MARKS[check["state"]], check["detail"]] for check in report["verdict"]["checks"]]
    return ["## Checks", "", *table(["check", "state", "detail"], rows)]


def _evaluations(report: dict[str, Any]) -> list[str]:
    return evaluation_tables(report["evaluations"])


def _categories(report: dict[str, Any]) -> list[str]:
    rows = categories.rows(report)
    return ["## By category", "", *table(categories.HEAD, rows)] if rows else []


def _separations(report: dict[str, Any]) -> list[str]:
    lines = []
    for found in report["separations"]:
        lines += [f"## How well this base can tell them apart: {plain(found['name'])}", "", telling_apart.LEAD, ""]
        lines += table(telling_apart.HEAD, telling_apart.rows(found))
        lines += table(telling_apart.POINTS, telling_apart.point_rows(found)) if found["points"] else []
    return lines


def _tuning(report: dict[str, Any]) -> list[str]:
    lines = []
    for tune in report["tune"]:
        scale = "no scale qualified" if tune.get("scale") is None else f"chosen scale {tune['scale']:g}"
        rows = []
        for point in tune.get("curve", []):
            cost = ratio(point["retain"].get("perplexity_ratio"))
            for name, mode, shares in _modes(point["forget"]):
                rows.append([f"{point['scale']:g}", name, mode, *answers(shares), cost])
        lines += [f"## Trade-off: {scale}", "", *table(["scale", "set", "mode", *ANSWERS, "perplexity"], rows)]
    return lines


def _attacks(report: dict[str, Any]) -> list[str]:
    head, lines = ["after", "set", "mode", *ANSWERS, "knowledge", "n"], []
    for attack in report["attacks"]:
        rows = [
            [what, name, mode, *answers(shares), percent(shares.get("knowledge")), str(shares["n"])]
            for what, name, mode, shares in measurements(attack)
        ]
        lines += [f"## Attack: {plain(attack['kind'])}", "", *table(head, rows), f"A claim rests on {attack['rests_on']}.", ""]
    return lines


def _benchmarks(report: dict[str, Any]) -> list[str]:
    head, lines = ["task", "metric", "base", "edited", "difference", "standard error"], []
    for found in report["lm_eval"]:
        scores = ("base", "edited", "difference", "stderr")
        rows = [[task["task"], task["metric"], *(number(task[key], 4) for key in scores)] for task in found["tasks"]]
        lines += [f"## lm-evaluation-harness: {plain(found['name'])}", "", *table(head, rows)]
    return lines


def _comparisons(report: dict[str, Any]) -> list[str]:
    lines = []
    for found in report["comparisons"]:
        rows = []
        for name, mode, labels in _modes(found["sets"]):
            for label, paired in labels.items():
                rates = [percent(paired["rate_a"]), percent(paired["rate_b"]), points(paired["difference"])]
                bounds = f"{points(paired['low'])} to {points(paired['high'])}"
                rows.append([name, mode, label, *rates, bounds, f"{paired['p_value']:.2g}"])
        lines += [
            f"## {plain(found['b'])} minus {plain(found['a'])}",
            "",
            *table(["set", "mode", "label", "A", "B", "B − A", "95 %", "p"], rows),
        ]
    return lines


def _fidelity(report: dict[str, Any]) -> list[str]:
    lines = []
    for found in report["fidelity"]:
        said = f"{found['tensors']} tensors edited; {found['below_90']} keep less than 90 % of their edit."
        rows = [[worst["tensor"], percent(worst["retained"], 2), percent(worst["noise"], 2)] for worst in found["worst"]]
        lines += [f"## Fidelity of {plain(found['name'])}", "", said, "", *table(["least retained", "retained", "noise"], rows)]
    return lines


def _agreement(report: dict[str, Any]) -> list[str]:
    rows = [[one["measured"], one["dtype"], str(one["tokens"]), f"{one['kl']:.2e}", f"{one['largest']:.2e}"] for one in report["agreement"]]
    head = ["measured", "dtype", "answer tokens", "KL, nats a token", "largest at one token"]
    return ["## LoRA arm against fused weights", "", *table(head, rows)] if rows else []


def _arms(report: dict[str, Any]) -> list[str]:
    rows = [served_arms.cells(row) for row in report["latency"]]
    return ["## Served side by side", "", *table(served_arms.HEAD, rows)] if rows else []


def _provenance(report: dict[str, Any]) -> list[str]:
    rows = []
    for origin in report["provenance"]:
        seed = origin["config"].get("seed")
        rows.append([f"sku {origin['command']}", origin["name"], str(origin["identity"] or "")[:16], "" if seed is None else str(seed)])
    return ["## Provenance", "", *table(["command", "record", "identity", "seed"], rows)]


def evaluation_tables(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the tables of harm, utility and border sets, for all evaluations. evaluations: as in `build_report`'s dict."""
    harm, cost = [], []
    for one in evaluations:
        for name, mode, shares in _modes(one["forget"]):
            harm.append([one["name"], one["role"], name, mode, *answers(shares), number(shares.get("length_tokens"), 1), str(shares["n"])])
        retain = one["retain"]
        perplexity = [number(retain.get("perplexity")), ratio(retain.get("perplexity_ratio"))]
        cost.append([one["name"], *perplexity, *(percent(retain.get(key)) for key in ("qa_accuracy", "over_refusal", "ended", "repeated"))])
    if not evaluations:
        return []
    harm_head = ["evaluation", "model", "set", "mode", *ANSWERS, "tokens", "n"]
    cost_head = ["evaluation", "perplexity", "ratio", "QA right", "over-refusal", "ended", "said again"]
    border = [[one["name"], name, *border_cells(found)] for one in evaluations for name, found in one["border"].items()]
    beside = ["## Benign prompts in the style of the forget set", "", *table(["evaluation", "set", *BORDER_HEAD], border)] if border else []
    return ["## Harm", "", *table(harm_head, harm), "## Utility", "", *table(cost_head, cost), *beside]


def _modes(sets: dict[str, dict[str, Any]]) -> list[tuple[str, str, Any]]:
    """The entries (set, mode, value) of a mapping {set: {mode: value}}."""
    return [(name, mode, found) for name, modes in sets.items() for mode, found in modes.items()]


def plain(text: str) -> str:
    """A name, title or sentence on one line that shows as it is: neither HTML nor Markdown is read out of it."""
    return _MARKUP.sub(r"\\\g<0>", escape(" ".join(text.splitlines()), quote=False))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, followed by an empty line."""
    safe = [[plain(cell) for cell in row] for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *("| " + " | ".join(row) + " |" for row in safe), ""]
