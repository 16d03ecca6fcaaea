"""The words and pairs of neighbouring words of an answer's beginning, once each, and those of its first sentence once more."""

import re

from sku_vllm.judges.refusal_cues import plain

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+|[.!?:\n]")
_ENDS = frozenset(".!?:\n")
# "can't", "cannot" and "can not" are one phrase.
_SPELLED_OUT = (
    ("can't", "cannot"),
    ("can not", "cannot"),
    ("won't", "will not"),
    ("n't", " not"),
    ("i'm", "i am"),
    ("it's", "it is"),
    ("i'd", "i would"),
    ("i'll", "i will"),
)


def phrases(answer: str) -> set[str]:
    """Words and pairs ("i cannot", "^ sorry" at the beginning, "# ." for a number), those of the first sentence also as "1:i cannot"."""
    text = plain(answer)
    for short, long in _SPELLED_OUT:
        text = text.replace(short, long)
    words = ["^", *("#" if word[0].isdigit() else word for word in _WORD.findall(text))]
    pairs = [f"{one} {two}" for one, two in zip(words, words[1:], strict=False)]
    first = next((place for place, word in enumerate(words) if word in _ENDS), len(words)) + 1
    return {*words, *pairs, *("1:" + word for word in words[:first]), *("1:" + pair for pair in pairs[:first])}
