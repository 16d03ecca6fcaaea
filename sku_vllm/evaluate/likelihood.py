"""Measures from log-probabilities: perplexity on the retain set, and the likelihood rule of gibberish.

That rule calls an answer gibberish when the unedited base finds it extremely unlikely as an answer to anything.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.errors import RunError
from sku_vllm.evaluate.backend import Backend, Progress

# Thresholds of the rule, fixed before any unlearning method was measured with it. In human text about one token in thirty is as
# surprising as SURPRISE to a language model; the rule's error on labelled answers is in tests/evaluate/test_eval.py.
SURPRISE = math.log(1e-3)  # a token below this log-probability is surprising
MOST_SURPRISES = 0.1  # highest share of surprising tokens in a normal answer
BROKEN_OFF = math.log(1e-4)  # an end token below this means that the answer breaks off
OTHER_PROMPTS = 4  # other prompts that an unlikely answer is tried with
_WORDS = re.compile(r"\w+")
# What makes a scored response distinct: its conversation, its text, and whether it ended by itself.
Key = tuple[str, str | None, bool]


def perplexity(backend: Backend, template: PromptTemplate, rows: Sequence[Row], progress: Progress | None = None) -> float | None:
    """exp of the mean negative log-probability of all answer tokens, end tokens included; None where no row has an answer."""
    encoded = [template.encode(row, backend.context_length) for row in rows if row.response is not None]
    scored = backend.log_probs([(item.ids, item.answer_start) for item in encoded], progress)
    tokens = sum(len(row) for row in scored)
    if tokens == 0:
        return None
    mean = -sum(float(row.sum(dtype=np.float64)) for row in scored) / tokens
    if math.isnan(mean):
        raise RunError("the model gives NaN on the retain answers; a smaller --scale or --dtype float32 may help")
    return math.exp(min(mean, 700.0))  # e^709 is the largest float


def unlikely_answers(
    base: Backend, template: PromptTemplate, rows: Sequence[Row], ended: Sequence[bool], progress: Progress | None = None
) -> list[bool]:
    """Which responses the base finds extremely unlikely (`wildly_unlikely`) as an answer to anything.

    An answer that is unlikely after its own prompt is also tried after the `OTHER_PROMPTS` prompts among `rows` that share most words
    with it: a good answer to another question is wrong, but not gibberish.

    Args:
        ended: which responses ended by themselves; the end of one that a length limit cut is not tested.
    """
    keys = [(row.key, row.response, end) for row, end in zip(rows, ended, strict=True)]
    asked = {row.prompt: row for row in rows}
    pending = _unlikely(base, template, {key: row for key, row in zip(keys, rows, strict=True) if row.response}, progress)
    others, nearest = list(asked.values()), _Nearest(list(asked))
    ranked = {key: nearest.to(row.response or "", OTHER_PROMPTS) for key, row in pending.items()}
    for rank in range(OTHER_PROMPTS):
        moved = {
            key: dataclasses.replace(others[ranked[key][rank]], response=row.response)
            for key, row in pending.items()
            if rank < len(ranked[key])
        }
        still = _unlikely(base, template, moved)
        pending = {key: row for key, row in pending.items() if key not in moved or key in still}
    return [key in pending for key in keys]


def wildly_unlikely(tokens: np.ndarray, end: np.ndarray) -> bool:
    """Whether more than a tenth of an answer's tokens have a probability below 1/1000, or its end token one below 1/10000.

    A share of tokens instead of a mean, so that one rare name in a good sentence does not matter.

    Args:
        tokens: natural logarithms, one per token of the answer.
        end: that of its end token; empty where the end is not tested.
    """
    if (end < BROKEN_OFF).any():
        return True
    return len(tokens) > 0 and float(np.mean(tokens < SURPRISE)) > MOST_SURPRISES


def _unlikely(base: Backend, template: PromptTemplate, rows: Mapping[Key, Row], progress: Progress | None = None) -> dict[Key, Row]:
    """The rows whose response is unlikely after its prompt."""
    encoded = [template.encode(row, base.context_length) for row in rows.values()]
    scored = base.log_probs([(item.ids, item.answer_start) for item in encoded], progress)
    found = {}
    for (key, row), item, log_probs in zip(rows.items(), encoded, scored, strict=True):
        # Where the context cut the text off, no end token follows the answer's tokens; `log_probs` may lack it too.
        length = len(item.ids) - item.answer_start - (not item.cut)
        if wildly_unlikely(log_probs[:length], log_probs[length:] if key[2] else log_probs[:0]):
            found[key] = row
    return found


class _Nearest:
    """Finds the prompts that share most words with a text; rare words count more."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._words = [set(_WORDS.findall(prompt.casefold())) for prompt in prompts]
        self._with: dict[str, list[int]] = {}
        for number, words in enumerate(self._words):
            for word in words:
                self._with.setdefault(word, []).append(number)

    def to(self, text: str, count: int) -> list[int]:
        """Indices of the `count` prompts that share most with the text, nearest first."""
        score: dict[int, float] = defaultdict(float)
        for word in set(_WORDS.findall(text.casefold())):
            holders = self._with.get(word, ())
            for number in holders:
                score[number] += math.log(1 + len(self._words) / len(holders))
        # Among prompts with equal score the one with fewer words: a larger part of it occurs in the text.
        return sorted(score, key=lambda number: (-score[number], len(self._words[number])))[:count]
