"""How a model is questioned: the settings that shape a measurement, validated once."""

import math
from dataclasses import dataclass

from sku_vllm.errors import ConfigError

BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """samples: answers at `temperature` per forget prompt, beside the greedy one. batch_size: sequences decoded together."""

    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    batch_size: int = 256
    template: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        if self.seed >= 2**31:  # vLLM's seeds have 64 bits, and prompt and copy take the lower half
            raise ConfigError(f"--seed {self.seed}: must be below {2**31}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"--temperature {self.temperature}: must be above 0; greedy answers are measured anyway")
