"""Rows of data sets that are not labelled by harm, found by their columns: prompt and response under the names that people use.

`generic_rows` reads one record. Open this file to add a name for a prompt's or an answer's column.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sku_vllm.data.answer_texts import LETTERS, SEVERAL, Record, answer_texts, answers_under, options_of
from sku_vllm.data.conversation import HELP, PUBLISHED, Turns, check_end, read_dialogue, read_turns, split_answer, turns_in
from sku_vllm.data.marked_text import read_marked
from sku_vllm.data.rows import BadRow, LeftOut, Row

CONVERSATIONS = ("messages", "conversations", "conversation", "chat", "transcript")
ASKED = ("prompt", "instruction", "question", "query", "problem", "test_case", "goal", "question_stem", "inputs", "input")
# Text that belongs to the request and stands in a column of its own: Alpaca's, Dolly's, SQuAD's, BoolQ's.
BESIDE = {"instruction": ("input", "context"), "question": ("context", "passage"), "query": ("context",)}
ANSWERS = (
    *("response", "completion", "output", "answer", "responses", "completions", "answers", "generation", "generations", "solution"),
    *("targets", "target_response", "target", "ideal", "gt", "reference"),
)
TOLD = ANSWERS[:9]  # of these a `text` beside them is the prompt, and no corpus
PAIRS = ("chosen", "rejected")
PROMPTS = (*CONVERSATIONS, *ASKED, "turns", "text")
OTHERS = (
    *("must_contain", "perturbed_answer", "paraphrased_answer", "id", "question_id", "prompt_id", "category", "system", "system_prompt"),
    *("choices", "options", "answerkey", "input", "context", "passage", "history"),
)
READ = frozenset((*PROMPTS, *ANSWERS, *PAIRS, *OTHERS))
# A record with any of these needs a closer look than one of a prompt and a response.
BUSY = frozenset((*CONVERSATIONS, *PAIRS, "choices", "system", "system_prompt", "history"))
# Forms of published sets in which some records have no answer, which no user can mend: of these such records are left out of training.
LACKING = frozenset((*CONVERSATIONS[1:], *PAIRS, *SEVERAL, "text", "turns"))
# A text corpus has no questions: the first sentences of a text, about this many characters, ask for the rest.
OPENING = 200
NO_PROMPT = "has no 'prompt' or 'messages'"
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")


def recognise(columns: set[str]) -> tuple[str, set[str]]:
    """What a file with these normalised columns is read as, in words, and which of them are not read."""
    asked = next((name for name in PROMPTS if name in columns), "prompt")
    answer = next((name for name in ANSWERS if name in columns and name != asked), None)
    beside = [name for name in BESIDE.get(asked, ()) if name in columns]
    if set(PAIRS) <= columns:
        return "pairs of a chosen and a rejected answer", columns - READ
    answer = answer if asked != "text" or answer in TOLD else None
    if asked == "text" and answer is None:
        return "texts (a dialogue where it is one, else the beginning asks for the rest)", columns - READ
    if asked in CONVERSATIONS:
        return f"{asked} (the last answer counts)", columns - READ
    lettered = {*LETTERS} if {*LETTERS[:3], "question"} <= columns else set()
    # Known names that this form has no use for are no less unread.
    idle = {*ANSWERS, *PROMPTS, *(name for names in BESIDE.values() for name in names)} - {asked, answer, *beside}
    idle |= {"options"} if "question" not in columns else set()
    unread = columns - READ - lettered | columns & idle
    return " and ".join([", ".join([asked, *beside]), *([answer] if answer else [])]), unread


def generic_rows(record: Record, safe: bool | None) -> Iterator[Row | LeftOut]:
    """The rows of one record: one, or one for each of several answers.

    safe: of a pair, True takes the chosen answer, False the rejected one, None both.

    Raises:
        BadRow, LeftOut: see there.
    """
    response = record.get("response")
    if type(record.get("prompt")) is str and type(response) is str and not BUSY.intersection(record) and record["prompt"].strip():
        prompt = record["prompt"]
        dialogue = read_dialogue(prompt) or _unanswered(prompt)
        if dialogue:
            check_end(dialogue, "prompt")
        yield Row(dialogue or ({"role": "user", "content": prompt},), response, *_rest(record))
        return
    if record.get("chosen") is not None and record.get("rejected") is not None:
        yield from _pair(record, safe)
        return
    turns, said, used = _asked(record)
    given: list[str | None] = [said]
    if said is None or record.get("response") is not None:
        given = list(answers_under(ANSWERS, record, used)) or given
    rest = _rest(record)
    if used == "turns":
        given = given[:1]  # MT-Bench's references are one for each turn
    for answer in given:
        yield Row(turns, answer, *rest)
    if used == "turns" and len(record["turns"]) > 1:
        yield LeftOut("later turns, which ask about the model's own first answer")


def _asked(record: Record) -> tuple[Turns, str | None, str]:
    """The turns of the request, the answer that stands among them if one does, and the column they are from."""
    for name in CONVERSATIONS:
        if record.get(name) is not None:
            turns = _with_system(_conversation(record[name], name), record)
            if record.get("response") is not None:
                turns = turns[:-1] if turns[-1] == {"role": "assistant", "content": record["response"]} else turns
                check_end(turns, name)
                return turns, None, name
            return *split_answer(turns, name), name
    for name in ASKED:
        value = record.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            return *split_answer(_with_system(read_turns(value, name), record), name), name
        if not value.strip():
            raise BadRow(f"{name!r} is empty or not text; {HELP}")
        told = read_dialogue(value) or (_unanswered(value) if name == "prompt" else None)
        turns = told or (*_history(record), {"role": "user", "content": _whole(record, name, value)})
        return *split_answer(_with_system(turns, record), name), name
    if record.get("turns") is not None:
        return _first_turn(record["turns"]), None, "turns"
    if isinstance(record.get("text"), str):
        return *_text(record["text"], record), "text"
    raise BadRow(f"{NO_PROMPT}; {HELP}")


def _unanswered(text: str) -> Turns | None:
    """The turns of a prompt that a chat template has already filled, without the answer that some of them hold too; None for others."""
    turns = read_marked(text) if text.lstrip()[:1] in ("<", "[", "B", "#") else None
    return turns[:-1] or None if turns and turns[-1]["role"] == "assistant" else turns


def _conversation(value: Any, name: str) -> Turns:
    if not isinstance(value, str):
        return read_turns(value, name)
    listed = turns_in(value, dict)
    turns = read_turns(listed, name) if listed else read_dialogue(value) or read_marked(value)
    if turns is None and name in PUBLISHED:
        raise LeftOut("a text that is no dialogue")
    return turns or ({"role": "user", "content": value},)


def _history(record: Record) -> Turns:
    """Earlier exchanges of a request, as LLaMA-Factory writes them beside Alpaca's columns: pairs of question and answer."""
    given = record.get("history")
    pairs = list(given) if given is not None and not isinstance(given, str | Mapping) else []
    if pairs and all(isinstance(turn, Mapping) for turn in pairs):
        return read_turns(pairs, "history")
    if not all(not isinstance(pair, str) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs):
        raise BadRow("'history' has to be a list of pairs of question and answer")
    return tuple(turn for asked, said in pairs for turn in ({"role": "user", "content": asked}, {"role": "assistant", "content": said}))


