"""DistillConfig: how far the student is damaged and how it learns again. Open this file to add a setting."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.model_spec import check_dtype

AT_LEAST_1 = ("steps", "batch_size", "samples", "sample_tokens", "tokens_per_pass")


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """Settings of one distillation.

    Attributes:
        alpha: of the student's first weights, alpha·teacher + (1 − alpha)·noise; 1 keeps the teacher's, and with them what they suppress.
        layer_alphas: {regular expression of weight names: alpha}, the first that matches; other weights take `alpha`.
        noise_std: standard deviation of the noise, which has mean 0 and is added to matrices only.
        fresh: begin with new weights of the same shape instead, as for pretraining; `alpha` and noise are not used.
        steps: optimizer steps. batch_size: rows a step, over all processes. lr: peak learning rate; a twentieth of the steps warms up, and
            a cosine leads down to 0.
        samples: answers drawn from the teacher: half of them to prompts that it makes up, and the rest to retain and forget prompts.
        sample_tokens: most tokens of a drawn answer.
        dtype: what both models compute in; "auto" is float32. The checkpoint keeps the teacher's dtype.
        template: as for training. max_length: most tokens of a row. tokens_per_pass: tokens in one forward pass.

    Raises:
        ConfigError: a value out of range, naming its flag.
    """

    alpha: float = 0.6
    layer_alphas: Mapping[str, float] = field(default_factory=dict)
    noise_std: float = 0.02
    fresh: bool = False
    steps: int = 1200
    batch_size: int = 96
    lr: float = 1e-3
    samples: int = 6000
    sample_tokens: int = 48
    seed: int = 0
    dtype: str = "auto"
    template: str | None = None
    max_length: int = 512
    tokens_per_pass: int = 4096

    def __post_init__(self) -> None:
        for name in AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: has to be at least 1")
        for alpha in (self.alpha, *self.layer_alphas.values()):
            if not 0 <= alpha <= 1:
                raise ConfigError(f"--alpha {alpha}: has to lie in [0, 1]; 0.6 keeps 60 % of the teacher's weights")
        for pattern in self.layer_alphas:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"--layer-alphas {pattern!r}: not a regular expression ({error})") from error
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise ConfigError(f"--noise-std {self.noise_std}: has to be 0 or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"--lr {self.lr}: has to be above 0")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed}: has to lie between 0 and {2**32 - 1}")
        if self.max_length < 8:
            raise ConfigError(f"--max-length {self.max_length}: leaves no room for an answer; give at least 8")
        check_dtype(self.dtype)

    @property
    def computed_in(self) -> str:
        """What `dtype` comes to: all weights train, so "auto" is float32."""
        return "float32" if self.dtype == "auto" else self.dtype

    def alpha_of(self, name: str) -> float:
        """The share of the teacher's weights that the matrix `name` begins with."""
        return next((alpha for pattern, alpha in self.layer_alphas.items() if re.search(pattern, name)), self.alpha)

    def rate(self, step: int) -> float:
        """Learning rate of one step, counted from 0; a function of the step alone, so a resumed run needs no scheduler state."""
        warm = max(1, self.steps // 20)
        return self.lr * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for records and for comparing a resumed run with what was begun."""
        return {**asdict(self), "layer_alphas": dict(self.layer_alphas)}
