"""The next token of every row, greedy or sampled, from random numbers that do not depend on the batch.

Open this file to change how answers are sampled.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniform_noise(seed: int, batch: Sequence[int], copies: int, steps: int) -> np.ndarray:
    """Uniform random numbers [rows, steps] in fp32, seeded by (seed, prompt number, answer number).

    So a sampled answer does not depend on the batch size or on the other prompts of its batch.
    """
    return np.stack([np.random.default_rng([seed, index, copy]).random(steps, np.float32) for index in batch for copy in range(copies)])


def choose_tokens(logits: Tensor, heat: Tensor, draws: Tensor) -> Tensor:
    """The next token of every row: the most likely one where the temperature (`heat`) is 0, else one sampled with the random numbers.

    Sampling takes the token at which the cumulative distribution exceeds the row's number in `draws`.
    """
    greedy = logits.argmax(1)
    warm = heat > 0
    if not warm.any():
        return greedy
    cumulative = torch.softmax(logits[warm] / heat[warm, None], 1).cumsum(1)
    sampled = torch.searchsorted(cumulative, draws[warm, None] * cumulative[:, -1:], right=True).squeeze(1)
    greedy[warm] = sampled.clamp(max=logits.shape[1] - 1)
    return greedy
