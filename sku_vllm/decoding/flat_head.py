"""The output layer on a matrix of states, whatever part of a batch they were cut from.

transformers passes the states of the last positions as they lie among all the others. torch multiplies such a cut row by row, and copies
the layer's weights for each row first: on a CPU a prefill of 32 prompts took 300 times as long in that layer in bfloat16 (8 times in
float32) as on the same states in one piece, and gigabytes besides. Open this file if scoring or the first token of answers is slow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


@contextmanager
def flat_head(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the output layer computes states of any shape [..., width] as one matrix [rows, width]."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    forward, own = head.forward, "forward" in vars(head)  # accelerate gives modules a forward of their own

    def flat(states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        logits: torch.Tensor = forward(states.reshape(-1, states.shape[-1]), *arguments, **named)
        return logits.view(*states.shape[:-1], -1)

    head.forward = flat
    try:
        yield
    finally:
        if own:
            head.forward = forward
        else:
            del head.forward
