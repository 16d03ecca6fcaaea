"""Refusals in languages other than English: first-person sentences that decline to help, provide, answer, write or explain.

Twenty languages, the most used on the web among them. They say whether an answer declines in words; an answer that only points elsewhere,
which the English model knows too, is not found. How many are found in each is in benchmarks/results/refusal_answers.md.
The words are in refusal_languages.yaml: open that to add a language or a verb.
"""

import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Looked at: the begin, where most refusals are, and the end, where one may follow a disclaimer.
BEGIN, END = 600, 300
# An apology within the first of these characters counts, and what is withheld within so many after it.
REGRET, WITHHELD = 40, 160

_SENTENCE_END = re.compile(r"[.!?。！？؟।\n]")
_DIACRITICS = re.compile(r"[\u064b-\u0652\u0670\u0640\u200c\u200d]")


@cache
def _told() -> dict[str, dict[str, Any]]:
    import yaml

    # Composed as answers are: some letters of Hindi, say, have two spellings.
    told: dict[str, dict[str, Any]] = yaml.safe_load(
        unicodedata.normalize("NFC", Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    )
    return told


class Wording(NamedTuple):
    """How one language refuses; refusal_languages.yaml says what each is."""

    near: tuple[str, ...]
    refuses: re.Pattern[str]
    unsure: re.Pattern[str]
    regrets: re.Pattern[str]
    withholds: re.Pattern[str]

    def refused(self, text: str) -> bool:
        """Whether the text, in lower case, refuses in this language's words."""
        if any(piece in text for piece in self.near) and self._found(self.refuses, text):
            return True
        regret = self.regrets.search(text, 0, REGRET)
        return regret is not None and self._found(self.withholds, text[: regret.end() + WITHHELD], regret.end())

    def _found(self, pattern: re.Pattern[str], text: str, begin: int = 0) -> bool:
        for found in pattern.finditer(text, begin):
            before, after = _SENTENCE_END.split(text[: found.start()])[-1], _SENTENCE_END.split(text[found.end() :], maxsplit=1)[0]
            if not self.unsure.search(before + found[0] + after):
                return True
        return False


@cache
def languages() -> dict[str, Wording]:
    """The wording of refusals in every language."""
    return {
        name: Wording(
            tuple(words["near"]),
            re.compile("|".join(words["refuses"])),
            *(re.compile(words[key]) for key in ("unsure", "regrets", "withholds")),
        )
        for name, words in _told().items()
    }


@cache
def _any_language(key: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{words[key]})" for words in _told().values()))


def _composed(text: str) -> str:
    return _DIACRITICS.sub("", unicodedata.normalize("NFC", text))


def refused_tersely_in(answer: str) -> bool:
    """Whether an answer, without the marks around it and in lower case, is no more than a no in one of the languages."""
    return _any_language("terse").fullmatch(_composed(answer)) is not None


def asks_openly(question: str) -> bool:
    """Whether a question in one of the languages asks for more than a yes or no: by its question words, or as "can you …"."""
    return _any_language("asks").search(_composed(question).casefold().replace("’", "'")) is not None


def refused_in(answer: str) -> str | None:
    """The language in whose words an answer refuses ("de"), or None. English is not looked for here."""
    text = unicodedata.normalize("NFC", answer.strip()).casefold().replace("’", "'")
    if len(text) > BEGIN + END:
        text = f"{text[:BEGIN]}\n{text[-END:]}"
    text = _DIACRITICS.sub("", text) if not text.isascii() else text
    return next((language for language, wording in languages().items() if wording.refused(text)), None)
