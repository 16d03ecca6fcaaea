"""How likely a model finds given answers: perplexity on the retain set, and answers the unedited base would never give."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.errors import RunError
from sku_vllm.evaluate.backend import Backend

# Set before any method was measured with them. One token in ten is far beyond what people write (about one in thirty at this
# level under a language model of their language); the error against labelled answers is in tests/test_eval_likelihood.py.
SURPRISE = math.log(1e-3)
MOST_SURPRISES = 0.1
BROKEN_OFF = math.log(1e-4)
OTHER_PROMPTS = 4
_WORDS = re.compile(r"\w+")


def perplexity(backend: Backend, template: PromptTemplate, rows: Sequence[Row]) -> float | None:
    """exp of the mean negative log-probability of an answer token (terminator included), over all answers; None without any."""
    scored = backend.log_probs(_sequences(backend, template, [row for row in rows if row.response is not None]))
    tokens = sum(len(row) for row in scored)
    if tokens == 0:
        return None
    mean = -sum(float(row.sum(dtype=np.float64)) for row in scored) / tokens
    if math.isnan(mean):
        raise RunError("the model gives NaN on the retain answers; a smaller --scale or --dtype float32 may help")
    return math.exp(min(mean, 700.0))  # e^709 is the largest float


def unlikely_answers(base: Backend, template: PromptTemplate, rows: Sequence[Row], max_new_tokens: int | None = None) -> list[bool]:
    """Which responses the base finds wildly unlikely as an answer to anything.

    "Anything" is the row's own prompt, and where the answer is unlikely there, the prompts among `rows` that share most with it:
    a good answer to another question is wrong, not gibberish.

    Args:
        max_new_tokens: answers of this length were cut by the limit, so that they do not end is not held against them.
    """
    distinct = {_identity(row): row for row in rows if row.response}
    pending = _unlikely(base, template, distinct, max_new_tokens)
    others = list({row.prompt: row for row in rows}.values())
    nearest = _Nearest([row.prompt for row in others])
    ranked = {key: nearest.to(row.response, OTHER_PROMPTS) for key, row in pending.items()}
    for rank in range(OTHER_PROMPTS):
        moved = {
            key: dataclasses.replace(others[ranked[key][rank]], response=row.response)
            for key, row in pending.items() if rank < len(ranked[key])
        }
        still = _unlikely(base, template, moved, max_new_tokens)
        pending = {key: row for key, row in pending.items() if key not in moved or key in still}
    return [_identity(row) in pending for row in rows]


def wildly_unlikely(log_probs: np.ndarray, *, ended: bool = True) -> bool:
    """More than a tenth of the tokens had less than one chance in a thousand, or the answer stops where none would.

    Shares of surprising tokens, not their mean: one rare name in a good sentence is fine. The last entry is the terminator's.
    """
    words, terminator = log_probs[:-1], log_probs[-1:]
    if ended and (terminator < BROKEN_OFF).any():
        return True
    return len(words) > 0 and float(np.mean(words < SURPRISE)) > MOST_SURPRISES


def _unlikely(base: Backend, template: PromptTemplate, rows: dict[Any, Row], max_new_tokens: int | None) -> dict[Any, Row]:
    scored = base.log_probs(_sequences(base, template, list(rows.values())))
    limit = max_new_tokens or 1 << 62
    return {
        key: row for (key, row), log_probs in zip(rows.items(), scored, strict=True)
        if wildly_unlikely(log_probs, ended=len(log_probs) - 1 < limit - 1)
    }


class _Nearest:
    """Prompts by the rarity of the words they share with a text."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._words = [set(_WORDS.findall(prompt.casefold())) for prompt in prompts]
        self._with: dict[str, list[int]] = {}
        for number, words in enumerate(self._words):
            for word in words:
                self._with.setdefault(word, []).append(number)

    def to(self, text: str, count: int) -> list[int]:
        score: Counter[int] = Counter()
        for word in set(_WORDS.findall(text.casefold())):
            holders = self._with.get(word, ())
            for number in holders:
                score[number] += math.log(1 + len(self._words) / len(holders))
        # Of equally near prompts the shorter: less that the answer could fail to take up.
        return sorted(score, key=lambda number: (-score[number], len(self._words[number])))[:count]


def _identity(row: Row) -> tuple[str, str | None]:
    return str(row.messages), row.response


def _sequences(backend: Backend, template: PromptTemplate, rows: Sequence[Row]) -> list[tuple[Sequence[int], int]]:
    encoded = [template.encode(row, backend.context_length) for row in rows]
    return [(item.ids, item.answer_start) for item in encoded]
