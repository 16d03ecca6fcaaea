"""Refusals in languages other than English: first-person sentences that decline to help, provide, answer, write or explain.

Twenty languages, the most used on the web among them. They say whether an answer declines in words; an answer that only points elsewhere,
which the English model knows too, is not found. How many are found in each is in benchmarks/results/refusal_answers.md.
The words are in refusal_languages.yaml: open that to add a language or a verb.
"""

import re
import unicodedata
from functools import cache
from pathlib import Path

# Looked at: the begin, where most refusals are, and the end, where one may follow a disclaimer.
BEGIN, END = 600, 300

_DIACRITICS = re.compile(r"[\u064b-\u0652\u0670\u0640\u200c\u200d]")


@cache
def languages() -> dict[str, tuple[tuple[str, ...], re.Pattern[str]]]:
    """Of every language the pieces of text of which each refusal holds one, and the pattern that finds refusals."""
    import yaml

    told = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {str(name): (tuple(words["near"]), re.compile("|".join(words["refuses"]))) for name, words in told.items()}


def refused_in(answer: str) -> str | None:
    """The language in whose words an answer refuses ("de"), or None. English is not looked for here."""
    text = unicodedata.normalize("NFC", answer.strip()).casefold().replace("’", "'")
    if len(text) > BEGIN + END:
        text = f"{text[:BEGIN]}\n{text[-END:]}"
    text = _DIACRITICS.sub("", text) if not text.isascii() else text
    for language, (near, pattern) in languages().items():
        if any(piece in text for piece in near) and pattern.search(text):
            return language
    return None
