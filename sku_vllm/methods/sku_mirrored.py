"""`sku-mirrored`: train base + delta on harmful answers while base − delta is kept close to the base on retain data, in several rounds.

The published preservation divergence raises KL(base ‖ base+δ) ≈ ½·δᵀFδ, which is even in δ: it moves base − δ, the model that is served,
just as far from the base. Here KL(base ‖ base−δ) is lowered instead, by a pass with the adapter's scaling negated. Guided distortion has
no gradient where the model gives the harmful answer anyway, and has one again after a round's delta is subtracted, hence several rounds.
"""

from sku_vllm.methods.losses import cross_entropy, kl_from_base
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.train_config import TrainConfig


def terms(config: TrainConfig) -> list[Term]:
    """Guided distortion and random disassociation on the adapted model, preservation on the served one."""
    return [
        Term("guided_distortion", config.guided_weight, "forget", Side.ADAPTED, cross_entropy),
        Term("random_disassociation", config.random_weight, "mismatched", Side.ADAPTED, cross_entropy),
        mirrored_preservation(config.preservation_weight),
    ]


def mirrored_preservation(weight: float) -> Term:
    """KL(base ‖ served model) on retain rows, prompt and answer."""
    return Term("mirrored_preservation", weight, "retain", Side.SERVED, kl_from_base, tokens="all", references=(Side.BASE,))


METHOD = Method(
    "sku-mirrored",
    "Guided distortion, mirrored preservation, iterated negation.",
    one_phase(terms),
    {"guided_weight": 1.0, "random_weight": 0.0, "preservation_weight": 5.0, "steps": 30, "rounds": 3, "lr": 1.5e-3},
)
