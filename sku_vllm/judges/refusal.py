"""Does this answer refuse? The answer alone decides; partial refusals count as refusals.

A logistic model over the cues of `refusal_cues`, trained by `train_refusal` on human labels; its weights, the digests of its
data and its cross-validated error are in refusal.json.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from sku_vllm.judges.exchange import Exchange
from sku_vllm.judges.refusal_cues import features

WEIGHTS = Path(__file__).with_name("refusal.json")


@lru_cache(maxsize=4096)  # models repeat their refusals and their short answers, and a search over scales asks again
def is_refusal(response: str) -> bool:
    """Whether the answer refuses, in part or in full, or turns the question down as such."""
    return bool(response.strip()) and refusal_score(response) > 0


def refusal_score(response: str) -> float:
    """Log-odds of a refusal at even odds beforehand."""
    weights, bias = _model()
    return bias + sum(weights[name] * value for name, value in features(response).items() if value)


@lru_cache(maxsize=1)
def _model() -> tuple[dict[str, float], float]:
    model = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    return model["weights"], model["bias"]


class RefusalJudge:
    """The built-in detector as a judge: it has no opinion on harm."""

    name = "refusal"

    def judge(self, exchanges: Sequence[Exchange]) -> list[bool | None]:
        return [None] * len(exchanges)
