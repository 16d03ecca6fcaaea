"""Losses over a whole vocabulary whose gradient is a difference of distributions, written into one buffer.

Autograd's own way keeps the logits, their log-softmax, a one-hot gradient and its product with the softmax: four tensors of
tokens × vocabulary. Here the log-softmax becomes the gradient where it lies, so backward can be taken once.
"""

import importlib.util
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log softmax(logits)[target] for every row, [n]; the logits are used up. By Liger's kernel on a GPU where that is installed."""
    if logits.is_cuda and importlib.util.find_spec("liger_kernel"):
        return cross_entropy_by_liger(logits, targets)
    return _CrossEntropy.apply(logits, targets)


def cross_entropy_by_liger(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same in one Triton kernel that leaves the gradient where the logits were (Hsu et al. 2024, arXiv 2410.10989)."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    class_weights, ignored, squares, smoothing = None, -100, 0.0, 0.0
    return LigerCrossEntropyFunction.apply(logits, targets, class_weights, ignored, squares, smoothing, "none")[0]


def divergence(log_target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(target ‖ softmax(logits)) for every row, [n]; `log_target` holds log-probabilities (−inf where none) and is used up."""
    return _Divergence.apply(log_target, logits)


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
