"""Values that tables, and some files of JSON, hold as a text: a list or an object in JSON, as Python prints it, or as NumPy prints it.

Open this file to add a column whose lists are read where they stand as text.
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

# Columns that hold a list or an object whenever they hold a text that is one.
NESTED = frozenset(
    ("choices", "options", "turns", "history", "category", "harm_category", "subcategory", "violated_categories")
    + ("response_0_harm_category", "response_1_harm_category", "correct_answers", "incorrect_answers")
)
# Columns of which only a list of turns is one, since their texts may well begin with a bracket.
TALK = frozenset(
    ("messages", "conversations", "conversation", "chat", "transcript", "prompt", "chosen", "rejected", "response", "completion")
)
# Columns of answers: a list of texts or objects, or an object that holds texts.
SEVERAL = frozenset(("answers", "responses", "completions", "generations"))
# In a table these are lists too; in JSON, which has lists, a text that looks like one is meant.
IN_TABLES = frozenset(("must_contain", "perturbed_answer"))
WRITTEN = NESTED | TALK | SEVERAL
_OPEN = frozenset("[{")
# A text in quotes, or what NumPy writes around a list.
_PIECE = re.compile(
    r"""(?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?P<next>\s+(?=['"]))?"""
    r"|(?P<close>\})(?P<other>\s+(?=\{))?|(?P<array>\barray\()|(?P<type>,\s*dtype=[\w.<>']+\s*\)|\))",
    re.DOTALL,
)


def written_value(text: str) -> Any:
    """The list or object that a text is, None for any other text."""
    if text.lstrip()[:1] not in ("[", "{") or text.rstrip()[-1:] not in ("]", "}"):
        return None
    for read in (json.loads, _printed):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return value if isinstance(value, list | dict) and value else None
    return None


def _printed(text: str) -> Any:
    """A value as Python prints it, or NumPy, which puts no commas between texts and objects."""

    def repaired(piece: re.Match[str]) -> str:
        if piece["array"] or piece["type"]:
            return ""
        return piece[0] + ("," if piece["next"] or piece["other"] else "")

    return ast.literal_eval(_PIECE.sub(repaired, text))


def decoded(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the lists and objects that its columns hold as text (names are normalised)."""
    found = None
    for name, text in record.items():
        if type(text) is not str or text[:1] not in _OPEN or name not in WRITTEN:
            continue
        value = written_value(text)
        if value is not None and _is_meant(name, value):
            found = found or dict(record)
            found[name] = value
    return found or record


def _is_meant(name: str, value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    if name in NESTED:
        return True
    if name in SEVERAL:
        return all(isinstance(one, str | dict) for one in listed) and (isinstance(value, list) or "text" in value)
    return isinstance(value, list) and all(isinstance(one, Mapping) and len(one) > 1 for one in listed)
