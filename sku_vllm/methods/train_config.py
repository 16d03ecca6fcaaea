"""The settings of a training run: a method's defaults, overridden by a preset's, overridden by the user's.

Open this file to add a setting, to see what one means, or to see which values are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from sku_vllm.data.long_rows import check_on_long
from sku_vllm.errors import ConfigError
from sku_vllm.methods.presets import PRESETS
from sku_vllm.methods.registry import METHODS
from sku_vllm.model_spec import check_dtype

SCHEDULES = ("linear", "late", "constant")
DEFAULT_METHOD = "sku-contrastive-two"
# Where a contrastive method takes its refusals from (train/targets.py); "auto" takes the first that works.
TARGETS = ("auto", "latent", "asked", "given")
WRITTEN = ("asked", "given")  # learned as texts, not as a distribution
# Losses that an ablation leaves out (`--no-NAME`), and the settings that weigh them.
ABLATIONS = {"guided_distortion": "guided_weight", "random_disassociation": "random_weight", "preservation": "preservation_weight"}
AT_LEAST_1 = ("steps", "rounds", "batch_size", "retain_factor", "rank", "random_answers", "samples", "sample_tokens", "tokens_per_pass")
AT_LEAST_0 = (
    "guided_weight", "random_weight", "preservation_weight", "stop_weight", "recovery_weight", "unasked_weight", "border_weight",
    "first_weight", "weight_decay", "clip"
)  # fmt: skip
ABOVE_0 = ("lr", "lora_alpha", "beta", "steering", "relearner_lr")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The settings of a training run: with model and data they decide every bit of the adapter. Make one with `TrainConfig.of`.

    Field names are keys of records (`sku_train.json`, `sku_run.json`), which is why some are older than the terms used elsewhere:
    `relearner_…` are settings of the adversary, and `unasked_…` of the self-generated prompts.

    Attributes:
        method: name of the recipe. preset: name of published settings, or None.
        steps: optimizer steps of a round. rounds: how often to train and subtract. fold: share of its delta subtracted after a round.
        batch_size: harmful rows a step, over all processes; retain rows are retain_factor times as many.
        lr: peak learning rate of AdamW. schedule: "linear" decay to 0, "late" (over the second half), "constant".
        weight_decay: of AdamW. clip: largest gradient norm, 0 = no clipping.
        rank, lora_alpha, target_modules: of the LoRA of one round; delta = lora_alpha/rank · B@A.
        guided_weight, random_weight, preservation_weight: weights of a method's three main losses (e1, e2, e3 in the paper).
        random_answers: answers of other prompts per harmful prompt (K in the paper).
        beta: see `losses.npo`, `losses.contrast`, `simnpo.simnpo`, `undial.undial`. steering: length of the vector that rmu steers to.
        floor, later_floor: the target p* counts tokens to which the base gives at least this
            share of its likeliest token's probability: as first token of an answer (`floor`), and as a later one.
        stop_weight: of the loss that ends a harmful answer after its beginning. recovery_weight: of the losses of safety recovery and
            restarts. unasked_weight: of the KL to the base on prompts that the base makes up. border_weight: of the KL on border prompts.
        first_weight: of the KL to the base at the first token of the answers to each of these kinds, where it is decided whether to refuse.
        relearner_lr, relearner_steps: of the adversary, which fine-tunes while the served model trains: its step size, as a share of each
            weight's root mean square, added up over the layers, and the number of its steps after which it starts over; 0 = no adversary.
        stop_id: token id that ends an answer; the trainer fills it in from the tokenizer.
        targets: where a contrastive method takes its refusals from, of TARGETS.
        samples: how many refusals are drawn, and how many prompts the base makes up. sample_tokens: most tokens of either.
        seed: everything random follows from it. dtype: of the base in memory, one of DTYPES; adapters are fp32 always.
        computed_in: what `dtype` came to; the trainer fills it in, and a resumed run keeps it. None with `quantize`.
        template: how a prompt is written (see PromptTemplate.of); None takes the tokenizer's own.
        max_length: most tokens of a row; longer answers are cut, and their number is reported. on_long: "skip" leaves out rows whose
            prompt alone has that many tokens, and counts them; "error" stops before training.
        tokens_per_pass: tokens in one forward pass; a step takes as many passes as it needs.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        quantize: "4bit" loads the base in NF4; None as it is stored.
        full: train all weights (a dense task vector) instead of a LoRA.
        given: names of the settings that were passed to `of` or belong to the preset; `with_targets` leaves them alone. Not recorded.

    Raises:
        ConfigError: a value out of range, naming the flag.
    """

    method: str = DEFAULT_METHOD
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
    steering: float = 6.5
    floor: float = 0.003
    later_floor: float = 0.1
    stop_weight: float = 0.0
    recovery_weight: float = 0.0
    unasked_weight: float = 0.0
    border_weight: float = 0.0
    first_weight: float = 0.0
    relearner_lr: float = 0.024
    relearner_steps: int = 0
    stop_id: int = -1
    targets: str = "auto"
    samples: int = 512
    sample_tokens: int = 48
    seed: int = 0
    dtype: str = "auto"
    computed_in: str | None = None
    template: str | None = None
    max_length: int = 512
    on_long: str = "skip"
    tokens_per_pass: int = 4096
    gradient_checkpointing: bool = False
    quantize: str | None = None
    full: bool = False
    given: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: has to be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed}: has to lie between 0 and {2**32 - 1}")
        if self.relearner_steps < 0:
            raise ConfigError(f"--relearner-steps {self.relearner_steps}: has to be 0 (no adversary) or more")
        for name in AT_LEAST_0:
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: has to be 0 or more")
        for name in ABOVE_0:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: has to be above 0")
        if not 0 < self.fold <= 1:
            raise ConfigError(f"--fold {self.fold}: has to lie in (0, 1]")
        check_dtype(self.dtype)
        if self.targets not in TARGETS:
            raise ConfigError(f"--targets {self.targets}: unknown; choose from {', '.join(TARGETS)}")
        check_on_long(self.on_long)
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule {self.schedule}: choose from {', '.join(SCHEDULES)}")
        if self.max_length < 8:
            raise ConfigError(f"--max-length {self.max_length}: leaves no room for an answer; give at least 8")
        if not self.target_modules and not self.full:
            raise ConfigError("--target-modules: name at least one, or all-linear")

    @classmethod
    def of(cls, method: str | None = None, *, preset: str | None = None, without: Sequence[str] = (), **given: Any) -> "TrainConfig":
        """The configuration of a method: its defaults, overridden by the preset's, overridden by `given` (None = not given).

        Args:
            without: losses to leave out, of ABLATIONS.

        Raises:
            ConfigError: an unknown method, preset, setting or ablation, a value out of range, or an ablation of a loss that the method
                does not have.
        """
        for name in without:
            given = _ablated(name, method, preset, given)
        if preset is not None and preset not in PRESETS:
            raise ConfigError(f"--preset {preset}: unknown; choose from {', '.join(PRESETS)}")
        chosen: Mapping[str, Any] = PRESETS[preset].settings if preset else {}
        name = method or chosen.get("method") or DEFAULT_METHOD
        if name not in METHODS:
            raise ConfigError(f"--method {name}: unknown; choose from {', '.join(METHODS)}")
        known = {field.name for field in fields(cls)} - {"given"}
        unknown = set(given) - known
        if unknown:
            raise ConfigError(f"unknown setting {sorted(unknown)[0]!r}; choose from {', '.join(sorted(known))}")
        given = {name: value for name, value in given.items() if value is not None}
        settings = {**METHODS[name].defaults, **chosen, "preset": preset, **given, "method": name}
        config = cls(**settings, given=frozenset((*chosen, *given)))
        return config.with_targets(config.targets)

    def with_targets(self, targets: str) -> "TrainConfig":
        """The settings for refusals of one source: the method's for it, where they were not given."""
        method = METHODS[self.method]
        plain = {field.name: field.default for field in fields(self)} | dict(method.defaults)
        taken = method.written if targets in WRITTEN else plain
        changed: dict[str, Any] = {name: taken[name] for name in method.written if name not in self.given}
        return replace(self, targets=targets, **changed)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for sku_run.json and for comparing a resumed run with what was begun."""
        values = {**asdict(self), "target_modules": list(self.target_modules)}
        del values["given"]
        return values

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of one step of a phase; a function of the step alone, so a resumed run needs no scheduler state."""
        done = step / steps
        share = {"constant": 1.0, "linear": 1 - done, "late": min(1.0, 2 * (1 - done))}[self.schedule]
        return self.lr * share


def _ablated(loss: str, method: str | None, preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """`given` with the weight of one loss set to 0. Raises ConfigError if the method does not have that loss."""
    if loss not in ABLATIONS:
        raise ConfigError(f"no ablation {loss!r}; choose from {', '.join(ABLATIONS)}")
    left_out = given | {ABLATIONS[loss]: 0.0}
    whole, rest = (TrainConfig.of(method, preset=preset, **settings) for settings in (given | {ABLATIONS[loss]: None}, left_out))
    weights = [{(term.name, term.weight) for phase in METHODS[one.method].phases(one) for term in phase.terms} for one in (whole, rest)]
    if weights[0] == weights[1]:
        raise ConfigError(f"--no-{loss.replace('_', '-')}: there is none in --method {whole.method}; drop the flag")
    return left_out


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
