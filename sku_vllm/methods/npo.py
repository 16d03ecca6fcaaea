"""`npo`: negative preference optimisation of the served model, KL to the base on retain data (Zhang et al. 2024, arXiv 2404.05868)."""

from functools import partial

from sku_vllm.methods import losses
from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.sku_mirrored import mirrored_preservation
from sku_vllm.methods.train_config import TrainConfig


def terms(config: TrainConfig) -> list[Term]:
    """NPO on harmful answers and KL to the base on retain rows, both in the served model."""
    return [
        Term(
            "npo",
            config.guided_weight,
            "forget",
            Side.SERVED,
            losses.log_ratio,
            references=(Side.BASE,),
            mean="rows",
            sequence=partial(losses.npo, beta=config.beta),
        ),
        mirrored_preservation(config.preservation_weight),
    ]


METHOD = Method(
    "npo",
    "Negative preference optimisation with KL on retain data (baseline).",
    one_phase(terms),
    {"beta": 0.1, "preservation_weight": 5.0, "steps": 60, "lr": 1e-3},
    served_side=True,
)
