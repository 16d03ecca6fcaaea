"""The detector of answers that say a sentence again. It gives no label: a refusal said twice is a refusal.

Open this file to change what counts as a sentence, or which repetitions of lists, tables, verse and code are allowed.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

WORDS = 4  # different words of a sentence, so that "No.", "Step one:" and "Ha ha ha." may come again
ALONE = 8  # words of a sentence that has a line to itself: shorter ones are items of lists and lines of songs
RUN = 5  # different words of a sequence that follows directly on itself, with or without punctuation

# Languages that put no spaces between words are read by characters: Thai, kana, Chinese.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|\w+(?:['’]\w+)*")
_END = re.compile(r"(?<=[.!?…:؟۔।॥։።\u037e])[\"'”’»)\]*_]*\s+|(?<=[。！？])")
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.S)
_MARKER = re.compile(r"^\s*(?:[-*+•>#]+|\(?\w{1,3}[.)])\s+")
# "Status: waiting for the clerk": a line of a form, a schedule or a dialogue has a line to itself in spite of its colon.
_LABELLED = re.compile(r"^\s*\W{0,2}(?:\w+ ){0,2}\w+\W{0,2}:\W{0,2}\s+\S")
_TWICE = re.compile(r"(?:^| )([^ .]+(?: \S+)+) \1(?= |$)")


@lru_cache(maxsize=4096)  # models often repeat refusals and short answers, within a run and between the scales of `sku tune`
def says_again(response: str, ended: bool = True) -> bool:
    """Whether an answer says a sentence again, with case, punctuation and the numbers of a list left aside.

    A sentence that comes twice counts, as does a sequence of words that directly follows on itself where punctuation is missing. Lines of
    a table and fenced code are left out; short lines may come again, but not directly after themselves.

    Args:
        ended: False where a length limit cut the answer: then it also counts if its last words are the beginning of an earlier sentence,
            at least half of it.
    """
    text = _FENCED.sub("\n", response)
    sentences = list(_sentences(text))
    told = [words for words, alone in sentences if len(set(words)) >= WORDS and not (alone and len(words) < ALONE)]
    return len(set(told)) < len(told) or _runs_on([words for words, _ in sentences]) or (not ended and _begins_again(sentences))


def _sentences(text: str) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The words of every sentence, and whether it has a line to itself."""
    for line in text.splitlines():
        if line.count("|") > 1:
            continue  # a row of a table
        parts = [words for part in _END.split(_MARKER.sub("", line)) if (words := _words(part))]
        alone = len(parts) == (2 if _LABELLED.match(line) else 1) and "\n" in text.strip()
        yield from ((words, alone) for words in parts)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.replace("’", "'") for word in _WORD.findall(text.casefold()))


def _runs_on(sentences: list[tuple[str, ...]]) -> bool:
    """Whether somewhere a sequence with enough different words directly follows on itself, in one sentence or as whole sentences."""
    # Each sentence ends with a full stop of its own, so that a heading before a sentence that begins with its words is no repetition.
    text = " ".join(word for words in sentences for word in (*words, "."))
    return any(len({word for word in run.split() if word[0].isalpha()}) >= RUN for run in _TWICE.findall(text))


def _begins_again(sentences: list[tuple[tuple[str, ...], bool]]) -> bool:
    """Whether the last sentence is the beginning of an earlier one; its last word may be cut too."""
    if not sentences:
        return False
    last = sentences[-1][0]
    return len(set(last)) >= WORDS and any(
        words[: len(last) - 1] == last[:-1] and words[len(last) - 1].startswith(last[-1])
        for words, _ in sentences[:-1]
        if len(last) <= len(words) <= 2 * len(last)
    )
