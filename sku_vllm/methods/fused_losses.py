"""Cross entropy and KL divergence that need less memory than autograd's.

Autograd keeps the logits, their log-softmax, a one-hot gradient and its product with the softmax: four tensors of tokens × vocabulary.
Here the gradient is written over the log-softmax, so backward can run only once. `losses.py` uses these two functions.
"""

import importlib.util
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log softmax(logits)[target] for every row, [n], from logits [n, V], which the caller may not use afterwards.

    On a GPU where Liger is installed, its kernel computes it.
    """
    if logits.is_cuda and importlib.util.find_spec("liger_kernel"):
        return cross_entropy_by_liger(logits, targets)
    values: torch.Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]  # torch types no Function.apply
    return values


def cross_entropy_by_liger(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`cross_entropy` in one Triton kernel that writes the gradient over the logits (Hsu et al. 2024, arXiv 2410.10989)."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    class_weights, ignore_index, lse_square_scale, smoothing = None, -100, 0.0, 0.0
    options = class_weights, ignore_index, lse_square_scale, smoothing, "none"
    values: torch.Tensor = LigerCrossEntropyFunction.apply(logits, targets, *options)[0]
    return values


def divergence(log_target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(target ‖ softmax(logits)) for every row, [n], from two [n, V]; `log_target`, log-probabilities (−inf allowed), is overwritten."""
    values: torch.Tensor = _Divergence.apply(log_target, logits)  # type: ignore[no-untyped-call]  # torch types no Function.apply
    return values


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_q, targets = logits.log_softmax(-1), targets[:, None]
        ctx.save_for_backward(log_q, targets)
        return -log_q.gather(1, targets)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        """softmax − one-hot."""
        log_q, targets = ctx.saved_tensors
        upstream = upstream[:, None]
        return log_q.exp_().mul_(upstream).scatter_add_(1, targets, -upstream), None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        log_q = logits.log_softmax(-1)
        nowhere = log_p == -torch.inf
        difference = log_p - log_q
        p = log_p.exp_()
        values = difference.masked_fill_(nowhere, 0.0).mul_(p).sum(-1)
        ctx.save_for_backward(p, log_q)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, torch.Tensor]:
        """softmax − target."""
        p, log_q = ctx.saved_tensors
        return None, log_q.exp_().sub_(p).mul_(upstream[:, None])
