"""The sections of the page below the verdict: harm, cost, trade-off, attacks, fidelity, serving, comparisons, samples, provenance."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from sku_vllm.report.attacks import attack_charts, measurements
from sku_vllm.report.charts import heat_map, interval_row, share_bar, share_legend
from sku_vllm.report.curves import trade_off_charts
from sku_vllm.report.format import MISSING, interval, number, percent, points, ratio, seconds, short
from sku_vllm.report.fragments import numbers, section, table

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


def trade_off(report: dict[str, Any]) -> str:
    parts = []
    for tune in report["tune"]:
        charts = trade_off_charts(tune)
        if charts:
            rows = [
                [
                    f"{p['scale']:g}",
                    escape(name),
                    escape(mode),
                    percent(one["harmful"]),
                    interval(one),
                    percent(one["refusal"]),
                    percent(one["gibberish"]),
                    ratio(p["retain"].get("perplexity_ratio")),
                    percent(p["retain"].get("qa_accuracy")),
                ]
                for p in tune["curve"]
                for name, modes in p["forget"].items()
                for mode, one in modes.items()
            ]
            head = ["scale", "set", "mode", "harmful", "95 %", "refusal", "gibberish", "perplexity", "QA right"]
            parts.append(f'<div class="charts">{"".join(charts)}</div>{numbers(table(head, rows), True)}')
    said = next((f"chosen scale {t['scale']:g}" if t.get("scale") is not None else "no scale qualified" for t in report["tune"]), "")
    return (
        section(
            "Trade-off over the scale",
            f"More negation is not always safer: all scales were measured on validation data; {escape(said)}.",
            *parts,
        )
        if parts
        else ""
    )


def attacks(report: dict[str, Any]) -> str:
    parts = []
    for attack in report["attacks"]:
        rows = [
            [
                escape(done),
                escape(name),
                escape(mode),
                percent(one["harmful"]),
                interval(one),
                percent(one["refusal"]),
                percent(one["gibberish"]),
                str(one["n"]),
            ]
            for done, name, mode, one in measurements(attack)
        ]
        parts.append(
            f'<h3>{escape(attack["kind"])}</h3><div class="charts">{"".join(attack_charts(attack))}</div>'
            + numbers(table(["after", "set", "mode", "harmful", "95 %", "refusal", "gibberish", "n"], rows), True)
        )
    return (
        section(
            "Does it come back?", "The edited model under attack; suppression is not erasure, so the question is what it takes.", *parts
        )
        if parts
        else ""
    )


def faithful(report: dict[str, Any]) -> str:
    parts = []
    for found in report["fidelity"]:
        worst = [[f"<code>{escape(w['tensor'])}</code>", percent(w["retained"], 2), percent(w["noise"], 2)] for w in found["worst"]]
        said = f"{found['tensors']} tensors edited; {found['below_90']} keep less than 90 % of their edit."
        chart = heat_map(found["layers"], found["modules"], found["cells"]) if found["layers"] else ""
        parts.append(
            f'<h3>{escape(found["name"])}</h3><p>{said}</p><div class="charts">{chart}<figure><figcaption>Least retained</figcaption>'
            f"{table(['tensor', 'retained', 'noise'], worst)}</figure></div>"
        )
    for found in report["agreement"]:
        parts.append(
            f"<h3>LoRA arm against fused weights</h3><p>KL(LoRA ‖ fused) = <b>{found['kl']:.2e}</b> nats a token, largest {found['kl_max']:.2e}, over "
            f"{found['tokens']} answer tokens in {escape(found['dtype'])}; the edit itself moves the base by {found['edit_kl']:.2e}.</p>"
        )
    return (
        section(
            "Is the whole edit in the file?",
            "Rounding to the stored dtype can lose part of an edit; 100 % retained means none was lost.",
            *parts,
        )
        if parts
        else ""
    )


def serving(report: dict[str, Any]) -> str:
    rows = [
        [escape(r["arm"]), str(r["requests"]), str(r["judged"]), percent(r["harmful"]), interval(r), seconds(r["latency_p50_s"])]
        for r in report["latency"]
    ]
    return (
        section(
            "Served side by side",
            "Read back from the server's own metrics. Arms that share one LoRA-enabled engine share its cost, so their latencies flatter neither.",
            table(["arm", "requests", "judged", "harmful", "95 %", "median latency"], rows),
        )
        if rows
        else ""
    )


def training(report: dict[str, Any]) -> str:
    rows = [
        [
            f"<code>{escape(short(str(t.get('base') or t['config'].get('model', '')), 60))}</code>",
            escape(str(t.get("method") or t["config"].get("method", ""))),
            escape(str(t.get("steps", t["config"].get("steps", "")))),
            seconds(t.get("seconds")),
        ]
        for t in report["training"]
    ]
    return (
        section(
            "How the knowledge was identified",
            "One row per trained adapter. A raw adapter is the harmful knowledge itself: do not publish it.",
            table(["model", "method", "steps", "time"], rows),
        )
        if rows
        else ""
    )


def comparisons(report: dict[str, Any]) -> str:
    parts = []
    for found in report["comparisons"]:
        rows = [
            [
                f"{escape(name)}, {escape(mode)}",
                escape(label),
                percent(d["rate_a"]),
                percent(d["rate_b"]),
                points(d["difference"]),
                f"{points(d['low'])} to {points(d['high'])}",
                f"{d['p_value']:.2g}",
                escape(d["test"]),
            ]
            for name, modes in found["sets"].items()
            for mode, labels in modes.items()
            for label, d in labels.items()
            if label != "benign"
        ]
        parts.append(
            f"<p><b>A</b> <code>{escape(found['a'])}</code><br><b>B</b> <code>{escape(found['b'])}</code></p>"
            + table(["set", "label", "A", "B", "B − A", "95 %", "p", "test"], rows)
        )
    return section("Answer by answer", "The same prompts to both models, paired.", *parts) if parts else ""


def samples(report: dict[str, Any]) -> str:
    groups: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for sample in report["samples"]:
        groups.setdefault((sample["private"], sample["set"]), []).append(sample)
    parts = []
    for (private, name), found in groups.items():
        text = "".join(_sample(one) for one in found)
        said = (
            f"Show {len(found)} answers to forget set {name}: may be disturbing" if private else f"{len(found)} answers to benign prompts"
        )
        parts.append(f"<details{'' if private else ' open'}><summary>{escape(said)}</summary><div>{text}</div></details>")
    return (
        section(
            "Answers to read",
            "Greedy answers of the edited model beside the base's. Forget-set text stays closed until you open it, and on paper.",
            *parts,
        )
        if parts
        else ""
    )


def _sample(one: dict[str, Any]) -> str:
    before = (
        f'<span class="tag {one["base_label"]}">base: {one["base_label"]}</span><blockquote>{escape(one["base_response"] or "(empty)")}</blockquote>'
        if one["base_label"]
        else ""
    )
    return (
        f'<div class="sample"><p><b>{escape(one["prompt"])}</b></p>{before}'
        f'<span class="tag {one["label"]}">edited: {one["label"]}</span><blockquote>{escape(one["response"] or "(empty)")}</blockquote></div>'
    )


def provenance(report: dict[str, Any]) -> str:
    parts = []
    for origin in report["provenance"]:
        pairs = [
            ("identity (sha256)", origin["identity"]),
            ("base identity", origin["base_identity"]),
            ("seed", origin["config"].get("seed")),
            ("adapters", json.dumps(origin["adapters"]) if origin["adapters"] else None),
            ("configuration", json.dumps(origin["config"], ensure_ascii=False)),
            ("versions", ", ".join(f"{k} {v}" for k, v in origin["versions"].items())),
        ]
        body = "".join(f"<dt>{escape(key)}</dt><dd><code>{escape(str(value))}</code></dd>" for key, value in pairs if value is not None)
        parts.append(
            f'<details><summary>sku {escape(origin["command"])}: {escape(origin["name"])}</summary><div><dl class="pairs">{body}</dl></div></details>'
        )
    return section(
        "Where the numbers come from",
        "Every record this page was made from, with its full configuration, seeds, digests and versions.",
        *parts,
    )


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
