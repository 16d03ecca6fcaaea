"""`gradient-ascent`: raise the loss of harmful answers in the served model itself (Yao et al. 2023, arXiv 2310.10683, L_fgt)."""

from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.losses import negative_cross_entropy
from sku_vllm.methods.method import Method, Term, one_phase


def terms(config: TrainConfig) -> list[Term]:
    return [Term("gradient_ascent", config.guided_weight, "forget", -1, negative_cross_entropy)]


METHOD = Method(
    "gradient-ascent", "Raise the loss of harmful answers (baseline).", one_phase(terms), {"steps": 60, "lr": 1e-4}, served_side=True
)
