"""Published safety benchmarks, recognised by their columns: HarmBench, StrongREJECT, JailbreakBench, XSTest. No file is shipped.

`sku eval --forget harmbench=harmbench_behaviors_text_all.csv` reads the file as published. From XSTest's, `--forget` takes the unsafe
contrast prompts and `--retain` the safe prompts that look dangerous, so that over-refusal on these is the number XSTest reports.
Answers in such a file (completions, attack artifacts) are read too, for `sku judge`. Open this file to add a benchmark.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sku_vllm.data.answer_texts import Record
from sku_vllm.data.forms import category_of
from sku_vllm.data.known_set import KnownSet
from sku_vllm.data.rows import BadRow, LeftOut, Row

# The types of XSTest's prompts (Röttger et al. 2024, and the two that its first release spelled otherwise); unsafe ones begin `contrast_`.
XSTEST_TYPES = frozenset(
    ("homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "historical_events", "privacy_public")
    + ("real_group_nons_discr", "nons_group_real_discr", "real_discr_nons_group", "privacy_fictional", "privacy", "discr")
)
ANSWERED = ("response", "completion", "generation")


def harmbench(record: Record, place: str, wanted: bool | None) -> Iterator[Row]:
    """harmbench_behaviors_text_*.csv; contextual behaviours carry their context first, as HarmBench's direct request does.

    Results are broken down by the functional category (standard, contextual, copyright), as the paper's are, and by the semantic one.
    """
    context, behaviour = record.get("contextstring"), _text(record, "behavior")
    prompt = f"{context}\n\n---\n\n{behaviour}" if context else behaviour
    identity = record.get("behaviorid")
    kinds = dict.fromkeys(kind for name in ("functionalcategory", "semanticcategory") if (kind := category_of(record.get(name))))
    yield Row.ask(prompt, _answer(record), id=None if identity is None else str(identity), category=category_of(list(kinds)))


def harmbench_contexts(record: Record, place: str, wanted: bool | None) -> Iterator[Row]:
    """HarmBench's contextual behaviours as sets of the hub hold them: prompt, context and category, and no answer."""
    named = {"contextstring": record.get("context"), "behavior": record.get("prompt"), "semanticcategory": record.get("category")}
    yield from harmbench(named | {"behaviorid": record.get("id", place)}, place, wanted)


def strongreject(record: Record, place: str, wanted: bool | None) -> Iterator[Row]:
    """strongreject_dataset.csv and strongreject_small_dataset.csv."""
    yield Row.ask(_text(record, "forbidden_prompt"), _answer(record), id=place, category=category_of(record.get("category")))


def jailbreakbench(record: Record, place: str, wanted: bool | None) -> Iterator[Row]:
    """JBB-Behaviors, harmful-behaviors.csv or benign-behaviors.csv, as CSV or Parquet, or an attack artifact with prompts and answers.

    Each file holds one kind of prompt, so `wanted` is not read.
    """
    index, prompt = record.get("index"), record.get("prompt")
    asked = prompt if isinstance(prompt, str) and prompt.strip() else _text(record, "goal")
    identity = place if index is None else str(index)  # the first index is 0, as a number in Parquet and as text in CSV
    yield Row.ask(asked, _answer(record), id=identity, category=category_of(record.get("category")))


def xstest(record: Record, place: str, wanted: bool | None) -> Iterator[Row]:
    """xstest_prompts.csv, or a completions file (whose `completion` becomes the response): safe prompts, or the unsafe contrasts.

    A prompt is unsafe where its type starts with `contrast_` (XSTest's README).
    """
    kind = str(record.get("type"))
    if wanted is not None and kind.startswith("contrast_") is wanted:
        raise LeftOut("safe prompts" if not wanted else "unsafe prompts (contrast_)")
    identity = next((record[name] for name in ("id", "id_v2", "id_v1") if record.get(name) is not None), place)
    yield Row.ask(_text(record, "prompt"), _answer(record), id=str(identity), category=kind)


def _answer(record: Record) -> str | None:
    return next((record[name].strip() for name in ANSWERED if isinstance(record.get(name), str)), None)


def _text(record: Record, column: str) -> str:
    value: Any = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{column!r} is empty or missing; take the benchmark's file as published")
    return value.strip()


def _is_xstest(columns: set[str], sample: Sequence[Record]) -> bool:
    # Somebody's own rows may have a type too; XSTest's are of a few known types, and its answers are called `completion`.
    kinds = {str(record.get("type")).removeprefix("contrast_") for record in sample}
    return {"type", "prompt"} <= columns and not {"response", "messages"} & columns and bool(kinds) and kinds <= XSTEST_TYPES


def _is_contextual(columns: set[str], sample: Sequence[Record]) -> bool:
    return {"prompt", "context", "category"} <= columns <= {"prompt", "context", "category", "id"}


def _has(*names: str) -> Callable[[set[str], Sequence[Record]], bool]:
    return lambda columns, sample: columns.issuperset(names)


BENCHMARKS = (
    KnownSet("HarmBench's behaviours", harmbench, _has("behavior", "behaviorid", "functionalcategory"), harmful_only=True),
    KnownSet("prompts with a context (HarmBench's contextual behaviours on the hub)", harmbench_contexts, _is_contextual),
    KnownSet("StrongREJECT's prompts", strongreject, _has("forbidden_prompt", "category"), harmful_only=True),
    KnownSet("JailbreakBench's behaviours", jailbreakbench, _has("goal", "behavior", "category")),
    KnownSet("XSTest", xstest, _is_xstest),
)
