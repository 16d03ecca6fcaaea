"""The answers of a record under the names that people use: a text, turns, numbers, lists of any of these, or the option that is right.

Open this file to add another way to write an answer. The names of its columns are in `forms.py`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sku_vllm.data.conversation import HELP, are_turns, read_turns, turns_in
from sku_vllm.data.rows import BadRow

Record = Mapping[str, Any]
# Where an answer is an object with more than its text: SQuAD, UltraFeedback, rankings, TriviaQA.
INSIDE = ("text", "response", "completion", "output", "answer", "content", "generation", "value")
LETTERS = ("a", "b", "c", "d", "e")
# Columns of which a text that is a list of texts means that list, as CSV files write it.
SEVERAL = ("answers", "responses", "completions", "generations")


def options_of(record: Record) -> dict[str, str]:
    """The choices of a multiple-choice question by their letters; none where it is no such question.

    They stand in `choices` (MMLU, ARC), in `options` beside a `question` (MMLU-Pro, MedQA), or in columns A, B, C, D.
    """
    choices = record.get("choices")
    if choices is None and record.get("question") is not None:
        choices = record.get("options")
        letters = [name for name in LETTERS if record.get(name) is not None]
        if choices is None and letters[:3] == list(LETTERS[:3]):
            choices = [record[name] for name in letters]
    if isinstance(choices, Mapping):  # ARC: {"text": […], "label": […]}; MedQA: {"A": …}
        if "text" not in choices:
            return {str(label): str(text) for label, text in choices.items() if text is not None}
        return {str(label): str(text) for label, text in zip(choices.get("label", ()), choices["text"], strict=False)}
    if isinstance(choices, str) and record.get("choices") is not None:
        raise BadRow("'choices' is a text, and none that can be read as a list; write a list of choices")
    if isinstance(choices, str) or choices is None:
        return {}
    return {chr(ord("A") + place): str(text) for place, text in enumerate(choices)}


def answers_under(names: tuple[str, ...], record: Record, used: str) -> Iterator[str]:
    """The answers under the first of these names that has any; each text once. used: the column of the request."""
    for name in names:
        if name == used or record.get(name) is None:
            continue
        options = options_of(record)
        if options and name == "answer":
            yield chosen_option(record["answer"], options)
            return
        yield from dict.fromkeys(answer_texts(record[name], name))
        return
    if record.get("answerkey") not in (None, "") and (options := options_of(record)):
        yield chosen_option(record["answerkey"], options)


def chosen_option(answer: Any, options: dict[str, str]) -> str:
    """The option that an answer names by its letter, its number or its text. Raises BadRow where it names none."""
    letters = list(options)
    if isinstance(answer, int) and 0 <= answer < len(letters):
        answer = letters[answer]
    if str(answer) in options:
        return f"{answer}. {options[str(answer)]}"
    if answer in options.values():
        return str(answer)
    if isinstance(answer, str) and answer.strip().isdigit() and int(answer) < len(letters):
        return chosen_option(int(answer), options)  # tables write numbers as text
    raise BadRow(f"'answer' is {answer!r}, none of the choices; write its letter, its number from 0 or its text")


def answer_texts(value: Any, name: str) -> list[str]:
    """The answers in one field: a text, turns of which the assistant's last counts, an object that holds a text, or a list of these.

    Raises:
        BadRow: the field holds something else.
    """
    if isinstance(value, str):
        several = turns_in(value, str) if name in SEVERAL else None
        return [value] if several is None else [text for text in several if text.strip()]
    if isinstance(value, Mapping):
        if "role" in value or "from" in value:
            return answer_texts([value], name)
        inside = next((value[key] for key in INSIDE if value.get(key) is not None), None)
        if inside is None:
            raise BadRow(f"{name!r} is an object without a text under {', '.join(INSIDE)}; {HELP}")
        return answer_texts(inside, name)
    if isinstance(value, bool) and name != "response":
        return ["yes" if value else "no"]  # BoolQ
    if isinstance(value, int | float) and value == value and name != "response":
        return [str(value)]
    if isinstance(value, list | tuple) or hasattr(value, "tolist"):
        items = [item for item in value if item is not None]
        if are_turns(items):
            return [turn["content"] for turn in read_turns(items, name) if turn["role"] == "assistant"][-1:]
        return [text for item in items for text in answer_texts(item, "answers" if name == "response" else name) if text.strip()]
    raise BadRow(f"{name!r} is {type(value).__name__}, expected text; {HELP}")