def _with_system(turns: Turns, record: Record) -> Turns:
    system = record.get("system") or record.get("system_prompt")
    if not isinstance(system, str) or not system.strip() or turns[0]["role"] == "system":
        return turns
    return ({"role": "system", "content": system}, *turns)


def _whole(record: Record, name: str, asked: str) -> str:
    """A request with the text that stands beside it, and the choices of a multiple-choice question."""
    beside = [record[other].strip() for other in BESIDE.get(name, ()) if isinstance(record.get(other), str) and record[other].strip()]
    parts = [*beside, asked] if name == "question" else [asked, *beside]
    return "\n\n".join(parts) + "".join(f"\n{letter}. {text}" for letter, text in options_of(record).items())


def _first_turn(turns: Any) -> Turns:
    """MT-Bench: the later turns ask about the model's own answer, so only the first can be put to it as it stands."""
    first = next(iter(turns), None)
    first = first.get("content") if isinstance(first, Mapping) else first
    if not isinstance(first, str) or not first.strip():
        raise BadRow("'turns' has to be a list of texts")
    return ({"role": "user", "content": first},)


def _text(text: str, record: Record) -> tuple[Turns, str | None]:
    """The turns of a dialogue or of a filled chat template, a prompt where an answer stands beside it, or the beginning of a document."""
    turns = read_dialogue(text) or read_marked(text)
    if turns:
        return split_answer(turns, "text")
    if "parent_id" in record and "role" in record:
        raise BadRow("is one message of a tree (OpenAssistant); take a set of its whole conversations")
    if text.strip() and any(record.get(name) is not None for name in TOLD):
        return ({"role": "user", "content": text},), None
    ends = [gap for gap in _SENTENCE_END.finditer(text.strip()) if gap.start() >= 20]
    gap = next((gap for gap in ends if gap.start() >= OPENING), ends[-1] if ends else None)
    if gap is None or not text.strip()[gap.end() :]:
        raise LeftOut("a text of one sentence, which leaves nothing to ask for")
    return ({"role": "user", "content": text.strip()[: gap.start()]},), text.strip()[gap.end() :]


