"""What a measurement needs of an engine: answers to token prompts, and log-probabilities of given answers."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

# Called with the number of answers finished since the last call.
Progress = Callable[[int], None]


class Backend(Protocol):
    """A model in some engine. Token ids in and out, so that every engine sees exactly the same prompt."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int = 0,
        ban_stop: bool = False,
        progress: Progress | None = None,
    ) -> list[list[list[int]]]:
        """For every prompt one answer per temperature (0 is greedy), without its stop token.

        ban_stop: stop tokens have probability zero, so every answer runs to `max_new_tokens`.
        """
        ...

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[np.ndarray]:
        """For every (ids, answer_start) the log-probabilities of ids[answer_start:], natural logarithm, float32."""
        ...

    @property
    def context_length(self) -> int | None:
        """The most tokens a sequence may have, where the model has a limit."""
        ...
