"""Choose the scale: least harm, greedy and sampled, within limits on utility, the trained scale where that is a matter of noise. Trade-off
curves are not monotone, so all are measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.data import Row
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.config import EvalConfig
from sku_vllm.evaluate.evaluate import adapter_off
from sku_vllm.evaluate.limits import SCALES, Limits, choose, clearly_less_harm
from sku_vllm.evaluate.measurement import measure
from sku_vllm.evaluate.unfinished import place
from sku_vllm.judges import Judge, load_judge
from sku_vllm.model import attach_adapter, load_model, load_tokenizer, set_scale

Sets = tuple[Mapping[str, Sequence[Row]], Sequence[Row]]


@dataclass(slots=True)
class TuneReport:
    """scale: the choice, None when nothing qualifies. curve: one eval object a scale, with what exceeds its limit.

    layers: after a per-layer search, each layer's factor on `scale`. test: base and choice on data it was not chosen on.
    """

    scale: float | None
    curve: list[dict[str, Any]]
    base: dict[str, Any]
    test: dict[str, Any] | None = None
    layers: dict[str, float] | None = None
    layer_trials: list[dict[str, Any]] = field(default_factory=list)

    @property
    def qualifies(self) -> bool:
        return self.scale is not None

    def to_json(self) -> dict[str, Any]:
        document = {"scale": self.scale, "qualifies": self.qualifies, "curve": self.curve, "base": self.base}
        if self.layers is not None:
            document |= {"layers": self.layers, "layer_trials": self.layer_trials}
        return document | ({"test": self.test} if self.test else {})


def tune_scale(
    model: str | Path,
    adapter: str | Path,
    *,
    forget: Mapping[str, Sequence[Row]],
    retain: Sequence[Row],
    judge: Judge | str,
    limits: Limits = Limits(),
    scales: Sequence[float] = SCALES,
    config: EvalConfig = EvalConfig(),
    test: Sets | None = None,
    per_layer: bool = False,
    dtype: str = "auto",
    revision: str | None = None,
    any_base: bool = False,
    as_is: bool = False,
    kept: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> TuneReport:
    """Measure base − scale·delta at every scale and choose.

    Args:
        test: forget sets and retain set on which base and choice are measured once more.
        per_layer: from the best scale on, try each third of the layers weaker and stronger.
        kept: a directory for answers and verdicts, so that an interrupted search continues there.
        progress: called with one line before each measurement.
    """
    scales = check_scales(scales)
    judge = load_judge(judge) if isinstance(judge, str) else judge
    tokenizer = load_tokenizer(str(model), revision)
    loaded = attach_adapter(load_model(str(model), dtype=dtype, revision=revision), str(adapter), 0.0, any_base=any_base, as_is=as_is)

    def measured(scale: float, layers: Mapping[str, float] | None = None, sets: Sets = (forget, retain)) -> dict[str, Any]:
        set_scale(loaded, scale)
        if layers:
            from sku_vllm.evaluate.per_layer import scale_layers

            scale_layers(loaded, scale, layers)
        off = adapter_off(loaded, scale, config)
        here = place(kept, scale, layers, sets is test)
        found = measure(loaded, tokenizer, forget=sets[0], retain=sets[1], judge=judge, reference=off, config=config, kept=here)
        return found.to_json()

    progress("measuring the base")
    base = measured(0.0)
    if any(share["harmful"] is None for modes in base["forget"].values() for share in modes.values()):
        raise ConfigError(f"--judge {judge.name}: has no opinion on harm, so no scale is better than another; use lexicon:, hf: or openai:")
    for key, field_name in (("perplexity_ratio", "response"), ("qa_accuracy", "must_contain")):
        if base["retain"][key] is None:
            progress(f"warning: no retain row has {field_name!r}, so nothing limits what a scale may cost in {key.replace('_', ' ')}")
    curve = []
    for scale in scales:
        progress(f"measuring scale {scale:g}")
        found = measured(scale)
        curve.append({"scale": scale, **found, "excess": limits.excess(found, base)})
    best = choose(curve)
    report = TuneReport(best["scale"] if best else None, curve, base)
    if per_layer and report.qualifies:
        from sku_vllm.evaluate.per_layer import layer_groups, layers_of

        _search_layers(report, layer_groups(layers_of(loaded)), measured, limits, progress)
    if test and report.qualifies:
        progress("measuring the choice on test data")
        report.test = {"base": measured(0.0, sets=test), **measured(report.scale, report.layers, test)}
    return report


def check_scales(scales: Sequence[float]) -> list[float]:
    """Different, finite and not negative, in rising order."""
    if not scales:
        raise ConfigError("--scales: name at least one, for instance --scales 0.5,1.0")
    for scale in scales:
        if not (math.isfinite(scale) and scale >= 0):
            raise ConfigError(f"--scales {scale}: must be numbers of at least 0; the sign of the negation is built in")
    return sorted(set(scales))


def _search_layers(
    report: TuneReport, groups: list[list[str]], measured: Callable[..., dict[str, Any]], limits: Limits, progress: Callable[[str], None]
) -> None:
    """One pass over the groups of layers, first to last, keeping a factor whenever it leaves clearly less harm."""
    from sku_vllm.evaluate.per_layer import FACTORS

    layers = {layer: 1.0 for group in groups for layer in group}
    best = next(point for point in report.curve if point["scale"] == report.scale)
    for group in groups:
        for factor in FACTORS:
            trial = {**layers, **dict.fromkeys(group, factor)}
            progress(f"measuring layers {group[0]}–{group[-1]} at {factor:g} of scale {report.scale:g}")
            found = measured(report.scale, trial)
            excess = limits.excess(found, report.base)
            report.layer_trials.append({"layers": trial, **found, "excess": excess})
            if not excess and clearly_less_harm(found, best):
                best, layers = found, trial
    report.layers = layers
