"""`rmu`: representation misdirection for unlearning (Li et al. 2024, WMDP, arXiv 2403.03218).

The hidden states of harmful answers in a layer are steered to c·u, a random direction u of length c, where no layer above can read them;
on retain rows they are kept at the base's. Both losses are squared distances, averaged over the d numbers of a state, the tokens of a row
and the rows, as in the authors' code: L = |h − c·u|² on forget rows + α·|h − h_base|² on retain rows.

Published: layer 7 of the 32 of Zephyr-7B, so that the states after a quarter of the layers are steered, and of that and the two layers
below only the MLPs' output weights train. Here all linear layers up to it get a LoRA; those above it get no gradient.
The states steered are those that predict an answer's tokens. (WMDP's forget set is plain text, and all of it is steered; in a
conversation the prompt's template would be steered and kept at once.)
"""

from functools import partial

import torch

from sku_vllm.methods.method import Method, Side, Term, one_phase
from sku_vllm.methods.train_config import TrainConfig

DEPTH = 1 / 4


def distance_from_direction(states: torch.Tensor, targets: torch.Tensor, length: float, seed: int) -> torch.Tensor:
    """Mean squared distance of each state [n, d] from length·u, [n]; u is drawn from [0, 1)^d by the seed and normalised."""
    direction = torch.rand(states.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    goal: torch.Tensor = (length * direction / direction.norm()).to(states)
    return (states - goal).square().mean(-1)


def distance_from_base(states: torch.Tensor, targets: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of each state [n, d] from the base's, [n]."""
    return (states - base).square().mean(-1)


def terms(config: TrainConfig) -> list[Term]:
    """Steering on harmful answers, and the distance from the base's states on retain rows, both in the served model."""
    steer = partial(distance_from_direction, length=config.steering, seed=config.seed)
    return [
        Term("steering", config.guided_weight, "forget", Side.SERVED, steer, mean="rows", depth=DEPTH),
        Term(
            "retain_states",
            config.preservation_weight,
            "retain",
            Side.SERVED,
            distance_from_base,
            tokens="all",
            mean="rows",
            references=(Side.BASE,),
            depth=DEPTH,
        ),
    ]


# c as published for Zephyr-7B. With the published α, 1200, nothing is forgotten on the lab. Of 1, 10, 100 and 1200 only 10 forgets some
# (harm of greedy answers 69 → 56 %, validation, scale 1) and keeps utility (perplexity ratio 1.001); at 1 harm is 25 %, the ratio 1.47.
METHOD = Method(
    "rmu",
    "Steer the hidden states of harmful answers to a random direction, keep those of retain data (baseline).",
    one_phase(terms),
    {"steering": 6.5, "preservation_weight": 10.0, "steps": 60, "lr": 1e-3},
    served_side=True,
)
