"""Losses over hidden states in chunks, so that no tensor of tokens × vocabulary ever exists.

A token's loss depends on that token's hidden state alone. So the gradient is taken chunk by chunk in the forward pass, where
the logits are at hand, and the backward pass only multiplies: the head runs once, not twice, and logits live for one chunk.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

Head = Callable[[torch.Tensor], torch.Tensor]
TokenLoss = Callable[..., torch.Tensor]
# Logits of a chunk: 32 MB in fp32 on a CPU, 256 MB on a GPU, where larger products pay. A loss keeps about two such tensors.
ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


def per_token(
    loss: TokenLoss,
    head: Head,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    references: Sequence[tuple[Head, torch.Tensor]] = (),
    *,
    vocabulary: int,
    chunk: int | None = None,
    train_head: bool = False,
) -> torch.Tensor:
    """`loss(head(hidden), targets, *reference logits)` for every token, [n]; equal to the plain formula.

    Args:
        hidden: [n, d]. references: (head, hidden states) pairs without gradient.
        chunk: tokens at a time at most; by default so many that their logits stay within ELEMENTS.
        train_head: the head itself gets gradients (dense runs): logits are then computed again in the backward pass.
    """
    chunk = chunk or max(16, ELEMENTS.get(hidden.device.type, 2**26) // vocabulary)
    chunk = math.ceil(hidden.shape[0] / max(1, math.ceil(hidden.shape[0] / chunk)))  # all alike, since small products are slow

    def part(states: torch.Tensor, begin: int) -> torch.Tensor:
        end = begin + states.shape[0]
        with torch.no_grad():
            known = [_wide(other(reference[begin:end])) for other, reference in references]
        return loss(_wide(head(states)), targets[begin:end], *known)

    if not hidden.shape[0]:
        return hidden.sum(-1)
    begins = range(0, hidden.shape[0], chunk)
    if train_head and torch.is_grad_enabled():
        return torch.cat([checkpoint(part, hidden[at:at + chunk], at, use_reentrant=False) for at in begins])
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return torch.cat([part(hidden[at:at + chunk], at) for at in begins])
    return _PerToken.apply(hidden, part, chunk)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, part: Callable[[torch.Tensor, int], torch.Tensor], chunk: int) -> torch.Tensor:
        values, gradient = [], torch.empty_like(hidden)
        for at in range(0, hidden.shape[0], chunk):
            with torch.enable_grad():
                states = hidden[at:at + chunk].detach().requires_grad_()
                value = part(states, at)
                gradient[at:at + chunk] = torch.autograd.grad(value.sum(), states)[0]
            values.append(value.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None
