"""`sku`: the published method (Liu et al. 2024, arXiv 2402.10058, equations 3 to 6).

Identify harmful knowledge by guided distortion and random disassociation, both by descent on the adapted model, and push the
adapted model away from the base on benign data (preservation divergence). Each row's answer counts alike, as published.
"""

from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.losses import cross_entropy, negative_kl_from_base
from sku_vllm.methods.method import Method, Term, one_phase


def harmful_terms(config: TrainConfig) -> list[Term]:
    """Guided distortion and random disassociation."""
    return [
        Term("guided_distortion", config.guided_weight, "forget", +1, cross_entropy, mean="rows"),
        Term("random_disassociation", config.random_weight, "mismatched", +1, cross_entropy, mean="rows"),
    ]


def terms(config: TrainConfig) -> list[Term]:
    return [
        *harmful_terms(config),
        Term(
            "preservation_divergence", config.preservation_weight, "retain", +1, negative_kl_from_base, tokens="all", references=("base",)
        ),
    ]


METHOD = Method(
    "sku", "Published SKU: guided distortion, random disassociation, preservation divergence.", one_phase(terms),
    {"guided_weight": 2.5, "random_weight": 2.5, "preservation_weight": 1.0, "steps": 60, "rounds": 1, "lr": 1e-3},
)
