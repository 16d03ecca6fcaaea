"""Reads judged answers: the rows.jsonl of `sku eval` or `sku attack`, or what `sku judge` wrote, with what is known of judge and settings.

Open this file to change which rows count as answers of one prompt.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.data.files import json_lines
from sku_vllm.data.rows import conversation_key
from sku_vllm.errors import DataError
from sku_vllm.judges import LABELS
from sku_vllm.records.rows_file import ROWS, changed_rows, set_of

Key = tuple[str, str, str]
# How answers were made; where these differ, a difference may come from them.
DECODING = ("samples", "temperature", "max_new_tokens", "template", "seed")


@dataclass(frozen=True, slots=True)
class Judged:
    """Judged answers of one side.

    rows: by set, mode and conversation (`sku_vllm.data.rows.conversation_key`), each with label, response and prompt. unjudged: answers
    that no judge decided, or that were missing, left out of `rows`. opinion: whether any judge decides harm; undecided: sets in which none
    does. judge: the SPECs that labelled them, None where
    that is not known. settings: those of DECODING that are known, and `prompt_template`, the digest of how prompts were written.
    changed: a line where the file is not the one that the record beside it was written with.
    """

    rows: Mapping[Key, list[dict[str, Any]]]
    unjudged: int = 0
    opinion: bool = True
    undecided: Set[str] = frozenset()
    judge: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    changed: str | None = None


def read_judged(path: str | Path) -> Judged:
    """Judged rows of a JSONL file, or of a directory that contains rows.jsonl, with what the record beside it says of judge and settings.

    Rows without `set` or `mode` (from `sku judge`) get the set "rows" and the mode "given".

    Raises:
        DataError: the file is missing or empty, or a row is not a judged row.
    """
    path = Path(path)
    file = path / ROWS if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such file; give a directory that sku eval wrote, or a JSONL file that sku judge labelled")
    rows: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    waiting: list[tuple[Key, bool, dict[str, Any]]] = []
    unjudged, judges = 0, set()
    for where, row in json_lines(file):
        if "label" in row and row["label"] is None:
            unjudged += 1  # a row that had no answer to judge
            continue
        try:
            label, response = row["label"], row["response"]
            prompt, conversation = _asked(row)
            key = set_of(row), row.get("mode", "given"), conversation
            if not all(isinstance(text, str) for text in (*key, response)):
                raise TypeError("set, mode, prompt and response have to be text")
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{where}: not a judged row ({type(error).__name__}: {error}); label it with sku judge") from error
        if label not in LABELS:
            raise DataError(f"{where}: label {label!r} is none of {', '.join(LABELS)}")
        if isinstance(row.get("judge"), str):
            judges.add(row["judge"])
        waiting.append((key, row.get("harm_judged") is not False, {"label": label, "response": response, "prompt": prompt}))
    if not waiting:
        raise DataError(f"{file}: has no rows; evaluate at least one prompt")
    # Of a judge that decides harm, rows that it did not decide are left out; one that never does gives the other labels of all rows.
    # `answered` decides it in forget sets alone.
    decided = {key[0] for key, judged, _ in waiting if judged}
    opinion = bool(decided)
    for key, judged, answer in waiting:
        if judged or key[0] not in decided:
            rows[key].append(answer)
        else:
            unjudged += 1
    beside = _record_beside(file)
    config = beside.get("config") or {}
    told = tuple(config.get("judge") or sorted(judges)) or None
    if told and set(told) <= {"refusal"}:
        opinion = False
    undecided = {key[0] for key in rows} - decided
    settings = {name: config[name] for name in (*DECODING, "prompt_template") if name in config}
    return Judged(rows, unjudged, opinion, undecided, told, settings, changed_rows(file.parent, beside))


def _record_beside(file: Path) -> dict[str, Any]:
    """The record of the command that wrote rows.jsonl, {} where there is none with a configuration."""
    if file.name != ROWS:
        return {}
    for name in ("sku_eval.json", "sku_attack.json"):
        try:
            found = json.loads((file.parent / name).read_text(encoding="utf-8"))
            return found if isinstance(found["config"], dict) else {}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def _asked(row: Mapping[str, Any]) -> tuple[str, str]:
    """The last prompt, and what tells the conversation apart."""
    turns = row.get("messages")
    if not turns:
        return row["prompt"], row["prompt"]
    told = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
    told = told[:-1] if told[-1]["role"] == "assistant" else told
    return next((turn["content"] for turn in reversed(told) if turn["role"] == "user"), ""), conversation_key(told)


def same_judges(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two lists of SPECs name the same judges of harm: lexicons by their content where the file is there, servers whatever the
    number of requests at a time. `refusal` decides nothing about harm, and its detectors always run."""
    first, second = ({_identity(spec) for spec in specs if spec != "refusal"} for specs in (one, other))
    return first == second


def _identity(spec: str) -> str:
    kind, _, rest = spec.partition(":")
    if kind == "lexicon" and Path(rest).is_file():
        return hashlib.sha256(Path(rest).read_bytes()).hexdigest()
    if kind == "openai":
        url, _, named = spec.rpartition("#")
        model, _, query = named.partition("?")
        address = f"{url}#{model}"
        return "?".join([address, *sorted(part for part in query.split("&") if part and not part.startswith(("concurrency=", "timeout=")))])
    return spec
