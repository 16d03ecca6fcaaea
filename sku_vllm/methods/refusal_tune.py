"""`refusal-tune`: teach the served model to refuse harmful prompts, KL to the base on retain data. Needs refusals (`--refusals`)."""

from sku_vllm.methods.losses import cross_entropy
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.sku_mirrored import mirrored_preservation
from sku_vllm.methods.train_config import TrainConfig


def terms(config: TrainConfig) -> list[Term]:
    """Cross entropy of refusals and KL to the base on retain rows, both in the served model."""
    return [
        Term("refusal", config.guided_weight, "refusals", Side.SERVED, cross_entropy),
        mirrored_preservation(config.preservation_weight),
    ]


METHOD = Method(
    "refusal-tune",
    "Fine-tune on refusals of the harmful prompts, KL on retain data (baseline).",
    one_phase(terms),
    {"preservation_weight": 5.0, "steps": 60, "lr": 1e-3},
    served_side=True,
)
