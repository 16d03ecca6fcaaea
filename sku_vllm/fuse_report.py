"""What fusing says about itself: the report that `--json` prints, its warnings, the manifest and the card."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.adapter import LoraAdapter
from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.fuse_checks import trained_on
from sku_vllm.kernels.delta_merge import MergeStats
from sku_vllm.output import write_text
from sku_vllm.placement import Scale
from sku_vllm.plain_copy import PlainCopy
from sku_vllm.shards import OutputShard
from sku_vllm.writer import Written

# Below this share of the edit a tensor is worth a warning.
ENOUGH = 0.9


@dataclass(slots=True)
class FuseReport:
    """What `sku fuse --json` prints.

    Attributes:
        tensors, bytes: edited tensors, and bytes written. seconds: wall time of reading, merging and writing.
        setup_seconds: before that, of choosing where to merge and loading the compiled kernel: compiled on a machine's first use.
        plain_copy: {"seconds", "sampled_bytes", "ratio"}: what copying the base takes here, estimated from a sample, and seconds over it.
        fp8_scales: "kept" or "recomputed"; None without FP8 weights among the edited ones.
        retained, noise: over all edited tensors together. per_tensor: {name: {"retained", "noise", …}}.
        simulated: {kind: {"retained", "noise"}} overall. warnings: lines for people.
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
    per_tensor: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    setup_seconds: float = 0.0
    plain_copy: dict[str, float] | None = None

    def compare(self, copy: PlainCopy | None) -> None:
        """Hold `seconds` against a plain copy."""
        if copy is not None:
            self.plain_copy = {**asdict(copy), "ratio": round(self.seconds / max(copy.seconds, 1e-3), 2)}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def build_report(
    reader: CheckpointReader,
    loaded: Sequence[tuple[LoraAdapter, Scale]],
    output: Path,
    dtype: str,
    shards: Sequence[OutputShard],
    written: Written,
    kinds: Sequence[str],
    fp8_scales: str | None = None,
) -> FuseReport:
    overall, per_tensor = MergeStats(), {}
    together = {kind: MergeStats() for kind in kinds}
    for name in sorted(written.merged):
        stats = written.totals(written.merged[name])
        overall.add(stats)
        per_tensor[name] = {"retained": stats.retained, "noise": stats.noise, "changed": stats.changed, "elements": stats.elements}
        for key in ("nonfinite", "clipped"):
            if getattr(stats, key):
                per_tensor[name][key] = getattr(stats, key)
        for kind in kinds:
            simulated = written.totals(written.simulated[kind][name])
            together[kind].add(simulated)
            per_tensor[name][kind] = {"retained": simulated.retained, "noise": simulated.noise}
    return FuseReport(
        output=str(output),
        base_identity=reader.identity(),
        adapters=[{"path": str(adapter.path), "digest": adapter.digest, "scale": scale} for adapter, scale in loaded],
        dtype=dtype,
        tensors=len(per_tensor),
        bytes=sum(shard.size for shard in shards),
        seconds=0.0,
        fp8_scales={"keep": "kept", "recompute": "recomputed", None: None}[fp8_scales],
        retained=overall.retained,
        noise=overall.noise,
        simulated={kind: {"retained": stats.retained, "noise": stats.noise} for kind, stats in together.items()},
        per_tensor=per_tensor,
        warnings=_quantised_training(loaded) + _warnings(per_tensor, together, fp8=fp8_scales is not None),
    )


def _quantised_training(loaded: Sequence[tuple[LoraAdapter, Scale]]) -> list[str]:
    return [
        f"{adapter.path}: was trained with its base in {trained_on(adapter)}; its edit belongs to the unquantised base, "
        "into which it is fused here; evaluate the result as you will serve it"
        for adapter, _ in loaded
        if trained_on(adapter)
    ]


def _warnings(per_tensor: Mapping[str, dict[str, Any]], together: Mapping[str, MergeStats], *, fp8: bool) -> list[str]:
    lines = []
    weak = [name for name, row in per_tensor.items() if row["retained"] is not None and row["retained"] < ENOUGH]
    if weak:
        worst = min(weak, key=lambda name: per_tensor[name]["retained"])
        lines.append(
            f"{len(weak)} tensors keep less than {ENOUGH:.0%} of the edit (worst: {worst}, {per_tensor[worst]['retained']:.0%}): it is "
            f"smaller than the spacing of their numbers; try {'the unquantised model' if fp8 else '--dtype float32'}, --stochastic, "
            "or a larger --scale"
        )
    for kind, stats in together.items():
        if stats.retained is not None and stats.retained < ENOUGH:
            left = f"{stats.retained:.0%} of the edit would be left (noise {stats.noise:.2f})"
            lines.append(f"quantised to {kind}, {left}; evaluate the quantised model before serving it")
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


def build_manifest(report: FuseReport, kinds: Sequence[str], seed: int | None, backend: str) -> dict[str, Any]:
    keys = ("retained", "noise", *kinds)
    return {
        "schema": "sku.manifest/1",
        "base_identity": report.base_identity,
        "adapters": [{"digest": adapter["digest"], "scale": adapter["scale"]} for adapter in report.adapters],
        "dtype": report.dtype,
        "rounding": "nearest" if seed is None else f"stochastic, seed {seed}",
        **({} if report.fp8_scales is None else {"fp8_scales": report.fp8_scales}),
        "backend": backend,
        "tensors": {name: {key: row[key] for key in keys if key in row} for name, row in report.per_tensor.items()},
    }


def write_card(partial: Path, report: FuseReport) -> None:
    lines = "".join(f"| `{adapter['digest'][:16]}…` | {adapter['scale']} |\n" for adapter in report.adapters)
    write_text(
        partial / "README.md",
        "# A checkpoint with knowledge subtracted\n\n"
        f"Written by `sku fuse`: base (identity `{report.base_identity[:16]}…`) minus\n\n| adapter digest | scale |\n|---|---|\n{lines}\n"
        "`sku verify` checks these files against `sku_manifest.json`, which also says how much of the edit survived rounding.\n"
        "Measure it with `sku eval` before you rely on it.\n",
    )
