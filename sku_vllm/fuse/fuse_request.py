"""FuseRequest: the checked settings of one fusion, which the command line, the demo and Python callers all make.

Open this file to add an option of fusing, or to see what `sku_fuse.json` records under "config".
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku_vllm.adapter.placement import Scale
from sku_vllm.errors import ConfigError
from sku_vllm.fuse.calibrated_quantisers import check_installed
from sku_vllm.fuse.check_quantisers import CALIBRATED, check_names
from sku_vllm.quantize import check_kinds

DTYPES = ("keep", "float32", "bfloat16", "float16")
FP8_SCALES = ("keep", "recompute")


@dataclass(frozen=True, slots=True)
class FuseRequest:
    """base − Σ scale·delta, to be written as a checkpoint.

    Attributes:
        model: directory or hub id of the base.
        adapters: (directory, scale) of each adapter. A scale is a number, or {regular expression of weight names: number}.
        output: directory to write; absent or empty.
        dtype: "keep" leaves every byte outside the edited tensors as it is; "float32", "bfloat16" or "float16" casts floating tensors.
        untie: write tied input and output embeddings apart.
        fp8_scales: "keep" those of FP8 weights and count what they clip, or "recompute" them in a first pass.
        simulate: quantisers ("int4", "int8", "fp8"); the report says how much of the edit would be left after each.
        check: quantisers of record ("nf4", "gguf:Q8_0", "gptq", …); the same, by the code that people quantise with.
        calibrate: rows on whose text "gptq" and "awq" are calibrated, such as the retain set.
        digests: put the digest of every file into the manifest.
        seed: of stochastic rounding; None rounds to nearest.
        device: where weights are merged: "cpu", "cuda" (FP8 weights stay on the CPU), or "auto": the faster one, which is measured.
        signing_key: key file for an HMAC-SHA256 of the manifest; its path is not recorded.
        revision: of a hub id; None takes the hub's default branch.
        any_base: accept an adapter that was trained on another base.
        as_is: accept an adapter that is already negated (subtracting it puts the knowledge back).

    Raises:
        ConfigError: no adapter, a scale that is no number ≥ 0, or an unknown dtype, FP8 choice or quantiser.
    """

    model: str | Path
    adapters: Sequence[tuple[str | Path, Scale]]
    output: str | Path
    dtype: str = "keep"
    untie: bool = False
    fp8_scales: str = "keep"
    simulate: Sequence[str] = ()
    check: Sequence[str] = ()
    calibrate: str | Path | None = None
    digests: bool = True
    seed: int | None = None
    device: str = "auto"
    signing_key: str | Path | None = None
    revision: str | None = None
    any_base: bool = False
    as_is: bool = False

    def __post_init__(self) -> None:
        _check_choice("--dtype", self.dtype, DTYPES)
        _check_choice("--fp8-scales", self.fp8_scales, FP8_SCALES)
        if not self.adapters:
            raise ConfigError("--adapter: give at least one adapter directory")
        for path, scale in self.adapters:
            for value in scale.values() if isinstance(scale, Mapping) else [scale]:
                if not math.isfinite(value) or value < 0:
                    raise ConfigError(f"--adapter {path}: scale {value} must be a number ≥ 0; 1 subtracts exactly what was trained")
        object.__setattr__(self, "adapters", tuple(self.adapters))
        object.__setattr__(self, "simulate", check_kinds(self.simulate))
        object.__setattr__(self, "check", check_names(self.check))
        calibrated = [kind for kind in self.check if kind in CALIBRATED]
        for kind in calibrated:
            check_installed(kind, "--check")
            if self.calibrate is None:
                raise ConfigError(f"--check {kind}: is calibrated on text; give some rows with --calibrate FILE, such as the retain set")
        if self.calibrate is not None and not calibrated:
            raise ConfigError(f"--calibrate: nothing here is calibrated on text; it goes with --check {' or '.join(CALIBRATED)}")

    def to_json(self) -> dict[str, Any]:
        """The configuration that `sku_fuse.json` records: what affects the result, without the output's path and the signing key."""
        return {
            "model": str(self.model),
            "adapters": [[str(path), scale] for path, scale in self.adapters],
            "dtype": self.dtype,
            "untie": self.untie,
            "fp8_scales": self.fp8_scales,
            "simulate": list(self.simulate),
            **({"check": list(self.check)} if self.check else {}),
            **({"calibrate": str(self.calibrate)} if self.calibrate is not None else {}),
            "digests": self.digests,
            "any_base": self.any_base,
            "as_is": self.as_is,
            "seed": self.seed,
            "device": self.device,
            "revision": self.revision,
        }


def read_layer_scales(file: str | Path, flag: str = "--layer-scales") -> dict[str, float]:
    """{regular expression: number} from the JSON file that `flag` names.

    Raises:
        ConfigError: it is no such object, is empty, or holds an invalid expression.
    """
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
        scales = {str(pattern): float(scale) for pattern, scale in value.items()}
        if not scales:
            raise ValueError("it is empty")
        for pattern in scales:
            re.compile(pattern)
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, re.error) as error:
        raise ConfigError(f"{flag} {file}: expected a JSON object of regular expressions and numbers ({error})") from error
    return scales


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} {value}: unknown; choose from {', '.join(choices)}")
