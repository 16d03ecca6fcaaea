"""`finetune`: fine-tune the served model on retain data and hope (the FT baseline of Liu et al. 2024)."""

from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.losses import cross_entropy
from sku_vllm.methods.method import Method, Term, one_phase


def terms(config: TrainConfig) -> list[Term]:
    return [Term("finetune", 1.0, "retain", -1, cross_entropy)]


METHOD = Method("finetune", "Fine-tune on retain data (baseline).", one_phase(terms), {"steps": 60, "lr": 1e-3}, served_side=True)
