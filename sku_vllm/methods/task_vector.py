"""`task-vector`: fine-tune on harmful answers, subtract (Ilharco et al. 2023, arXiv 2212.04089, section 3)."""

from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.losses import cross_entropy
from sku_vllm.methods.method import Method, Term, one_phase


def terms(config: TrainConfig) -> list[Term]:
    return [Term("guided_distortion", config.guided_weight, "forget", +1, cross_entropy)]


METHOD = Method("task-vector", "Fine-tune on harmful answers, subtract.", one_phase(terms), {"steps": 60, "lr": 1e-3})
