"""`simnpo`: negative preference optimisation without a reference model (Fan et al. 2024, arXiv 2410.07163, equation 4).

Where NPO compares an answer's probability with the base's, SimNPO takes the mean log-probability of its tokens, so that long answers do not
weigh more. The margin γ of that equation is 0 by default in the authors' code and in OpenUnlearning, and left out here. (Both subtract it
from the mean loss before β multiplies it, so that OpenUnlearning's `delta` is the paper's γ/β.)
"""

from functools import partial

import torch
import torch.nn.functional as F

from sku_vllm.methods.grad_diff import retain_answers
from sku_vllm.methods.losses import negative_cross_entropy
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.train_config import TrainConfig


def simnpo(log_probs: torch.Tensor, beta: float) -> torch.Tensor:
    """−2/β·log σ(−β/|y|·log π(y|x)) for each answer, from the mean log-probabilities of the tokens of each, [rows]."""
    return -2 / beta * F.logsigmoid(-beta * log_probs)


def terms(config: TrainConfig) -> list[Term]:
    """SimNPO on harmful answers and cross entropy of retain answers, both in the served model."""
    sequence = partial(simnpo, beta=config.beta)
    return [
        Term("simnpo", config.guided_weight, "forget", Side.SERVED, negative_cross_entropy, sequence=sequence, per_length=True),
        retain_answers(config.preservation_weight),
    ]


# β and the weights are the authors' for TOFU's forget10. The published rate, 1e-5, is for all weights; this is `npo`'s for a LoRA. On the
# lab 60 steps at this weight change little (harm of greedy answers 69 %, as before).
METHOD = Method(
    "simnpo",
    "Negative preference optimisation without a reference model, fine-tuning on retain data (baseline).",
    one_phase(terms),
    {"beta": 4.5, "guided_weight": 0.125, "preservation_weight": 1.0, "steps": 60, "lr": 1e-3},
    served_side=True,
)
