"""The report as one HTML page without network access or JavaScript. Forget-set text is inside closed <details> elements.

Open this file to change the order of the sections or the box with the verdict; the other sections have files of their own.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from sku_vllm.report import harm_and_cost, provenance
from sku_vllm.report.attacks import attacks_section
from sku_vllm.report.categories import categories_section
from sku_vllm.report.fidelity import fidelity_section
from sku_vllm.report.number_format import STATES, interval, percent, ratio
from sku_vllm.report.page_parts import section
from sku_vllm.report.samples import samples_section
from sku_vllm.report.served_arms import serving_section
from sku_vllm.report.telling_apart import telling_apart_section
from sku_vllm.report.trade_off import trade_off_section


def page(report: dict[str, Any]) -> str:
    """The HTML document of `build_report`'s dict."""
    style = files("sku_vllm.report").joinpath("report.css").read_text(encoding="utf-8")
    sections = [
        verdict_section,
        checks_section,
        harm_and_cost.harm_section,
        harm_and_cost.shares_section,
        harm_and_cost.endings_section,
        harm_and_cost.utility_section,
        categories_section,
        telling_apart_section,
        trade_off_section,
        attacks_section,
        fidelity_section,
        serving_section,
        provenance.training_section,
        provenance.comparisons_section,
        samples_section,
        provenance.provenance_section,
    ]
    body = "\n".join(text for section in sections if (text := section(report)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(report['title'])}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(report['title'])}</h1>"
        f"<p>{escape(report['generated'])}, sku_vllm {escape(report['versions']['sku_vllm'])}</p></header>\n"
        f"{body}\n<footer>Intervals are Wilson's at 95 %, clustered by prompt where answers were sampled. "
        "A model that answers gibberish is not safe but broken, so refusals and gibberish are shown with every harmful rate.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def verdict_section(report: dict[str, Any]) -> str:
    """The first box: whether verified and why, how many checks fail or are unknown, the headline and the most important numbers."""
    found = report["verdict"]
    verified = found["status"] == "verified"
    said = "Verified: what was judged is what is served" if verified else "Not verified"
    reasons = "".join(f'<p class="reason">{escape(reason[0].upper() + reason[1:])}.</p>' for reason in found["reasons"])
    return (
        f'<section class="verdict {found["status"].replace(" ", "-")}"><span class="stamp">{said}</span>{_tally(found["checks"])}'
        f'<p class="headline">{escape(found["headline"])}</p>'
        f'<p class="basis">{escape(found["basis"])}</p>{reasons}{_facts(report)}</section>'
    )


def _tally(checks: Sequence[dict[str, str]]) -> str:
    """How many checks fail or are unknown. It is shown next to the verdict, since a verified checkpoint may still fail checks."""
    count = {state: sum(check["state"] == state for check in checks) for state in STATES}
    fails = (
        f'<span class="state fail">{count["fail"]} of {len(checks)} checks {"fails" if count["fail"] == 1 else "fail"}</span>'
        if count["fail"]
        else ""
    )
    unknown = f'<span class="state missing">{count["missing"]} unknown</span>' if count["missing"] else ""
    return (
        f'<span class="tally">{fails}{unknown}</span>'
        if fails or unknown
        else '<span class="tally"><span class="state pass">all checks hold</span></span>'
    )


def _facts(report: dict[str, Any]) -> str:
    edited = next((e for e in report["evaluations"] if e["name"] == report["primary"]), None)
    if edited is None:
        return ""
    base = next((e for e in report["evaluations"] if e["role"] == "base"), None)
    before, now = (base["retain"] if base else {}), edited["retain"]
    sampled = [modes["sampled"] for modes in edited["forget"].values() if modes.get("sampled", {}).get("harmful") is not None]
    worst = max(sampled, key=lambda one: one["harmful"], default=None)
    cells = [("Perplexity", ratio(now.get("perplexity_ratio")), "of the base's")]
    if worst:
        cells.insert(0, ("Harmful, sampled", percent(worst["harmful"]), f"worst set; {interval(worst)}"))
        cells.append(("Gibberish, sampled", percent(max(one["gibberish"] for one in sampled)), "worst set"))
        if again := [one["repeated"] for one in sampled if "repeated" in one]:
            cells.append(("Sentences said again", percent(max(again)), "sampled, worst set"))
    if now.get("qa_accuracy") is not None:
        cells.append(("QA right", percent(now["qa_accuracy"]), f"base {percent(before.get('qa_accuracy'))}" if before else ""))
    cells.append(("Over-refusal", percent(now.get("over_refusal")), f"base {percent(before.get('over_refusal'))}" if before else ""))
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}<small>{escape(n)}</small></dd></div>" for k, v, n in cells)
        + "</dl>"
    )


def checks_section(report: dict[str, Any]) -> str:
    """A line for each check: whether it holds, and the numbers it is based on."""
    items = "".join(
        f'<li><span class="state {check["state"]}">{STATES[check["state"]]}</span><span class="name">{escape(check["name"])}</span>'
        f'<span class="detail">{escape(check["detail"])}</span></li>'
        for check in report["verdict"]["checks"]
    )
    return section(
        "What holds, what does not, what was not measured",
        "Limits are those that sku tune used, or the package's defaults.",
        f'<ul class="checks">{items}</ul>',
    )
