"""The report of a fusion (what `--json` prints) with its warnings, and the manifest and README of the fused checkpoint.

Open this file to change a warning, or a number that is reported about a fused checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.adapter.adapter import LoraAdapter
from sku_vllm.fuse.check_quantisers import CALIBRATED
from sku_vllm.fuse.companion_files import left_behind
from sku_vllm.fuse.copy_baseline import PlainCopy
from sku_vllm.fuse.fuse_request import FuseRequest
from sku_vllm.fuse.shard_plan import FusePlan
from sku_vllm.fuse.shard_writer import Written
from sku_vllm.fuse.sources import Sources
from sku_vllm.kernels.delta_merge import MergeStats
from sku_vllm.output import write_text

# Tensors that keep less than this share of their edit (`retained`) get a warning.
ENOUGH = 0.9


@dataclass(slots=True)
class FuseReport:
    """What `sku fuse --json` prints.

    Attributes:
        tensors, bytes: edited tensors, and bytes written. seconds: wall time of reading, merging and writing.
        setup_seconds: before that, to choose a backend and load its kernel, which is compiled on a machine's first use.
        plain_copy: {"seconds", "sampled_bytes", "ratio"}: see `PlainCopy`; ratio is the report's seconds / plain_copy's seconds.
        fp8_scales: "kept" or "recomputed"; None without FP8 weights among the edited ones.
        retained, noise: of all edited tensors together (see `MergeStats`). per_tensor: {name: {"retained", "noise", …}}.
        simulated, checked: {kind: {"retained", "noise"}} overall, by an estimate and by quantisers of record. warnings: lines for people.
    """

    output: str
    base_identity: str
    adapters: list[dict[str, Any]]
    dtype: str
    tensors: int
    bytes: int
    seconds: float
    fp8_scales: str | None
    retained: float | None
    noise: float | None
    simulated: dict[str, dict[str, float | None]]
    checked: dict[str, dict[str, float | None]]
    per_tensor: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    setup_seconds: float = 0.0
    plain_copy: dict[str, float] | None = None

    def compare(self, copy: PlainCopy | None) -> None:
        """Set `plain_copy`: the copy's time, and the ratio of `seconds` to it."""
        if copy is not None:
            self.plain_copy = {**asdict(copy), "ratio": round(self.seconds / max(copy.seconds, 1e-3), 2)}

    def add_check(self, kind: str, stats: Mapping[str, MergeStats]) -> None:
        """Add what a calibrated quantiser leaves of the edit. stats: by tensor; of those that it measured."""
        together = MergeStats()
        for name in sorted(stats):
            together.add(stats[name])
            self.per_tensor[name][kind] = {"retained": stats[name].retained, "noise": stats[name].noise}
        self.checked[kind] = {"retained": together.retained, "noise": together.noise}
        self.warnings += _quantised_warning(kind, together)
        if len(stats) < self.tensors:
            self.warnings.append(f"--check {kind}: measured on {len(stats)} of {self.tensors} edited tensors, those of linear layers")

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)


def report_fusion(request: FuseRequest, output: Path, sources: Sources, plan: FusePlan, written: Written) -> FuseReport:
    """The report of what was written to `output`; times are added later."""
    overall = MergeStats()
    per_tensor: dict[str, dict[str, Any]] = {}
    together = {kind: MergeStats() for kind in (*request.simulate, *request.check) if kind not in CALIBRATED}
    for name in sorted(written.merged):
        stats = written.totals(written.merged[name])
        overall.add(stats)
        per_tensor[name] = _row(stats)
        for kind in together:
            simulated = written.totals(written.simulated[kind][name])
            together[kind].add(simulated)
            per_tensor[name][kind] = {"retained": simulated.retained, "noise": simulated.noise}
    fp8 = bool(plan.scales)
    scales = [scale for _, scale in request.adapters]
    return FuseReport(
        output=str(output),
        base_identity=sources.reader.identity(),
        adapters=[
            {"path": str(adapter.path), "digest": adapter.digest, "scale": scale}
            for adapter, scale in zip(sources.adapters, scales, strict=True)
        ],
        dtype=request.dtype,
        tensors=len(per_tensor),
        bytes=plan.size,
        seconds=0.0,
        fp8_scales={"keep": "kept", "recompute": "recomputed"}[request.fp8_scales] if fp8 else None,
        retained=overall.retained,
        noise=overall.noise,
        simulated={kind: {"retained": together[kind].retained, "noise": together[kind].noise} for kind in request.simulate},
        checked={kind: {"retained": together[kind].retained, "noise": together[kind].noise} for kind in request.check if kind in together},
        per_tensor=per_tensor,
        warnings=_left_behind(sources) + _quantised_training(sources.adapters) + _warnings(per_tensor, together, fp8=fp8),
    )


