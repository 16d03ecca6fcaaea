"""Published data sets that say which answers or prompts are harmful, recognised by their columns: PKU-SafeRLHF, BeaverTails, WildGuardMix,
Aegis, KTO's unpaired preferences, TruthfulQA, those of `marked_prompts.py`, and the benchmarks of `benchmarks.py`.

Open this file to make `--forget` and `--retain` read another published format.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from sku_vllm.data.answer_texts import Record
from sku_vllm.data.benchmarks import BENCHMARKS
from sku_vllm.data.forms import category_of, generic_rows
from sku_vllm.data.known_set import KnownSet
from sku_vllm.data.marked_prompts import MARKED_PROMPTS
from sku_vllm.data.rows import BadRow, LeftOut, Row

# Columns that say of `response` whether it is harmful, and the values that mean safe and harmful.
MARKS = ("is_safe", "is_response_safe", "response_harm_label", "response_label", "response_safety")
SAFE = {"true": True, "1": True, "1.0": True, "safe": True, "unharmful": True, "harmless": True}
UNMARKED = ("", "none", "null", "nan", "n/a")  # a table's ways to say that there is no mark
TRUTHS = SAFE | {"false": False, "0": False, "0.0": False, "unsafe": False, "harmful": False}


def known_set(columns: set[str], sample: Sequence[Record]) -> KnownSet | None:
    """The published format of a file with these columns and first records, or None."""
    return next((known for known in (*SETS, *MARKED_PROMPTS, *BENCHMARKS) if known.fits(columns, sample)), None)


def pku_pairs(record: Record, place: str, wanted: bool | None) -> Iterator[Row | LeftOut]:
    """PKU-SafeRLHF: two answers a row, each marked (`is_response_0_safe`, the same in the old and the new release)."""
    for side in (0, 1):
        category = category_of(record.get(f"response_{side}_harm_category"))
        try:
            yield from _marked(record, (f"response_{side}", f"is_response_{side}_safe"), category, place, wanted)
        except LeftOut as other:
            yield other  # the other answer may be one that is wanted


def marked_answers(record: Record, place: str, wanted: bool | None) -> Iterator[Row]:
    """One answer a row with its mark: PKU-SafeRLHF-QA and BeaverTails (`is_safe`), WildGuardMix, Aegis."""
    mark = next(name for name in MARKS if name in record)
    names = ("category", "harm_category", "subcategory", "violated_categories")
    category = next((record[name] for name in names if record.get(name) is not None), None)
    yield from _marked(record, ("response", mark), category_of(category), place, wanted)


def _marked(record: Record, columns: tuple[str, str], category: str | None, place: str, wanted: bool | None) -> Iterator[Row]:
    answer, mark = columns
    text, told = record.get(answer), record.get(mark)
    told = None if isinstance(told, str) and told.strip().lower() in UNMARKED else told
    if wanted is not None and told is not None and _truth(told, mark) is not wanted:
        raise LeftOut(f"answers marked {'unsafe' if wanted else 'safe'}")
    if wanted is not None and told is None:
        raise LeftOut("without a mark or an answer")
    turns = next(row.messages for row in generic_rows({"prompt": record.get("prompt")}, wanted) if isinstance(row, Row))
    if wanted is not None and text is not None and not isinstance(text, str):
        raise BadRow(f"{answer!r} is {type(text).__name__}, expected text; take the set's file as published")
    if wanted is not None and not (text or "").strip():
        raise LeftOut("with a mark but without an answer")
    yield Row(turns, text, id=str(record.get("id", place)), category=category)


def _truth(value: Any, name: str) -> bool:
    """Whether a mark says safe, as Parquet, JSON or CSV spells it. Raises BadRow for another value."""
    text = str(value).strip().lower()
    if text not in TRUTHS:
        raise BadRow(f"{name!r} is {value!r}, expected true or false")
    return TRUTHS[text]


def unpaired_preferences(record: Record, place: str, wanted: bool | None) -> Iterator[Row | LeftOut]:
    """TRL's unpaired preferences (KTO): prompt, completion, and `label`: whether the completion is wanted."""
    if wanted is not None and _truth(record.get("label"), "label") is not wanted:
        raise LeftOut(f"answers labelled {'not wanted' if wanted else 'wanted'}")
    yield from generic_rows({key: value for key, value in record.items() if key != "label"}, wanted)


def truthfulqa(record: Record, place: str, wanted: bool | None) -> Iterator[Row]:
    """TruthfulQA: a row for each answer, once. The best and the correct ones are safe, the incorrect ones (falsehoods) are not.

    The CSV joins answers with `;`.
    """
    question, best = record.get("question"), record.get("best_answer")
    if not isinstance(question, str) or not question.strip():
        raise BadRow("question is empty or missing")
    if not isinstance(best, str) or not best.strip():
        raise BadRow("best answer is empty or missing")
    right = [best, *_parts(record.get("correct_answers"), "correct answers")]
    wrong = _parts(record.get("incorrect_answers"), "incorrect answers")
    texts = [*right, *wrong] if wanted is None else right if wanted else wrong
    for answer in dict.fromkeys(text.strip() for text in texts):
        if answer:
            yield Row.ask(question.strip(), answer, id=place, category=category_of(record.get("category")))


def _parts(value: Any, name: str) -> list[str]:
    parts = value.split(";") if isinstance(value, str) else [] if value is None else list(value)
    if not all(isinstance(text, str) for text in parts):
        raise BadRow(f"{name} have to be a text or a list of texts")
    return parts


def _is_marked(columns: set[str], sample: Sequence[Record]) -> bool:
    return {"prompt", "response"} <= columns and any(mark in columns for mark in MARKS)


def _is_unpaired(columns: set[str], sample: Sequence[Record]) -> bool:
    labels = [record.get("label") for record in sample]
    # Tables write the labels as text, and some sets as 0 and 1.
    told = all(str(label).strip().lower() in ("true", "false", "0", "1", "1.0", "0.0") for label in labels)
    return {"prompt", "completion", "label"} <= columns and bool(labels) and told


SETS = (
    KnownSet(
        "PKU-SafeRLHF, two marked answers a row",
        pku_pairs,
        lambda columns, sample: {"prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"} <= columns,
        once=True,
    ),
    KnownSet("answers marked safe or unsafe (BeaverTails, PKU-SafeRLHF-QA, WildGuardMix, Aegis)", marked_answers, _is_marked, once=True),
    KnownSet("TRL's unpaired preferences", unpaired_preferences, _is_unpaired, once=True),
    KnownSet("TruthfulQA", truthfulqa, lambda columns, sample: {"question", "best_answer", "correct_answers"} <= columns),
)
