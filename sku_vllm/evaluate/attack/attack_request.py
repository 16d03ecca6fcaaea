"""The request of `sku attack`: all its inputs, built from flags, from a YAML file or in Python."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sku_vllm.evaluate.attack.attack_config import AttackConfig
from sku_vllm.evaluate.attack.kinds import chosen_kinds
from sku_vllm.evaluate.measure_request import MeasureRequest, Source, source_name


@dataclass(frozen=True, slots=True)
class AttackRequest(MeasureRequest):
    """A model measured before and under attack; see MeasureRequest for the fields it shares with eval and tune.

    Attributes:
        kinds: which attacks, or `all`.
        relearn: harmful rows an attacker may have; prompts that are trained on are left out of the measurements afterwards.
        relearn_topics: words of which a prompt names its topic; only rows that name one are trained on, only prompts that name none are
            measured after relearning. The rows are those of `relearn`, or else those of the forget sets that have answers.
        benign: rows for benign fine-tuning; None means the retain rows with answers.
        settings: the settings of each kind.

    Raises:
        ConfigError: an unknown kind; see also MeasureRequest.
    """

    kinds: Sequence[str] = field(kw_only=True)
    relearn: Source | None = None
    relearn_topics: Sequence[str] = ()
    benign: Source | None = None
    settings: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        MeasureRequest.__post_init__(self)  # super() does not work in a dataclass with slots
        object.__setattr__(self, "kinds", chosen_kinds(self.kinds, based=self.model.reference is not None))

    def to_json(self) -> dict[str, Any]:
        """The configuration in sku_attack.json."""
        settings = self.settings
        return MeasureRequest.to_json(self) | {
            "relearn": source_name(self.relearn),
            "relearn_topics": list(self.relearn_topics),
            "relearn_with": list(settings.relearn_with),
            "relearn_on": list(settings.relearn_on),
            "candidates": settings.candidates,
            "benign": source_name(self.benign),
            "steps": list(settings.steps),
            "fractions": list(settings.fractions),
            "lr": settings.rates[0] if len(settings.rates) == 1 else list(settings.rates),
            "relearn_batch_size": settings.batch_size,
            "quantizer": list(settings.quantizers),
            "prefill_tokens": settings.prefill_tokens,
            "kinds": list(self.kinds),
        }
