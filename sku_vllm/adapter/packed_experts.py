"""Factors of packed experts (PEFT's `target_parameters`), which PEFT saves flattened over experts, and in two orientations.

For a parameter [experts, m, n] a release wrote either A [rank·experts, n] and B [m, rank·experts], or A [rank·experts, m] and
B [n, rank·experts]. Which one depends on the release and on whether the model stores its experts as [experts, in, out]
(`is_transposed`). Shapes tell them apart unless m = n. Open this file when PEFT changes that layout again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sku_vllm.adapter.delta import LowRank
from sku_vllm.adapter.peft_format import rank_and_scaling

# Whether B's rows are the parameter's second dimension, by `is_transposed`, in each generation of PEFT (peft/tuners/lora/layer.py).
RowsFirst = Callable[[bool], bool]
GENERATIONS: dict[str, RowsFirst] = {
    "≤ 0.18.1": lambda transposed: False,
    "0.19.0": lambda transposed: transposed,
    "≥ 0.19.1": lambda transposed: not transposed,
}
TODAY = "≥ 0.19.1"


class PackedParameter(NamedTuple):
    """A targeted parameter and the factors that the adapter holds for it. transposed: see the module's docstring."""

    name: str
    shape: tuple[int, ...]
    transposed: bool
    factors: LowRank

    def fits(self, rows_first: bool) -> bool:
        """Whether the factors' shapes are those of this orientation."""
        outer = self.shape[-2:] if rows_first else self.shape[:-3:-1]
        return (self.factors.b.shape[0], self.factors.a.shape[1]) == tuple(outer)


def unpack(parameters: Sequence[PackedParameter], config: Mapping[str, Any], problems: list[str]) -> Iterator[tuple[str, LowRank]]:
    """(name, factors) of each parameter, as [experts, …] in the parameter's orientation; appends to `problems` what cannot be told.

    Args:
        config: adapter_config.json, whose `peft_version` says how square experts are meant.
    """
    rules = _rules(parameters, config)
    for parameter in parameters:
        rank, scaling = rank_and_scaling(config, parameter.name)
        a, b = parameter.factors.a, parameter.factors.b
        experts = parameter.shape[0] if len(parameter.shape) == 3 else 1
        if a.shape[0] != rank * experts or b.shape[1] != rank * experts:
            problems.append(f"{parameter.name}: factors {list(b.shape)}·{list(a.shape)} are not of rank {rank} for {experts} experts")
            continue
        if len(parameter.shape) != 3:
            yield parameter.name, LowRank(a, b, scaling)
            continue
        readings = {rule(parameter.transposed) for rule in rules}
        if len(readings) != 1:
            problems.append(_unclear(parameter, config.get("peft_version"), bool(readings)))
            continue
        stacked = LowRank(a.reshape(experts, rank, -1), b.reshape(b.shape[0], rank, experts).permute(2, 0, 1), scaling)
        yield parameter.name, stacked if readings.pop() else stacked.transposed


def misread(parameters: Sequence[PackedParameter], config: Mapping[str, Any]) -> list[str]:
    """Names of the parameters whose factors today's PEFT takes for those of the transposed parameter, or may so take them."""
    rules = _rules(parameters, config)
    packed = [parameter for parameter in parameters if len(parameter.shape) == 3]
    return [each.name for each in packed if {rule(each.transposed) for rule in rules} != {GENERATIONS[TODAY](each.transposed)}]


def _rules(parameters: Sequence[PackedParameter], config: Mapping[str, Any]) -> list[RowsFirst]:
    """How the factors can be meant: as the release says that is recorded, or else in every way in which all of them fit."""
    packed = [parameter for parameter in parameters if len(parameter.shape) == 3]
    possible = {generation: rule for generation, rule in GENERATIONS.items() if all(each.fits(rule(each.transposed)) for each in packed)}
    said = _generation(config.get("peft_version"))
    return [possible[said]] if said in possible else list(possible.values())


def _unclear(parameter: PackedParameter, version: Any, square: bool) -> str:
    if not square:
        factors = f"{list(parameter.factors.b.shape)}·{list(parameter.factors.a.shape)}"
        return f"{parameter.name}: factors {factors}, but it is {list(parameter.shape)}"
    return (
        f"{parameter.name}: is square, and releases of PEFT store such experts either way round; adapter_config.json says peft_version "
        f"{version!r}, so set it there to the release that trained the adapter"
    )


def _generation(version: Any) -> str | None:
    """The generation of a release; None where it is not recorded, or a development version from between two generations."""
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(str(version).partition("@")[0])
    except InvalidVersion:
        return None
    if release <= Version("0.18.1"):
        return "≤ 0.18.1"
    if release >= Version("0.19.1"):
        return TODAY
    return "0.19.0" if release == Version("0.19.0") else None
