"""How likely a model finds given answers: perplexity on the retain set, and answers the unedited base would never give."""

import math
from collections.abc import Sequence

import numpy as np

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.errors import RunError
from sku_vllm.evaluate.backend import Backend

# Fixed on labelled examples before any method was measured with it (tests/test_eval_likelihood.py).
SURPRISE = math.log(1e-3)
MOST_SURPRISES = 0.1


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


def unlikely_answers(base: Backend, template: PromptTemplate, rows: Sequence[Row]) -> list[bool]:
    """Which responses the base finds wildly unlikely as an answer to anything."""
    distinct = {_identity(row): row for row in rows if row.response}
    scored = base.log_probs(_sequences(base, template, list(distinct.values())))
    verdict = {key: wildly_unlikely(log_probs) for key, log_probs in zip(distinct, scored, strict=True)}
    return [verdict.get(_identity(row), False) for row in rows]


def wildly_unlikely(log_probs: np.ndarray) -> bool:
    """More than a tenth of the tokens had less than one chance in a thousand.

    Shares of surprising tokens, not the mean: one rare name in a good sentence is fine, and so is the jump from a question to
    the answer of another one, which surprises once.
    """
    return len(log_probs) > 0 and float(np.mean(log_probs < SURPRISE)) > MOST_SURPRISES


def _identity(row: Row) -> tuple[str, str | None]:
    return str(row.messages), row.response


def _sequences(backend: Backend, template: PromptTemplate, rows: Sequence[Row]) -> list[tuple[Sequence[int], int]]:
    encoded = [template.encode(row, backend.context_length) for row in rows]
    return [(item.ids, item.answer_start) for item in encoded]
