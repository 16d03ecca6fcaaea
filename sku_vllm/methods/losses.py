"""The losses, one pure function each: logits in, one value per token out. Open this file to look a formula up or to add one.

Each takes logits [n, V] of the model that is trained, the token ids that follow [n], and, if it compares, reference logits [n, V]
(the base's first, then the adapted model's), and returns [n]. A method's terms (`method.Term`) weigh and average them.
"""

import torch
import torch.nn.functional as F

from sku_vllm.methods import fused_losses as fused


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log p(target), [n]."""
    return fused.cross_entropy(logits, targets)


def cross_entropy_if_it_goes_on(logits: torch.Tensor, targets: torch.Tensor, *, stop: int) -> torch.Tensor:
    """−log p(target | the next token is not `stop`), [n]: what comes after a place, without a say in whether anything does."""
    banned = logits.new_zeros(logits.shape[-1])
    banned[stop] = -torch.inf
    return cross_entropy(logits + banned, targets)


def negative_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target), [n]: minimised by gradient ascent."""
    return -cross_entropy(logits, targets)


def kl_from_base(logits: torch.Tensor, targets: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(base ‖ model), [n]: large where the model no longer says what the base would say."""
    return fused.divergence(base.log_softmax(-1), logits)


def negative_kl_from_base(logits: torch.Tensor, targets: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Preservation divergence as published (Liu et al. 2024, equation 5): −KL(base ‖ adapted)."""
    return -kl_from_base(logits, targets, base)


def log_ratio(logits: torch.Tensor, targets: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """log p(target) − log p_base(target), [n]."""
    return cross_entropy(base, targets) - cross_entropy(logits, targets)


def npo(log_ratios: torch.Tensor, beta: float) -> torch.Tensor:
    """Negative preference optimisation of whole answers (Zhang et al. 2024, arXiv 2404.05868, equation 3): −2/β·log σ(−β·ratio)."""
    return -2 / beta * F.logsigmoid(-beta * log_ratios)


def contrast(base: torch.Tensor, adapted: torch.Tensor, beta: float, floor: float) -> torch.Tensor:
    """log p* [n, V], with p*(v) ∝ p₀(v)·(p₀(v)/p₊(v))^β among the v with p₀(v) ≥ floor·max p₀, and −inf elsewhere.

    p* is what the base would say without what the harmful adapter adds; `base` and `adapted` are the logits of p₀ and p₊, [n, V].
    """
    log_base = base.log_softmax(-1)
    scores = (1 + beta) * log_base - beta * adapted.log_softmax(-1)
    likely = log_base >= log_base.max(-1, keepdim=True).values + torch.log(torch.tensor(floor))
    return scores.masked_fill(~likely, -torch.inf).log_softmax(-1)


def kl_from_contrast(
    logits: torch.Tensor, targets: torch.Tensor, base: torch.Tensor, adapted: torch.Tensor, beta: float, floor: float
) -> torch.Tensor:
    """KL(p* ‖ model), [n], with p* from `contrast`."""
    return fused.divergence(contrast(base, adapted, beta, floor), logits)
