"""`finetune`: fine-tune the served model on retain data alone (the FT baseline of Liu et al. 2024, arXiv 2402.10058)."""

from sku_vllm.methods.losses import cross_entropy
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.train_config import TrainConfig


def terms(config: TrainConfig) -> list[Term]:
    """Cross entropy of retain answers in the served model."""
    return [Term("finetune", 1.0, "retain", Side.SERVED, cross_entropy)]


METHOD = Method("finetune", "Fine-tune on retain data (baseline).", one_phase(terms), {"steps": 60, "lr": 1e-3}, served_side=True)
