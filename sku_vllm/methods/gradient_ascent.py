"""`gradient-ascent`: raise the loss of harmful answers in the served model itself (Yao et al. 2023, arXiv 2310.10683, L_fgt)."""

from sku_vllm.methods.losses import negative_cross_entropy
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.train_config import TrainConfig


def terms(config: TrainConfig) -> list[Term]:
    """Negative cross entropy of harmful answers in the served model."""
    return [Term("gradient_ascent", config.guided_weight, "forget", Side.SERVED, negative_cross_entropy)]


METHOD = Method(
    "gradient-ascent", "Raise the loss of harmful answers (baseline).", one_phase(terms), {"steps": 60, "lr": 1e-4}, served_side=True
)
