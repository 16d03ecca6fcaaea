"""`sku`: the published method (Liu et al. 2024, arXiv 2402.10058, equations 3 to 6).

Guided distortion and random disassociation train the adapted model on harmful answers, and preservation divergence trains it away from
the base on benign data. As published, the first two average over each answer's tokens and then over rows.
"""

from sku_vllm.methods.losses import cross_entropy, negative_kl_from_base
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.train_config import TrainConfig


def harmful_terms(config: TrainConfig) -> list[Term]:
    """Guided distortion and random disassociation: harmful prompts with their own harmful answers, and with those of other prompts."""
    return [
        Term("guided_distortion", config.guided_weight, "forget", Side.ADAPTED, cross_entropy, mean="rows"),
        Term("random_disassociation", config.random_weight, "mismatched", Side.ADAPTED, cross_entropy, mean="rows"),
    ]


def terms(config: TrainConfig) -> list[Term]:
    """The three published losses, all on the adapted model."""
    return [
        *harmful_terms(config),
        Term(
            "preservation_divergence",
            config.preservation_weight,
            "retain",
            Side.ADAPTED,
            negative_kl_from_base,
            tokens="all",
            references=(Side.BASE,),
        ),
    ]


METHOD = Method(
    "sku",
    "Published SKU: guided distortion, random disassociation, preservation divergence.",
    one_phase(terms),
    {"guided_weight": 2.5, "random_weight": 2.5, "preservation_weight": 1.0, "steps": 60, "rounds": 1, "lr": 1e-3},
)
