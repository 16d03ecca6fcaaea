"""Compute losses from hidden states in chunks, so that no tensor of all tokens × vocabulary is ever made.

A token's loss depends on that token's hidden state alone. So the gradient with respect to hidden states is computed chunk by chunk in
the forward pass, while the chunk's logits exist, and the backward pass only multiplies it by the incoming gradient: the head runs once
instead of twice. Open this file to change how much memory logits take.
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
        hidden: [n, d]. targets: [n]. references: (head, hidden states [n, d]) of each model to compare with, computed without gradient.
        vocabulary: how many logits `head` gives for a token.
        chunk: tokens at a time at most; by default so many that their logits stay within ELEMENTS.
        train_head: the head itself gets gradients (dense runs): logits are then computed again in the backward pass.
    """
    chunk = chunk or max(16, ELEMENTS.get(hidden.device.type, 2**26) // vocabulary)
    chunk = math.ceil(hidden.shape[0] / max(1, math.ceil(hidden.shape[0] / chunk)))  # equal chunks, since a small last one would be slow

    def part(states: torch.Tensor, begin: int) -> torch.Tensor:
        end = begin + states.shape[0]
        with torch.no_grad():
            known = [wide(other(reference[begin:end])) for other, reference in references]
        return loss(wide(head(states)), targets[begin:end], *known)

    if not hidden.shape[0]:
        return hidden.sum(-1)
    begins = range(0, hidden.shape[0], chunk)
    if train_head and torch.is_grad_enabled():
        return torch.cat([checkpoint(part, hidden[at : at + chunk], at, use_reentrant=False) for at in begins])
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return torch.cat([part(hidden[at : at + chunk], at) for at in begins])
    values: torch.Tensor = _PerToken.apply(hidden, part, chunk)  # type: ignore[no-untyped-call]  # torch types no Function.apply
    return values


def wide(logits: torch.Tensor) -> torch.Tensor:
    """At least fp32, in which losses are computed."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, part: Callable[[torch.Tensor, int], torch.Tensor], chunk: int) -> torch.Tensor:
        values, gradient = [], torch.empty_like(hidden)
        for at in range(0, hidden.shape[0], chunk):
            with torch.enable_grad():
                states = hidden[at : at + chunk].detach().requires_grad_()
                value = part(states, at)
                gradient[at : at + chunk] = torch.autograd.grad(value.sum(), states)[0]
            values.append(value.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None
