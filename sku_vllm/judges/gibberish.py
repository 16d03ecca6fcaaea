"""Is this an answer at all? Empty text and broken-off repetition, by rules that were fixed before any method was tuned on them."""

import re
from collections import Counter

# Fixed against labelled examples (tests/test_judges_gibberish.py): lists, refrains and code repeat, but not in one unbroken run.
RUN_OF_WORDS = 4
RUN_OF_CYCLES = 4
MIN_WORDS_FOR_VARIETY = 24
LEAST_VARIETY = 0.2

_WORD = re.compile(r"\w+|[^\w\s]")
_SAME_CHARACTER = re.compile(r"([^\s\d.\-_=*#~+|/\\])\1{7,}")


def is_gibberish(response: str) -> bool:
    """Empty, without a single letter or digit, or stuck in repetition."""
    if not any(character.isalnum() for character in response):
        return True
    words = _WORD.findall(response.casefold())
    return _SAME_CHARACTER.search(response) is not None or stuck(words) or monotonous(words)


def stuck(words: list[str]) -> bool:
    """A cycle of 1 to 12 words said four times without a break, at least one of them a word of letters.

    Cycles of numbers or punctuation alone are tables, rulers and sums, not babble.
    """
    for period in range(1, 13):
        run = 0
        for index in range(period, len(words)):
            run = run + 1 if words[index] == words[index - period] else 0
            repeats = RUN_OF_WORDS if period == 1 else RUN_OF_CYCLES
            if run >= period * (repeats - 1) and any(word.isalpha() for word in words[index - period + 1 : index + 1]):
                return True
    return False


def monotonous(words: list[str]) -> bool:
    """A long text from very few words, or one word making up half of it."""
    letters = [word for word in words if word.isalpha()]
    if len(letters) < MIN_WORDS_FOR_VARIETY:
        return False
    counts = Counter(letters)
    return len(counts) / len(letters) < LEAST_VARIETY * min(1.0, 100 / len(letters)) or counts.most_common(1)[0][1] / len(letters) > 0.5
