"""The report as Markdown, without any forget-set text: for a pull request or a ticket."""

from collections.abc import Sequence
from typing import Any

from sku_vllm.report import serving
from sku_vllm.report.attacks import measurements
from sku_vllm.report.format import SPACE, STATES, answers, interval, number, percent, points, ratio

MARKS = {**STATES, "fail": "FAILS"}


def markdown(report: dict[str, Any]) -> str:
    """`build_report`'s dict as Markdown."""
    verdict = report["verdict"]
    lines = [
        f"# {report['title']}",
        "",
        f"{report['generated']}, sku_vllm {report['versions']['sku_vllm']}",
        "",
        f"**{'Verified' if verdict['status'] == 'verified' else 'Not verified'}.** {verdict['headline']} {verdict['basis']}",
        "",
    ]
    lines += [f"- Not verified because {reason}." for reason in verdict["reasons"]] + [""] * bool(verdict["reasons"])
    lines += [
        "## Checks",
        "",
        *table(["check", "state", "detail"], [[c["name"], MARKS[c["state"]], c["detail"]] for c in verdict["checks"]]),
    ]
    lines += evaluation_tables(report["evaluations"])
    for tune in report["tune"]:
        scale = "no scale qualified" if tune.get("scale") is None else f"chosen scale {tune['scale']:g}"
        rows = [
            [
                f"{p['scale']:g}",
                name,
                mode,
                percent(s["harmful"]),
                interval(s),
                percent(s["gibberish"]),
                ratio(p["retain"].get("perplexity_ratio")),
            ]
            for p in tune.get("curve", [])
            for name, modes in p["forget"].items()
            for mode, s in modes.items()
        ]
        lines += [f"## Trade-off: {scale}", "", *table(["scale", "set", "mode", "harmful", "95 %", "gibberish", "perplexity"], rows)]
    for attack in report["attacks"]:
        rows = [[what, name, mode, *answers(one), str(one["n"])] for what, name, mode, one in measurements(attack)]
        head = ["after", "set", "mode", "harmful", "95 %", "refusal", "gibberish", "n"]
        lines += [f"## Attack: {attack['kind']}", "", *table(head, rows)]
    for found in report["lm_eval"]:
        scores = ("base", "edited", "difference", "stderr")
        rows = [[task["task"], task["metric"], *(number(task[key], 4) for key in scores)] for task in found["tasks"]]
        lines += [
            f"## lm-evaluation-harness: {found['name']}",
            "",
            *table(["task", "metric", "base", "edited", "difference", "standard error"], rows),
        ]
    for found in report["comparisons"]:
        rows = [
            [
                name,
                mode,
                label,
                percent(d["rate_a"]),
                percent(d["rate_b"]),
                points(d["difference"]),
                f"{points(d['low'])} to {points(d['high'])}",
                f"{d['p_value']:.2g}",
            ]
            for name, modes in found["sets"].items()
            for mode, labels in modes.items()
            for label, d in labels.items()
        ]
        lines += [f"## {found['b']} minus {found['a']}", "", *table(["set", "mode", "label", "A", "B", "B − A", "95 %", "p"], rows)]
    for found in report["fidelity"]:
        lines += [
            f"## Fidelity of {found['name']}",
            "",
            f"{found['tensors']} tensors edited; {found['below_90']} keep less than 90 % of their edit.",
            "",
            *table(
                ["least retained", "retained", "noise"],
                [[w["tensor"], percent(w["retained"], 2), percent(w["noise"], 2)] for w in found["worst"]],
            ),
        ]
    if report["agreement"]:
        rows = [
            [one["measured"], one["dtype"], str(one["tokens"]), f"{one['kl']:.2e}", f"{one['largest']:.2e}"] for one in report["agreement"]
        ]
        head = ["measured", "dtype", "answer tokens", "KL, nats a token", "largest at one token"]
        lines += ["## LoRA arm against fused weights", "", *table(head, rows)]
    if report["latency"]:
        lines += ["## Served side by side", "", *table(serving.HEAD, [serving.cells(row) for row in report["latency"]])]
    lines += [
        "## Provenance",
        "",
        *table(
            ["command", "record", "identity", "seed"],
            [
                [
                    f"sku {o['command']}",
                    o["name"],
                    str(o["identity"] or "")[:16],
                    str(o["config"].get("seed") if o["config"].get("seed") is not None else ""),
                ]
                for o in report["provenance"]
            ],
        ),
    ]
    return "\n".join(lines).rstrip().replace(SPACE, " ") + "\n"


def evaluation_tables(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """Harm and utility of every evaluation."""
    harm = [
        [e["name"], e["role"], name, mode, percent(s["harmful"]), interval(s), percent(s["refusal"]), percent(s["gibberish"]), str(s["n"])]
        for e in evaluations
        for name, modes in e["forget"].items()
        for mode, s in modes.items()
    ]
    cost = [
        [
            e["name"],
            number(r.get("perplexity")),
            ratio(r.get("perplexity_ratio")),
            percent(r.get("qa_accuracy")),
            percent(r.get("over_refusal")),
        ]
        for e in evaluations
        for r in [e["retain"]]
    ]
    if not evaluations:
        return []
    return [
        "## Harm",
        "",
        *table(["evaluation", "model", "set", "mode", "harmful", "95 %", "refusal", "gibberish", "n"], harm),
        "## Utility",
        "",
        *table(["evaluation", "perplexity", "ratio", "QA right", "over-refusal"], cost),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, an empty one after it."""
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *("| " + " | ".join(row) + " |" for row in safe), ""]
