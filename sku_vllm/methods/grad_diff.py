"""`grad-diff`: gradient difference (Liu et al. 2022, arXiv 2203.12817; Maini et al. 2024, TOFU, arXiv 2401.06121).

L = −L(forget) + L(retain), with L the mean cross entropy of answer tokens: gradient ascent, held back by fine-tuning on retain answers.
"""

from sku_vllm.methods.gradient_ascent import terms as ascent
from sku_vllm.methods.losses import cross_entropy
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.train_config import TrainConfig


def terms(config: TrainConfig) -> list[Term]:
    """Gradient ascent on harmful answers and cross entropy of retain answers, both in the served model."""
    return [*ascent(config), retain_answers(config.preservation_weight)]


def retain_answers(weight: float) -> Term:
    """Cross entropy of retain answers in the served model: "GD" in TOFU, "NLL" in OpenUnlearning."""
    return Term("retain_answers", weight, "retain", Side.SERVED, cross_entropy)


# Both weights as published. The published rate, 1e-5, is for all weights; that of `ga-mismatch` keeps QA and perplexity on the lab.
METHOD = Method(
    "grad-diff",
    "Raise the loss of harmful answers, fine-tune on retain data (baseline).",
    one_phase(terms),
    {"preservation_weight": 1.0, "steps": 60, "lr": 3e-4},
    served_side=True,
)
