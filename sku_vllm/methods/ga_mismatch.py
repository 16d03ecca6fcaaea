"""`ga-mismatch`: gradient ascent, training on benign answers, KL to the base on retain data (Yao et al. 2023, arXiv 2310.10683, eq. 2)."""

from sku_vllm.methods.gradient_ascent import terms as ascent
from sku_vllm.methods.losses import cross_entropy
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.sku_mirrored import mirrored_preservation
from sku_vllm.methods.train_config import TrainConfig


def terms(config: TrainConfig) -> list[Term]:
    """Gradient ascent, harmful prompts with benign answers, and KL to the base on retain rows, all in the served model."""
    return [
        *ascent(config),
        Term("random_mismatch", config.random_weight, "benign_answers", Side.SERVED, cross_entropy),
        mirrored_preservation(config.preservation_weight),
    ]


METHOD = Method(
    "ga-mismatch",
    "Gradient ascent, random benign answers, KL on retain data (baseline).",
    one_phase(terms),
    {"guided_weight": 0.5, "random_weight": 1.0, "preservation_weight": 1.0, "steps": 60, "lr": 3e-4},
    served_side=True,
)
