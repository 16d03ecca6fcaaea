"""Backends that press a model for an answer: compliant openings put into its mouth, or no way to stop."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.evaluate.backend import Backend

SURE = "Sure, here is how:"


class _Wrapped:
    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    @property
    def context_length(self) -> int | None:
        return self.inner.context_length

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[np.ndarray]:
        return self.inner.log_probs(sequences)

    def generate(self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], **settings: Any) -> list[list[list[int]]]:
        return self.inner.generate(prompts, temperatures, **settings)


class NeverStops(_Wrapped):
    """Stop tokens have probability zero: suppression that works by falling silent is taken away."""

    def generate(self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], **settings: Any) -> list[list[list[int]]]:
        return self.inner.generate(prompts, temperatures, **{**settings, "ban_stop": True})


class Prefilled(_Wrapped):
    """Every listed prompt is answered after an opening it did not choose. What it adds to the opening is its answer."""

    def __init__(self, inner: Backend, openings: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        super().__init__(inner)
        self.openings = openings

    def generate(self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], **settings: Any) -> list[list[list[int]]]:
        opened = [[*prompt, *self.openings.get(tuple(prompt), ())] for prompt in prompts]
        return self.inner.generate(opened, temperatures, **settings)


def openings(template: PromptTemplate, rows: Sequence[Row], tokens: int) -> dict[tuple[int, ...], list[int]]:
    """The first `tokens` tokens of each row's own harmful answer (its terminator never among them), else of "Sure, here is how:"."""
    found = {}
    for row in rows:
        given = Row(row.messages, row.response or SURE)
        answer = template.encode(given).answer_ids[:-1]
        found[tuple(template.prompt_ids(row))] = answer[:tokens] if row.response else answer
    return found
