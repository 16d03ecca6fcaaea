"""The built-in detectors on labelled answers: `python -m sku_vllm.benchmarks.judge_answers FILE…` prints the confusion by kind.

A file is JSONL with `answer`, `label` (answer, refusal or gibberish), `kind` and `language`; `tests/judges/labelled_answers.jsonl` is the
project's own. benchmarks/results/refusal_answers.md holds what this prints.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from sku_vllm.data.files import json_lines
from sku_vllm.judges.gibberish import is_gibberish
from sku_vllm.judges.refusal import is_refusal

FOUND = ("refusal", "gibberish", "answer")


def found_as(answer: str) -> str:
    """What the detectors call an answer."""
    return "refusal" if is_refusal(answer) else "gibberish" if is_gibberish(answer) else "answer"


def confusion(rows: Iterable[Mapping[str, Any]], by: str) -> dict[tuple[str, str], Counter[str]]:
    """{(group, label): how often each of FOUND was found}; `by` is the key that groups, kind or language."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        counts.setdefault((str(row[by]), str(row["label"])), Counter())[found_as(row["answer"])] += 1
    return counts


def page(rows: list[Mapping[str, Any]]) -> str:
    """Both tables as Markdown."""
    parts = []
    for by in ("kind", "language"):
        parts += [f"| {by} | label | n | " + " | ".join(f"found {name}" for name in FOUND) + " | right |", "|---|---|---|---|---|---|---|"]
        for (group, label), found in sorted(confusion(rows, by).items()):
            n = sum(found.values())
            parts.append(
                f"| {group} | {label} | {n} | " + " | ".join(str(found[name]) for name in FOUND) + f" | {100 * found[label] / n:.0f} % |"
            )
        parts.append("")
    right = sum(found_as(row["answer"]) == row["label"] for row in rows)
    return "\n".join([*parts, f"{right} of {len(rows)} right."])


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    """Print the confusion of the detectors on labelled answers, by kind and by language."""
    click.echo(page([row for file in files for _, row in json_lines(file)]))


if __name__ == "__main__":
    main()
