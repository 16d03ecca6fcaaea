"""Log-probabilities of a fixed prompt: what the engine's weights are, seen from outside.

vLLM's `compute_weight_checksums` sees nothing of packed CPU weights, so a swap is verified by what the model says.
"""

import math
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sku_vllm.serving.runtime import Runtime

LENGTH = 24


@dataclass(frozen=True, slots=True)
class Probe:
    """log p(token | prefix), nats, for each token of the probe after the first."""

    values: tuple[float, ...]

    @property
    def finite(self) -> bool:
        return bool(self.values) and all(math.isfinite(value) for value in self.values)

    @classmethod
    async def take(cls, runtime: "Runtime", lora: Any = None) -> "Probe":
        """Ask the engine past the gate. Prompt log-probabilities are computed anew each time, never from the prefix cache."""
        from vllm import SamplingParams

        ids = probe_ids(runtime.engine.model_config.get_vocab_size())
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        final = None
        async for output in runtime.generate({"prompt_token_ids": ids}, params, f"sku-probe-{uuid.uuid4().hex}", lora_request=lora):
            final = output
        found = (final.prompt_logprobs or []) if final else []
        return cls(tuple(found[place][token].logprob for place, token in enumerate(ids) if place and found[place]))


def probe_ids(vocabulary: int) -> list[int]:
    """Token ids spread over the vocabulary by a fixed recurrence (Knuth's multiplicative hash)."""
    return [(2654435761 * (step + 1) % 2**32) % vocabulary for step in range(LENGTH)]


def distance(left: Probe, right: Probe) -> float:
    """Largest difference of a log-probability, nats; infinite where the probes cannot be compared."""
    if len(left.values) != len(right.values) or not left.finite or not right.finite:
        return math.inf
    return max(abs(a - b) for a, b in zip(left.values, right.values, strict=True))
