"""The interface of an engine for measurements: answers to token prompts, and log-probabilities of given answers.

Open this file to add a backend; `transformers_backend` and `vllm_backend` are the two there are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

# Called with the work done since the last call, in the units of `work.py`.
Progress = Callable[[float], None]


class Generated(NamedTuple):
    """One generated answer.

    ids: its tokens, without the stop token. ended: whether a stop token came; False where the length limit cut the answer.
    """

    ids: list[int]
    ended: bool


class Journal(Protocol):
    """Where a backend notes what it generates, batch by batch, so that an interrupted run loses one batch at most.

    known: answers of an earlier run, by the number of their prompt. Batches are cut as if there were none, and those that are known as a
    whole are left out, so that a continued run computes the others exactly as an uninterrupted one does.
    """

    @property
    def known(self) -> Mapping[int, list[Generated]]:
        """See the class."""
        ...

    def keep(self, answers: Mapping[int, list[Generated]]) -> None:
        """Note the answers of a finished batch, by the number of their prompt."""
        ...

    def advance(self, new_tokens: int) -> None:
        """Note that so many tokens of answers are done, of `max_new_tokens` for each; an answer that ends early counts whole."""
        ...


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
        journal: Journal | None = None,
    ) -> list[list[Generated]]:
        """For every prompt one answer per temperature (0 is greedy).

        ban_stop: stop tokens have probability zero, so every answer runs to `max_new_tokens`.
        """
        ...

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]], progress: Progress | None = None) -> list[np.ndarray]:
        """For every (ids, answer_start) the log-probabilities of ids[answer_start:], natural logarithm, float32.

        progress: called with the number of tokens scored, prompts included.
        """
        ...

    @property
    def context_length(self) -> int | None:
        """The most tokens a sequence may have, where the model has a limit."""
        ...
