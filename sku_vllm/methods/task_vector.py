"""`task-vector`: fine-tune on harmful answers, subtract (Ilharco et al. 2023, arXiv 2212.04089, section 3)."""

from sku_vllm.methods.losses import cross_entropy
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.train_config import TrainConfig


def terms(config: TrainConfig) -> list[Term]:
    """Cross entropy of harmful answers in the adapted model."""
    return [Term("guided_distortion", config.guided_weight, "forget", Side.ADAPTED, cross_entropy)]


METHOD = Method("task-vector", "Fine-tune on harmful answers, subtract.", one_phase(terms), {"steps": 60, "lr": 1e-3})
