"""Public data sets by their columns: PKU-SafeRLHF (and BeaverTails), TruthfulQA, and the benchmarks of `benchmarks.py`."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sku_vllm.data.benchmarks import benchmark_reader
from sku_vllm.data.rows import Row
from sku_vllm.errors import DataError

Records = list[tuple[str, dict[str, Any]]]
Reader = Callable[[Path, Records, bool], Iterator[Row]]


def reader_for(columns: set[str]) -> Reader | None:
    """The reader of a known public data set, or None."""
    if {"prompt", "response_0", "response_1"} <= columns:
        return pku_pairs
    if {"prompt", "response", "is_safe"} <= columns:
        return pku_answers
    if {"Question", "Best Answer", "Correct Answers"} <= columns:
        return truthfulqa
    if {"question", "best_answer", "correct_answers"} <= columns:
        return truthfulqa
    return benchmark_reader(columns)


def pku_pairs(path: Path, records: Records, safe: bool) -> Iterator[Row]:
    """PKU-SafeRLHF: two answers a row, each marked (`is_response_0_safe`, the same in the old and the new release)."""
    marked = ((where, record, side) for where, record in records for side in (0, 1))
    yield from _answers(path, ((w, r, f"response_{s}", f"is_response_{s}_safe") for w, r, s in marked), safe)


def pku_answers(path: Path, records: Records, safe: bool) -> Iterator[Row]:
    """PKU-SafeRLHF-QA and BeaverTails: one answer a row, marked `is_safe`."""
    yield from _answers(path, ((where, record, "response", "is_safe") for where, record in records), safe)


def _answers(path: Path, marked: Iterable[tuple[str, dict[str, Any], str, str]], safe: bool) -> Iterator[Row]:
    """The answers whose mark is `safe`, each (prompt, answer) once."""
    seen = set()
    for where, record, answer, mark in marked:
        prompt, text = record.get("prompt"), record.get(answer)
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{where}: 'prompt' is empty or missing")
        if _truth(record.get(mark), mark, where) is not safe:
            continue
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: {answer!r} is empty or missing")
        if (prompt, text) not in seen:
            seen.add((prompt, text))
            yield Row.ask(prompt, text, id=where.rpartition(" ")[2])
    if not seen:
        kind = "safe" if safe else "unsafe"
        raise DataError(f"{path}: no {kind} answers: every answer is marked {'unsafe' if safe else 'safe'}; give other rows")


def _truth(value: Any, name: str, where: str) -> bool:
    """A mark as Parquet, JSON or CSV spells it."""
    known = {"true": True, "1": True, "false": False, "0": False}
    text = str(value).strip().lower()
    if text not in known:
        raise DataError(f"{where}: {name!r} is {value!r}, expected true or false")
    return known[text]


def truthfulqa(path: Path, records: Records, safe: bool) -> Iterator[Row]:
    """TruthfulQA: a row for the best and for every correct answer, each once; the CSV joins correct answers with `;`."""
    for where, record in records:
        question = record.get("Question") or record.get("question")
        best = record.get("Best Answer") or record.get("best_answer")
        correct = record.get("Correct Answers") or record.get("correct_answers") or ""
        for name, text in (("question", question), ("best answer", best)):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{where}: {name} is empty or missing")
        parts = correct.split(";") if isinstance(correct, str) else correct
        if not isinstance(parts, list) or not all(isinstance(text, str) for text in parts):
            raise DataError(f"{where}: correct answers have to be a text or a list of texts")
        for answer in dict.fromkeys(text.strip() for text in [best, *parts]):
            if answer:
                yield Row.ask(question.strip(), answer, id=where.rpartition(" ")[2])
