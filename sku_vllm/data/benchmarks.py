"""Published safety benchmarks by their columns: HarmBench, StrongREJECT, JailbreakBench, XSTest. Bring the files; none is shipped.

`sku eval --forget harmbench=harmbench_behaviors_text_all.csv` works as it is. Of XSTest `--forget` takes the unsafe contrast
prompts and `--retain` the safe ones that merely look dangerous, so that its over-refusal is the XSTest number.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sku_vllm.data.rows import Row
from sku_vllm.errors import DataError

Records = list[tuple[str, dict[str, Any]]]
Reader = Callable[[Path, Records, bool], Iterator[Row]]


def benchmark_reader(columns: set[str]) -> Reader | None:
    """The reader of a published benchmark file, or None."""
    for wanted, reader in (
        ({"Behavior", "BehaviorID", "FunctionalCategory"}, harmbench),
        ({"forbidden_prompt", "category"}, strongreject),
        ({"Goal", "Behavior", "Category"}, jailbreakbench),
        ({"id", "type", "prompt"}, xstest),
    ):
        # Somebody's own rows may have an id and a type; XSTest's never have a response (its answers are `completion`).
        if wanted <= columns and not (reader is xstest and {"response", "messages"} & columns):
            return reader
    return None


def harmbench(path: Path, records: Records, safe: bool) -> Iterator[Row]:
    """harmbench_behaviors_text_*.csv; contextual behaviours carry their context first, as HarmBench's direct request does."""
    for where, record in records:
        context, behaviour = record.get("ContextString"), _text(record, "Behavior", where)
        yield Row.ask(f"{context}\n\n---\n\n{behaviour}" if context else behaviour, id=record.get("BehaviorID"))


def strongreject(path: Path, records: Records, safe: bool) -> Iterator[Row]:
    """strongreject_dataset.csv and strongreject_small_dataset.csv."""
    for where, record in records:
        yield Row.ask(_text(record, "forbidden_prompt", where), id=where.rpartition(" ")[2])


def jailbreakbench(path: Path, records: Records, safe: bool) -> Iterator[Row]:
    """JBB-Behaviors, harmful-behaviors.csv and benign-behaviors.csv alike: one set a file."""
    for where, record in records:
        yield Row.ask(_text(record, "Goal", where), id=str(record.get("Index") or where.rpartition(" ")[2]))


def xstest(path: Path, records: Records, safe: bool) -> Iterator[Row]:
    """xstest_prompts.csv, or a completions file (whose `completion` becomes the response): safe prompts, or the unsafe contrasts.

    A prompt is unsafe where its type starts with `contrast_` (XSTest's README).
    """
    found = False
    for where, record in records:
        prompt = _text(record, "prompt", where)
        if str(record.get("type", "")).startswith("contrast_") is not safe:
            found = True
            completion = record.get("completion")
            yield Row.ask(prompt, completion.strip() if isinstance(completion, str) else None, id=str(record.get("id")))
    if not found:
        raise DataError(f"{path}: has no {'safe' if safe else 'unsafe (contrast_)'} prompts; give the whole XSTest file")


def _text(record: dict[str, Any], column: str, where: str) -> str:
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {column!r} is empty or missing; take the benchmark's file as published")
    return value.strip()
