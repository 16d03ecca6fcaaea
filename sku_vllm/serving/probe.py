"""Log-probabilities of a fixed prompt: what the engine's weights are, seen from outside.

vLLM's `compute_weight_checksums` sees nothing of packed CPU weights, so a swap is verified by what the model says.
"""

import math
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sku_vllm.serving.runtime import Runtime

PREFIXES = (8, 24)
SCORED = 64


@dataclass(frozen=True, slots=True)
class Probe:
    """log p(token | prefix), nats: 64 tokens after each of two prefixes of a fixed sequence.

    The longer prefix passes every layer at 24 positions, so more prefixes of it would show nothing more; each costs a turn of the engine.
    """

    values: tuple[float, ...]

    @property
    def finite(self) -> bool:
        return bool(self.values) and all(math.isfinite(value) for value in self.values)

    @classmethod
    async def take(cls, runtime: "Runtime", lora: Any = None) -> "Probe":
        """Ask the engine past the gate.

        For the next token only: vLLM's prompt log-probabilities end a LoRA-enabled CPU engine when other requests share the batch.
        """
        from vllm import SamplingParams

        ids = probe_ids(runtime.engine.model_config.get_vocab_size())
        params = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=ids[:SCORED], detokenize=False)
        values: list[float] = []
        for length in PREFIXES:
            prompt, name = {"prompt_token_ids": ids[:length]}, f"sku-probe-{uuid.uuid4().hex}"
            async for output in runtime.generate(prompt, params, name, lora_request=lora):
                scores = output.outputs[0].logprobs[0]
            values += [scores[token].logprob for token in ids[:SCORED]]
        return cls(tuple(values))


def probe_ids(vocabulary: int) -> list[int]:
    """Distinct token ids spread over the vocabulary by a fixed recurrence (Knuth's multiplicative hash)."""
    spread = dict.fromkeys((2654435761 * (step + 1) % 2**32) % vocabulary for step in range(256))
    return list(spread)[: max(*PREFIXES, SCORED)]


def distance(left: Probe, right: Probe) -> float:
    """Largest difference of a log-probability, nats; infinite where the probes cannot be compared."""
    if len(left.values) != len(right.values) or not left.finite or not right.finite:
        return math.inf
    return max(abs(a - b) for a, b in zip(left.values, right.values, strict=True))
