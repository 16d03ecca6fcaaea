"""Benign rows in the syntax of the forget prompts, which bring more back than other benign rows (arXiv 2602.03379)."""

from collections.abc import Sequence
from typing import Any

from sku_vllm.data import Row

SHARE = 0.25  # of the benign rows


def similar_rows(benign: Sequence[Row], prompts: Sequence[str]) -> list[Row]:
    """The quarter of the benign rows whose prompts are nearest to one of `prompts`, the nearest first.

    Nearness is the cosine of the sets of phrases of one to three words, where words that only one of the two kinds of prompt has are
    left out: what remains is the frame of the sentence, not what it is about.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    def words(texts: Sequence[str]) -> set[str]:
        return {word for text in texts for word in split(text)}

    split = CountVectorizer().build_analyzer()
    both = words([row.prompt for row in benign]) & words(prompts)
    framed = [[" ".join(word if word in both else "_" for word in split(text)) for text in texts] for texts in (_prompts(benign), prompts)]
    counts = CountVectorizer(ngram_range=(1, 3), binary=True, token_pattern=r"\S+").fit(framed[0] + framed[1])
    ours, theirs = (_unit(counts.transform(texts)) for texts in framed)
    nearest = (ours @ theirs.T).max(axis=1).toarray().ravel()
    order = sorted(range(len(benign)), key=lambda at: (-nearest[at], at))
    return [benign[at] for at in order[: max(1, round(SHARE * len(benign)))]]


def _prompts(rows: Sequence[Row]) -> list[str]:
    return [row.prompt for row in rows]


def _unit(counts: Any) -> Any:
    """Rows of a scipy matrix, which has no types, of length 1."""
    from sklearn.preprocessing import normalize

    return normalize(counts.astype(float))
