"""The report's examples: a few answers of the edited model per set and label, each with the base's answer, and their section."""

from collections.abc import Sequence
from html import escape
from typing import Any

from sku_vllm.evaluate.measure_request import is_forget
from sku_vllm.evaluate.read_judged import read_judged
from sku_vllm.report.evaluations import Evaluation
from sku_vllm.report.number_format import short
from sku_vllm.report.page_parts import section
from sku_vllm.report.verdict import baseline


def samples(evaluations: Sequence[Evaluation], edited: Evaluation | None, rows: int) -> list[dict[str, Any]]:
    """Up to `rows` greedy answers per set and label of the edited model, each with the base's answer to the same prompt.

    They are read from `rows.jsonl` in the evaluation's directory; without that file there are none. `private` is True for forget sets.

    Raises:
        DataError: a `rows.jsonl` is damaged.
    """
    if edited is None or rows < 1:
        return []
    base = baseline(evaluations, edited)
    before = {(row["set"], row["prompt"]): row for row in (_greedy(base) if base else [])}
    shown: list[dict[str, Any]] = []
    count: dict[tuple[str, str], int] = {}
    for row in _greedy(edited):
        place = (row["set"], row["label"])
        count[place] = count.get(place, 0) + 1
        if count[place] > rows:
            continue
        other = before.get((row["set"], row["prompt"]))
        shown.append(
            {
                "set": row["set"],
                "private": is_forget(row["set"]),
                "prompt": short(row["prompt"]),
                "label": row["label"],
                "response": short(row["response"]),
                "base_label": other["label"] if other else None,
                "base_response": short(other["response"]) if other else None,
            }
        )
    return shown


def _greedy(evaluation: Evaluation) -> list[dict[str, str]]:
    if not (evaluation.directory / "rows.jsonl").is_file():
        return []
    judged = read_judged(evaluation.directory).rows
    return [{"set": name, "prompt": prompt, **one} for (name, mode, prompt), many in judged.items() if mode == "greedy" for one in many]


def samples_section(report: dict[str, Any]) -> str:
    """The section with the answers in <details> elements; those with forget-set text are closed."""
    groups: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for sample in report["samples"]:
        groups.setdefault((sample["private"], sample["set"]), []).append(sample)
    parts = []
    for (private, name), found in groups.items():
        text = "".join(_sample(one) for one in found)
        said = (
            f"Show {len(found)} answers to forget set {name}: may be disturbing" if private else f"{len(found)} answers to benign prompts"
        )
        parts.append(f"<details{' class=private' if private else ' open'}><summary>{escape(said)}</summary><div>{text}</div></details>")
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
        f'<span class="tag {escape(one["base_label"])}">base: {escape(one["base_label"])}</span>'
        f"<blockquote>{escape(one['base_response'] or '(empty)')}</blockquote>"
        if one["base_label"]
        else ""
    )
    return (
        f'<div class="sample"><p><b>{escape(one["prompt"])}</b></p>{before}'
        f'<span class="tag {escape(one["label"])}">edited: {escape(one["label"])}</span>'
        f"<blockquote>{escape(one['response'] or '(empty)')}</blockquote></div>"
    )
