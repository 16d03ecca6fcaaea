"""The report's part on categories: how the answers of each kind of prompt were labelled, as HarmBench, StrongREJECT and XSTest print it."""

from collections.abc import Iterator
from html import escape
from typing import Any

from sku_vllm.report.number_format import interval, number, percent
from sku_vllm.report.page_parts import section, table

HEAD = ["of", "set", "mode", "category", "answers", "harmful", "95 %", "refusal", "in part", "score"]
LEAD = (
    "By category, where a set has them. Score: the mean of a judge that grades, such as StrongREJECT's rubric. "
    "On retain sets refusals are over-refusals. In part: answers that a judge with XSTest's classes calls partial refusals."
)


def rows(report: dict[str, Any]) -> list[list[str]]:
    """The cells of every category of every set in every evaluation, as text, in the order of HEAD; the whole set is its first line."""
    return [
        [
            evaluation["name"],
            name,
            mode,
            category,
            str(part["n"]),
            percent(part.get("harmful")),
            interval(part),
            percent(part.get("refusal", part.get("over_refusal"))),
            percent(part.get("partial_refusal")),
            number(part.get("score")),
        ]
        for evaluation in report["evaluations"]
        for name, mode, shares in _sets(evaluation)
        if "by_category" in shares
        for category, part in {"all": shares, **shares["by_category"]}.items()
    ]


def _sets(evaluation: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, modes in evaluation["forget"].items():
        for mode, shares in modes.items():
            yield name, mode, shares
    yield "retain", "greedy", evaluation["retain"]


def categories_section(report: dict[str, Any]) -> str:
    """The section of the page; nothing where no set has categories."""
    found = [[escape(cell) for cell in row] for row in rows(report)]
    return section("By category", LEAD, table(HEAD, found)) if found else ""
