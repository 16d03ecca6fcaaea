"""Backends of an attacker who controls decoding: answers that continue a given opening, or answers that may not stop.

They wrap another backend, so that an attack can combine them with changed weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sku_vllm.evaluate.backend import Backend, Generated, Progress


class _Wrapped:
    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    @property
    def context_length(self) -> int | None:
        return self.inner.context_length

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]], progress: Progress | None = None) -> list[np.ndarray]:
        return self.inner.log_probs(sequences, progress)

    def generate(self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], **settings: Any) -> list[list[Generated]]:
        return self.inner.generate(prompts, temperatures, **settings)


class NeverStops(_Wrapped):
    """Stop tokens have probability zero."""

    def generate(self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], **settings: Any) -> list[list[Generated]]:
        """`Backend.generate` with `ban_stop`."""
        return self.inner.generate(prompts, temperatures, **{**settings, "ban_stop": True})


class Prefilled(_Wrapped):
    """Prompts in `openings` are continued from an opening; the answer is the text after it.

    openings: prompt ids → ids of its opening.
    """

    def __init__(self, inner: Backend, openings: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        super().__init__(inner)
        self.openings = openings

    def generate(self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], **settings: Any) -> list[list[Generated]]:
        """`Backend.generate` on the prompts with their openings."""
        opened = [[*prompt, *self.openings.get(tuple(prompt), ())] for prompt in prompts]
        return self.inner.generate(opened, temperatures, **settings)