def _pair(record: Record, safe: bool | None) -> Iterator[Row | LeftOut]:
    rest = _rest(record)
    asked_apart = any(record.get(name) is not None for name in (*CONVERSATIONS, *ASKED))
    for name in PAIRS if safe is None else PAIRS[:1] if safe else PAIRS[1:]:
        value = [record[name]] if isinstance(record[name], Mapping) else record[name]  # LLaMA-Factory writes one turn
        whole = (read_dialogue(value) or read_marked(value)) if isinstance(value, str) else read_turns(value, name)
        if whole and (not asked_apart or any(turn["role"] == "user" for turn in whole)):
            turns, answer = split_answer(_up_to_answer(whole), name)
            if len(turns) + (answer is not None) < len(whole):
                yield LeftOut("what a user says behind the last answer")
            turns = _with_system(turns, record)
        else:
            turns, _, _ = _asked({key: record[key] for key in record if key not in CONVERSATIONS or record.get("prompt") is None})
            answer = next(iter(answer_texts(value, name)), None)
        if answer is None and isinstance(value, str) and whole and value.rstrip().endswith("Assistant:"):
            answer = ""  # what was said is nothing, which is an answer too
        yield Row(turns, answer.strip() if answer else answer, *rest)


def _up_to_answer(turns: Turns) -> Turns:
    """The turns up to the last answer, which is what a pair differs in; all of them where there is none."""
    return next((turns[: place + 1] for place in range(len(turns) - 1, -1, -1) if turns[place]["role"] == "assistant"), turns)


def _rest(record: Record) -> tuple[tuple[str, ...], str | None, str | None, tuple[str, ...], str | None]:
    """must_contain, id, category, perturbed and paraphrased of a record, in the order of Row's fields."""
    paraphrased = record.get("paraphrased_answer")
    if paraphrased is not None and not isinstance(paraphrased, str):
        raise BadRow(f"'paraphrased_answer' is {type(paraphrased).__name__}, expected text")
    identity = next((record[name] for name in ("id", "question_id", "prompt_id") if record.get(name) is not None), None)
    wanted, perturbed = _texts(record, "must_contain"), _texts(record, "perturbed_answer")
    return wanted, None if identity is None else str(identity), category_of(record.get("category")), perturbed, paraphrased


def _texts(record: Record, name: str) -> tuple[str, ...]:
    """The texts of a field that holds one or a list of them, or nothing. Raises BadRow for anything else."""
    texts = record.get(name)
    texts = () if texts is None else (texts,) if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise BadRow(f"{name!r} has to be a list of texts")
    return tuple(texts)


def category_of(value: Any) -> str | None:
    """A category as text: itself, or those that are true in BeaverTails' `{category: bool}`; None for nothing."""
    if isinstance(value, Mapping):
        value = ", ".join(sorted(str(name) for name, holds in value.items() if holds))
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return str(value).strip() or None if value is not None else None
