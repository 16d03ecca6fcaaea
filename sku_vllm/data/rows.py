"""One row of data: a conversation that ends with a user turn, and perhaps the answer to it."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sku_vllm.errors import DataError

ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation, its answer, and what a right answer must contain.

    Attributes:
        messages: turns as `{"role", "content"}`; the last one is the user's.
        response: the answer, or None where only a prompt is needed.
        must_contain: strings that all occur in a right answer; empty where there is no exact check.
        id: whatever the file calls the row.
    """

    messages: tuple[dict[str, str], ...]
    response: str | None = None
    must_contain: tuple[str, ...] = ()
    id: str | None = None

    @property
    def prompt(self) -> str:
        """Text of the last user turn."""
        return self.messages[-1]["content"]

    @classmethod
    def ask(cls, prompt: str, response: str | None = None, **rest: Any) -> "Row":
        """A row of one user turn."""
        return cls(({"role": "user", "content": prompt},), response, **rest)


def rows_digest(*sets: Sequence[Row]) -> str:
    """sha256 over every field of every row of some sets, in order."""
    found = hashlib.sha256()
    for rows in sets:
        found.update(f"{len(rows)}\n".encode())
        for row in rows:
            found.update(json.dumps(asdict(row)).encode() + b"\n")
    return found.hexdigest()


def row_from(record: Mapping[str, Any], where: str) -> Row:
    """A row from one parsed record in the contract's shape; `where` ("file line 3") starts every error.

    `messages` may end with the assistant's turn, which then is the response.

    Raises:
        DataError: a field is missing, empty, or of the wrong kind.
    """
    messages, response = _messages(record, where)
    given = response if record.get("response") is None else record["response"]
    if given is not None and not isinstance(given, str):
        raise DataError(f"{where}: 'response' is {type(given).__name__}, expected text")
    wanted = record.get("must_contain")
    wanted = () if wanted is None else (wanted,) if isinstance(wanted, str) else wanted
    if not isinstance(wanted, list | tuple) or not all(isinstance(text, str) and text for text in wanted):
        raise DataError(f"{where}: 'must_contain' has to be a list of texts")
    identity = record.get("id")
    return Row(messages, given, tuple(wanted), None if identity is None else str(identity))


def _messages(record: Mapping[str, Any], where: str) -> tuple[tuple[dict[str, str], ...], str | None]:
    if record.get("messages") is None:
        prompt = record.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            problem = "has no 'prompt' or 'messages'" if prompt is None else "'prompt' is empty or not text"
            raise DataError(f"{where}: {problem}; other column names are given with --columns prompt=NAME,response=NAME")
        return ({"role": "user", "content": prompt},), None
    turns = record["messages"]
    # not a list in a numpy array or tuple from Parquet: anything iterable of mappings will do
    turns = list(turns) if isinstance(turns, Iterable) and not isinstance(turns, str | Mapping) else []
    good = [
        turn for turn in turns
        if isinstance(turn, Mapping) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)
    ]
    if not turns or len(good) != len(turns):
        raise DataError(f"{where}: 'messages' has to be a list of {{\"role\", \"content\"}} with a role of {', '.join(ROLES)}")
    plain = tuple({"role": turn["role"], "content": turn["content"]} for turn in good)
    response = None
    if plain[-1]["role"] == "assistant" and record.get("response") is None:
        plain, response = plain[:-1], plain[-1]["content"]
    if not plain or plain[-1]["role"] != "user" or not plain[-1]["content"].strip():
        raise DataError(f"{where}: 'messages' has to end with a user turn that is not empty")
    return plain, response
