"""The request of `sku tune`: all its inputs, built from flags, from a YAML file or in Python."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.limits import SCALES, Limits
from sku_vllm.evaluate.measure_request import MeasureRequest, Questions, Source, source_name
from sku_vllm.judges import Judge


@dataclass(frozen=True, slots=True)
class TuneRequest(MeasureRequest):
    """A search for the scale that does the least harm within limits; see MeasureRequest for the fields it shares with eval and attack.

    Attributes:
        limits: what the negated model may cost.
        scales: the scales to measure; None means SCALES.
        per_layer: after choosing a scale, try weaker and stronger subtraction in each third of the layers.
        test_forget: forget sets on which base and chosen scale are measured at the end; needs `test_retain`.
        test_retain: the retain set of that measurement; needs `test_forget`.

    Raises:
        ConfigError: no adapter, a scale or base in the model, a scale that is negative or not finite, or only half of the test data.
    """

    limits: Limits = Limits()
    scales: Sequence[float] | None = None
    per_layer: bool = False
    test_forget: Mapping[str, Source] = field(default_factory=dict)
    test_retain: Source | None = None

    def __post_init__(self) -> None:
        MeasureRequest.__post_init__(self)  # super() does not work in a dataclass with slots
        if self.model.adapter is None:
            raise ConfigError("--adapter: is missing; give the adapter whose scale tune should choose")
        if self.model.scale is not None or self.model.base is not None:
            raise ConfigError("tune chooses the scale, and compares with the model itself; leave --scale and --base out")
        if bool(self.test_forget) != (self.test_retain is not None):
            raise ConfigError("--test-forget and --test-retain belong together; give both or neither")
        check_scales(self.measured_scales)

    @property
    def measured_scales(self) -> Sequence[float]:
        """The scales to measure, in the order given."""
        return SCALES if self.scales is None else self.scales

    def test_questions(self, judge: Judge) -> Questions | None:
        """The rows of the test data; None without any. Raises DataError as `questions` does."""
        if self.test_retain is None:
            return None
        forget = {name: self.read(source, "forget", name) for name, source in self.test_forget.items()}
        return self.fitting(Questions(forget, self.read(self.test_retain, "retain", safe=True), judge))

    def to_json(self) -> dict[str, Any]:
        """The configuration in sku_tune.json."""
        shared = MeasureRequest.to_json(self)
        return {key: value for key, value in shared.items() if key not in ("scale", "base")} | {
            **{f"max_{name}": limit for name, limit in asdict(self.limits).items()},
            "scales": None if self.scales is None else list(self.scales),
            "per_layer": self.per_layer,
            "test_forget": {name: source_name(source) for name, source in self.test_forget.items()},
            "test_retain": source_name(self.test_retain),
        }


def check_scales(scales: Sequence[float]) -> list[float]:
    """The scales without repetition, in rising order.

    Raises:
        ConfigError: there are none, or one is negative or not finite.
    """
    if not scales:
        raise ConfigError("--scales: name at least one, for instance --scales 0.5,1.0")
    for scale in scales:
        if not (math.isfinite(scale) and scale >= 0):
            raise ConfigError(f"--scales {scale}: must be numbers of at least 0; the sign of the negation is built in")
    return sorted(set(scales))
