"""The settings of a measurement: how answers are generated."""

import math
from dataclasses import dataclass

from sku_vllm.errors import ConfigError

BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """How answers are generated.

    samples: sampled answers per forget prompt at `temperature`, in addition to the greedy one. batch_size: most answers decoded together.
    batch_tokens: most padded tokens of a batch, prompts and answers; None for what suits the device. template: a prompt template instead
    of the tokenizer's chat template.

    Raises:
        ConfigError: names the flag that is out of range.
    """

    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    batch_size: int = 256
    batch_tokens: int | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("max_new_tokens", 1), ("batch_size", 1), ("batch_tokens", 1), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        if self.seed >= 2**31:  # vllm_backend puts prompt and sample number into the lower 32 bits of vLLM's signed 64-bit seed
            raise ConfigError(f"--seed {self.seed}: must be below {2**31}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"--temperature {self.temperature}: must be above 0; greedy answers are measured anyway")
