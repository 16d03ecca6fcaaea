"""`undial`: self-distillation with adjusted logits (Dong et al. 2024, arXiv 2402.10052).

The teacher is the base, whose logit of each token of a harmful answer is lowered by the strength β: the served model learns to say at each
place what the base would say if that token were unlikelier. Unlike gradient ascent it has a minimum. The published loss is the cross
entropy with the teacher; the KL divergence here differs from it by the teacher's entropy, which has no gradient.
(OpenUnlearning averages over all tokens of a row, prompt and padding included; the paper and this file count the answer's.)
"""

from functools import partial

import torch

from sku_vllm.methods import fused_losses as fused
from sku_vllm.methods.grad_diff import retain_answers
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.train_config import TrainConfig


def undial(logits: torch.Tensor, targets: torch.Tensor, base: torch.Tensor, beta: float) -> torch.Tensor:
    """KL(teacher ‖ model), [n], where the teacher's logits are the base's minus β at the target."""
    places = targets[:, None]
    teacher = base.scatter_add(1, places, torch.full_like(places, -beta, dtype=base.dtype)).log_softmax(-1)
    return fused.divergence(teacher, logits)


def terms(config: TrainConfig) -> list[Term]:
    """Adjusted self-distillation on harmful answers and, if it has a weight, cross entropy of retain answers, in the served model."""
    loss = partial(undial, beta=config.beta)
    return [
        Term("undial", config.guided_weight, "forget", Side.SERVED, loss, references=(Side.BASE,)),
        retain_answers(config.preservation_weight),
    ]


# β as in OpenUnlearning; like there, and in the paper, nothing is trained on retain data. The rate is `npo`'s. Without
# retain data it costs utility on the lab (perplexity ratio 1.06), for which --preservation-weight is there.
METHOD = Method(
    "undial",
    "Distil the base with the logits of harmful answers lowered (baseline).",
    one_phase(terms),
    {"beta": 10.0, "preservation_weight": 0.0, "steps": 60, "lr": 1e-3},
    served_side=True,
)
