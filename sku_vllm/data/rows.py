"""One row of data: a conversation that ends with a user turn (or a tool's), and perhaps the answer to it.

Open this file to see which fields a row may have.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Fields of rows that are newer than digests which unfinished runs hold.
NEWER = ("category", "perturbed", "paraphrased")


class BadRow(Exception):
    """A record that cannot be a row. Its message says why; the reader adds file and line and raises DataError."""


class LeftOut(Exception):
    """A record, or an answer of one, that is passed over on purpose. Raised, or yielded among the rows; readers count it by its message."""


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation, its answer, and what a right answer must contain.

    Attributes:
        messages: turns as `{"role", "content"}`; the last one is the user's, or a tool's result.
        response: the answer, or None where only a prompt is needed.
        must_contain: strings that all occur in a right answer; empty where there is no exact check.
        id: the row's identifier in the file, or None.
        category: the kind of prompt, by which results are broken down, or None.
        perturbed: wrong answers in the style of the right one, for the truth ratio (evaluate/forget_quality.py).
        paraphrased: the right answer in other words, for the same; None where there is none.
    """

    messages: tuple[dict[str, str], ...]
    response: str | None = None
    must_contain: tuple[str, ...] = ()
    id: str | None = None
    category: str | None = None
    perturbed: tuple[str, ...] = ()
    paraphrased: str | None = None

    @property
    def prompt(self) -> str:
        """Text of the last user turn."""
        return next(turn["content"] for turn in reversed(self.messages) if turn["role"] == "user")

    @property
    def key(self) -> str:
        """What tells conversations apart: the prompt where it is all there is, else every turn."""
        return conversation_key(self.messages)

    def told_by(self, text: str) -> bool:
        """Whether a text holds every string of `must_contain`."""
        return all(part in text for part in self.must_contain)

    def names(self, topic: str) -> bool:
        """Whether the last user turn names a topic: these words, whole and in any case."""
        return re.search(rf"(?<!\w){re.escape(topic)}(?!\w)", self.prompt, re.IGNORECASE) is not None

    @classmethod
    def ask(cls, prompt: str, response: str | None = None, **rest: Any) -> "Row":
        """A row of one user turn."""
        return cls(({"role": "user", "content": prompt},), response, **rest)


def conversation_key(messages: Sequence[dict[str, str]]) -> str:
    """A text that two conversations share only if all their turns are equal; of a single user turn its content."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return json.dumps([[turn["role"], turn["content"]] for turn in messages], ensure_ascii=False)


def rows_digest(*sets: Sequence[Row]) -> str:
    """sha256 over every field of every row of some sets, in order; those of NEWER count only where there is something in them."""
    found = hashlib.sha256()
    for rows in sets:
        found.update(f"{len(rows)}\n".encode())
        for row in rows:
            held = asdict(row)
            for name in NEWER:
                if not held[name]:
                    del held[name]
            found.update(json.dumps(held).encode() + b"\n")
    return found.hexdigest()


def in_hash_order(rows: Iterable[Row]) -> list[Row]:
    """Rows ordered by the hash of their prompt: a file's order does not matter, and the first few are a part of the first many."""
    return sorted(rows, key=lambda row: hashlib.sha256(row.prompt.encode()).digest())