def _row(stats: MergeStats) -> dict[str, Any]:
    """One tensor's row of the report; counts that are zero on a sound base are left out."""
    row: dict[str, Any] = {"retained": stats.retained, "noise": stats.noise, "changed": stats.changed, "elements": stats.elements}
    return row | {key: getattr(stats, key) for key in ("nonfinite", "clipped") if getattr(stats, key)}


def _left_behind(sources: Sources) -> list[str]:
    reader = sources.reader
    if not reader.path.is_dir() and (reader.directory / "config.json").is_file():
        return [
            f"{reader.path} is one file: config.json and tokenizer beside it are not copied, and nothing loads weights alone as a model"
        ]
    return [
        f"{name} of {sources.reader.path} was left behind: with it, loaders would look for an adapter in the fused checkpoint"
        for name in left_behind(sources.reader)
    ]


def _quantised_training(adapters: Sequence[LoraAdapter]) -> list[str]:
    return [
        f"{adapter.path}: was trained with its base in {adapter.quantised_base}; its edit belongs to the unquantised base, "
        "into which it is fused here; evaluate the result as you will serve it"
        for adapter in adapters
        if adapter.quantised_base
    ]


def _warnings(per_tensor: Mapping[str, dict[str, Any]], together: Mapping[str, MergeStats], *, fp8: bool) -> list[str]:
    lines = []
    if per_tensor and all(row["retained"] is None for row in per_tensor.values()):
        lines.append(
            "the edit is zero everywhere, so this is the base again: the adapter was never trained, or its scale or lora_alpha is 0"
        )
    weak = [name for name, row in per_tensor.items() if row["retained"] is not None and row["retained"] < ENOUGH]
    if weak:
        worst = min(weak, key=lambda name: per_tensor[name]["retained"])
        lines.append(
            f"{len(weak)} tensors keep less than {ENOUGH:.0%} of the edit (worst: {worst}, {per_tensor[worst]['retained']:.0%}): it is "
            f"smaller than the spacing of their numbers; try {'the unquantised model' if fp8 else '--dtype float32'}, --stochastic, "
            "or a larger --scale"
        )
    for kind, stats in together.items():
        lines += _quantised_warning(kind, stats)
    broken = [name for name, row in per_tensor.items() if row.get("nonfinite")]
    if broken:
        lines.append(f"the base holds NaN or infinity in {', '.join(broken[:5])}; those elements were left out of the sums")
    clipped = sum(row.get("clipped", 0) for row in per_tensor.values())
    if clipped:
        lines.append(
            f"{clipped} FP8 weights ran into the limit of their kept scale; use --fp8-scales recompute, a smaller --scale, "
            "or fuse into the unquantised model"
        )
    return lines


def _quantised_warning(kind: str, stats: MergeStats) -> list[str]:
    if stats.retained is None or stats.retained >= ENOUGH:
        return []
    left = f"{stats.retained:.0%} of the edit would be left (noise {stats.noise:.2f})"
    return [f"quantised to {kind}, {left}; evaluate the quantised model before serving it"]


def build_manifest(report: FuseReport, request: FuseRequest, backend: str) -> dict[str, Any]:
    """The manifest without its digests of files. It has no times and no paths, so that the same inputs give the same bytes."""
    keys = ("retained", "noise", *request.simulate, *request.check)
    return {
        "schema": "sku.manifest/1",
        "base_identity": report.base_identity,
        "adapters": [{"digest": adapter["digest"], "scale": adapter["scale"]} for adapter in report.adapters],
        "dtype": report.dtype,
        "rounding": "nearest" if request.seed is None else f"stochastic, seed {request.seed}",
        **({} if report.fp8_scales is None else {"fp8_scales": report.fp8_scales}),
        "backend": backend,
        "tensors": {name: {key: row[key] for key in keys if key in row} for name, row in report.per_tensor.items()},
    }


def write_card(partial: Path, report: FuseReport) -> None:
    """README.md of the checkpoint: what was subtracted from what, and that the edit can be computed from both."""
    lines = "".join(f"| `{adapter['digest'][:16]}…` | {adapter['scale']} |\n" for adapter in report.adapters)
    write_text(
        partial / "README.md",
        "# A checkpoint with knowledge subtracted\n\n"
        f"Written by `sku fuse`: base (identity `{report.base_identity[:16]}…`) minus\n\n| adapter digest | scale |\n|---|---|\n{lines}\n"
        "`sku verify` checks these files against `sku_manifest.json`, which also says how much of the edit survived rounding.\n"
        "Measure it with `sku eval` before you rely on it.\n\n"
        "Whoever has both the base and this checkpoint can subtract one from the other and so recover the harmful knowledge that was\n"
        "taken out: where the base is public, that is anyone you hand this checkpoint to.\n",
    )
