"""The settings of all kinds of attack."""

from collections.abc import Sequence
from dataclasses import dataclass

from sku_vllm.errors import ConfigError

WITH = ("full", "lora")
ON = ("benign", "similar", "harmful")


@dataclass(frozen=True, slots=True)
class AttackConfig:
    """Settings of the attacks.

    Attributes:
        steps: optimizer steps after which relearning is measured.
        fractions: shares of the relearning rows that are trained on; each share is a separate fine-tuning of the original target.
        lr: learning rate of relearning (AdamW), or several, each of which is a separate fine-tuning.
        batch_size: rows per step of relearning.
        relearn_with: what relearning trains, of WITH: all weights, or a LoRA of rank 16 on all linear layers.
        relearn_on: what it trains on, of ON: benign rows, benign rows in the syntax of the forget prompts, harmful rows.
        quantizers: names in `quantize.known_quantizers()`.
        prefill_tokens: tokens of each row's own answer that the model has to continue.
        disguises: names in `rephrase.DISGUISES`; empty means all of them.
        candidates: most ways of abliterating or attenuating that are tried on validation prompts before the best is measured.

    Raises:
        ConfigError: names the first flag with an impossible value.
    """

    steps: tuple[int, ...] = (20, 40, 80, 200)  # on the lab, models that resist 80 steps no longer resist 200
    fractions: tuple[float, ...] = (0.05, 0.10, 0.25)
    lr: float | Sequence[float] = 1e-4
    batch_size: int = 8
    relearn_with: tuple[str, ...] = ("full",)
    relearn_on: tuple[str, ...] = ("benign", "harmful")
    quantizers: tuple[str, ...] = ("int8", "int4")
    prefill_tokens: int = 3
    disguises: tuple[str, ...] = ()
    candidates: int = 24

    def __post_init__(self) -> None:
        from sku_vllm.evaluate.attack.quantizers import check_quantizers  # imports torch, which reading the defaults for --help must not

        if not self.steps or min(self.steps) < 1:
            raise ConfigError(f"--steps {self.steps}: give step counts of at least 1, for instance 10,20,40,80")
        if not all(0 < share <= 1 for share in self.fractions):
            raise ConfigError(f"--fractions {self.fractions}: shares of the forget data, above 0 and at most 1")
        if not self.rates or min(self.rates) <= 0 or self.batch_size < 1 or self.prefill_tokens < 1 or self.candidates < 1:
            raise ConfigError("--lr must be above 0, --relearn-batch-size, --prefill-tokens and --candidates at least 1")
        for flag, names, known in (("with", self.relearn_with, WITH), ("on", self.relearn_on, ON)):
            if not names or set(names) - set(known):
                raise ConfigError(f"--relearn-{flag} {','.join(names)}: choose from {', '.join(known)}")
        check_quantizers(self.quantizers)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of relearning."""
        return (self.lr,) if isinstance(self.lr, int | float) else tuple(self.lr)
