"""A training run's settings: method defaults, then a preset's, then what the user says."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sku_vllm.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
SCHEDULES = ("linear", "late", "constant")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that decides the bits of an adapter, given model and data. Make one with `TrainConfig.of`.

    Attributes:
        steps: optimizer steps a round. rounds: rounds of iterated negation. fold: share of a round's delta folded in after it.
        batch_size: harmful rows a step, over all processes; retain rows are retain_factor times as many.
        lr: peak learning rate of AdamW. schedule: "linear" decay to 0, "late" (over the second half), "constant".
        random_answers: answers of other prompts per harmful prompt (K in the paper).
        clip: largest gradient norm, 0 = no clipping.
        max_length: tokens a row at most; answers beyond it are cut, counted and reported.
        tokens_per_pass: tokens in one forward pass; a step takes as many passes as it needs.
        beta: of npo and the contrastive methods. floor, later_floor: how likely a token has to be to the base, as a share of its
            likeliest one, for p* to count it: as an answer's first token, and later.
        samples, sample_tokens: answers drawn from p*, as many prompts that the base makes up, and their length.
        stop_weight: of ending a harmful answer that was begun. recovery_weight: of refusing after one was begun.
        unasked_weight: of keeping what the base says to prompts that it makes up itself.
        relearner_lr, relearner_steps: of the adversary that relearns while the served model trains: its step, as a share of each weight's
            root mean square, and its steps until it starts over; 0 = none.
        full: train all weights (a dense task vector) instead of a LoRA.
        template, dtype, seed: as on the command line.
    """

    method: str = "sku-contrastive-two"
    preset: str | None = None
    steps: int = 60
    rounds: int = 1
    fold: float = 0.8
    batch_size: int = 8
    retain_factor: int = 1
    lr: float = 1e-3
    schedule: str = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    rank: int = 32
    lora_alpha: int = 16
    target_modules: tuple[str, ...] = ("all-linear",)
    guided_weight: float = 1.0
    random_weight: float = 0.0
    preservation_weight: float = 0.0
    random_answers: int = 5
    beta: float = 0.1
    floor: float = 0.003
    later_floor: float = 0.1
    stop_weight: float = 0.0
    recovery_weight: float = 0.0
    unasked_weight: float = 0.0
    relearner_lr: float = 8e-3
    relearner_steps: int = 0
    stop_id: int = -1
    samples: int = 512
    sample_tokens: int = 48
    seed: int = 0
    dtype: str = "auto"
    template: str | None = None
    max_length: int = 512
    tokens_per_pass: int = 4096
    gradient_checkpointing: bool = False
    quantize: str | None = None
    full: bool = False

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "rounds",
            "batch_size",
            "retain_factor",
            "rank",
            "random_answers",
            "samples",
            "sample_tokens",
            "tokens_per_pass",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: has to be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed}: has to lie between 0 and {2**32 - 1}")
        if self.relearner_steps < 0:
            raise ConfigError(f"--relearner-steps {self.relearner_steps}: has to be 0 (no relearner) or more")
        for name in (
            "guided_weight",
            "random_weight",
            "preservation_weight",
            "stop_weight",
            "recovery_weight",
            "unasked_weight",
            "weight_decay",
            "clip",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: has to be 0 or more")
        for name in ("lr", "lora_alpha", "beta", "relearner_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: has to be above 0")
        if not 0 < self.fold <= 1:
            raise ConfigError(f"--fold {self.fold}: has to lie in (0, 1]")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype}: choose from {', '.join(DTYPES)}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule {self.schedule}: choose from {', '.join(SCHEDULES)}")
        if self.max_length < 8:
            raise ConfigError(f"--max-length {self.max_length}: leaves no room for an answer; give at least 8")
        if not self.target_modules and not self.full:
            raise ConfigError("--target-modules: name at least one, or all-linear")

    @classmethod
    def of(cls, method: str | None = None, *, preset: str | None = None, **given: Any) -> "TrainConfig":
        """The configuration of a method: its defaults, overridden by the preset's, overridden by `given` (None = not given).

        Raises:
            ConfigError: an unknown method, preset or setting, or a value out of range.
        """
        from sku_vllm.methods import METHODS
        from sku_vllm.methods.presets import PRESETS

        if preset is not None and preset not in PRESETS:
            raise ConfigError(f"--preset {preset}: unknown; choose from {', '.join(PRESETS)}")
        chosen: Mapping[str, Any] = PRESETS[preset].settings if preset else {}
        method = method or chosen.get("method") or cls.__dataclass_fields__["method"].default
        if method not in METHODS:
            raise ConfigError(f"--method {method}: unknown; choose from {', '.join(METHODS)}")
        known = {field.name for field in fields(cls)}
        unknown = set(given) - known
        if unknown:
            raise ConfigError(f"unknown setting {sorted(unknown)[0]!r}; choose from {', '.join(sorted(known))}")
        given = {name: value for name, value in given.items() if value is not None}
        return cls(**{**METHODS[method].defaults, **chosen, "preset": preset, **given, "method": method})

    def to_json(self) -> dict[str, Any]:
        """Plain values, for sku_run.json and for comparing a resumed run with what was begun."""
        return {**asdict(self), "target_modules": list(self.target_modules)}

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of one step of a phase; a function of the step alone, so a resumed run needs no scheduler state."""
        done = step / steps
        share = {"constant": 1.0, "linear": 1 - done, "late": min(1.0, 2 * (1 - done))}[self.schedule]
        return self.lr * share


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
