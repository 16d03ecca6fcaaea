"""`sku-mirrored`: harmful knowledge identified at +delta, utility protected at −delta, in rounds.

The published divergence KL(base ‖ base+δ) ≈ ½·δᵀFδ is even in δ, so raising it raises it for base−δ as well, which is the model that
gets served. Here KL(base ‖ base−δ) is lowered instead: a pass with the adapter's scaling negated. Where the base complies
anyway, guided distortion has no gradient; after a round is subtracted it has, hence the rounds.
"""

from sku_vllm.methods.config import TrainConfig
from sku_vllm.methods.losses import cross_entropy, kl_from_base
from sku_vllm.methods.method import Method, Term, one_phase


def terms(config: TrainConfig) -> list[Term]:
    return [
        Term("guided_distortion", config.guided_weight, "forget", +1, cross_entropy),
        Term("random_disassociation", config.random_weight, "mismatched", +1, cross_entropy),
        mirrored_preservation(config.preservation_weight),
    ]


def mirrored_preservation(weight: float) -> Term:
    """KL(base ‖ served model) on retain rows, prompt and answer."""
    return Term("mirrored_preservation", weight, "retain", -1, kl_from_base, tokens="all", references=("base",))


METHOD = Method(
    "sku-mirrored", "Guided distortion, mirrored preservation, iterated negation.", one_phase(terms),
    {"guided_weight": 1.0, "random_weight": 0.0, "preservation_weight": 5.0, "steps": 30, "rounds": 3, "lr": 1.5e-3},
)
