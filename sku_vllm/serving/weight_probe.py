"""A probe of the engine's weights: log-probabilities of fixed tokens after fixed prompts, compared before and after a swap.

vLLM's `compute_weight_checksums` does not cover packed CPU weights, so a swap is verified by the model's output instead.
"""

import math
import uuid
from dataclasses import dataclass
from typing import Any

from sku_vllm.serving.runtime import Runtime

PREFIXES = (8, 24)  # tokens of the prompts
SCORED = 64  # candidates for the next token that are scored


@dataclass(frozen=True, slots=True)
class Probe:
    """log p(next token | prefix) in nats, of 64 candidate tokens after each of two prefixes of a fixed sequence.

    Two prefixes are enough: the longer one uses every layer at 24 positions, and every further one costs an engine step.
    """

    values: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether every log-probability is a number."""
        return bool(self.values) and all(math.isfinite(value) for value in self.values)

    @classmethod
    async def take(cls, runtime: Runtime, lora: Any = None) -> "Probe":
        """Run the probe with the unwrapped `generate`, which is not held back during a swap. lora: a LoRARequest, or None.

        It asks for the next token's log-probabilities: those of the prompt crash a LoRA-enabled CPU engine when requests share a batch.
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
