"""base − scale·delta, written as a checkpoint that loads like its base."""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.adapter import LoraAdapter, load_adapter
from sku_vllm.checkpoint import INDEX, CheckpointReader, TensorInfo, checkpoint_directory
from sku_vllm.errors import CheckpointError, ConfigError, RunError
from sku_vllm.fp8 import scale_of_fp8
from sku_vllm.kernels.delta_merge import MergeStats
from sku_vllm.manifest import combine, file_digest, read_key, verify_checkpoint, write_manifest
from sku_vllm.output import check_output, output_directory, record, write_json, write_text
from sku_vllm.placement import Placed, Scale, place
from sku_vllm.shards import OutputShard, fingerprint, plan_shards
from sku_vllm.simulate import check_kinds
from sku_vllm.writer import ShardWriter, Written

__all__ = ["FuseReport", "fuse_checkpoint", "verify_checkpoint"]
DTYPE_CHOICES = ("keep", "float32", "bfloat16", "float16")
ENOUGH = 0.9
FP8_METHODS = ("fp8", "fbgemm_fp8", "modelopt")
# Weights in other formats, cards that describe the base, and what sku commands left there.
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")


@dataclass(slots=True)
class FuseReport:
    """What `sku fuse --json` prints.

    Attributes:
        tensors, bytes: edited tensors, and bytes written. seconds: wall time of reading, merging and writing.
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
    retained: float | None
    noise: float | None
    simulated: dict[str, dict[str, float | None]]
    per_tensor: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fuse_checkpoint(
    model: str | Path,
    adapters: Sequence[tuple[str | Path, Scale]],
    output: str | Path,
    *,
    dtype: str = "keep",
    untie: bool = False,
    kinds: Sequence[str] = (),
    digests: bool = True,
    any_base: bool = False,
    as_is: bool = False,
    seed: int | None = None,
    signing_key: str | Path | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FuseReport:
    """Subtract adapters from a checkpoint and write the result, complete or not at all.

    Args:
        adapters: (directory, scale); a mapping of name patterns to numbers gives layers scales of their own.
        dtype: "keep" leaves every byte outside the edited tensors as it is; else floating tensors are cast.
        untie: write tied embeddings apart. kinds: "int4", "int8", "fp8" to simulate. seed: stochastic rounding of bf16 instead of nearest.
        any_base, as_is: accept an adapter of another base, or a negated one. progress: called with bytes done and in all.
    Raises:
        InputError (and its children) before anything is written; RunError and SkuError for what goes wrong later.
    """
    output = check_output(output)
    _check_flags(adapters, dtype, signing_key)
    kinds = check_kinds(kinds)
    reader = CheckpointReader(checkpoint_directory(model, revision))
    check_unquantised(reader, dtype)
    before = fingerprint(reader)
    loaded = [(load_adapter(path, as_is=as_is), scale) for path, scale in adapters]
    for adapter, _ in loaded:
        adapter.check_base(reader, any_base)
    placed = place(reader, loaded, untie=untie)
    scales = {name: scale_of_fp8(reader, name) for name in placed if reader.info(name).dtype.startswith("F8")} if not untie else {}
    shards = plan_shards(reader, placed, dtype, _untied_head(reader, placed) if untie else None)
    _check_space(reader, shards, output)
    total, done = sum(shard.size for shard in shards), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    started = time.perf_counter()
    with output_directory(output) as partial, ThreadPoolExecutor(1) as aside:
        for thing, name in [(reader, "_identity"), *((adapter, "digest") for adapter, _ in loaded)]:
            aside.submit(getattr, thing, name)  # hashed while the disk is busy; kept by the property for the report
        writer = ShardWriter(partial, digests=digests, kinds=kinds, seed=seed, scales=scales, progress=advance)
        written = writer.write(shards)
        _check_overflow(written, dtype)
        if fingerprint(reader) != before:
            raise RunError(f"{reader.path}: changed while it was read; nothing was written, start again when it is at rest")
        _write_small_files(reader, partial, dtype, untie, shards)
        report = _report(reader, loaded, output, dtype, shards, written, kinds)
        manifest = _manifest(report, written, kinds, seed)
        _write_card(partial, report)
        if digests:
            manifest["files"] = _digests(partial, shards, written)
        write_manifest(partial, manifest, signing_key)
        report.seconds = round(time.perf_counter() - started, 3)
        settings = {
            "model": str(model),
            "adapters": [[str(path), scale] for path, scale in adapters],
            "dtype": dtype,
            "untie": untie,
            "simulate": list(kinds),
            "digests": digests,
            "any_base": any_base,
            "as_is": as_is,
            "seed": seed,
            "revision": revision,
        }
        record(partial, "fuse", report.to_json(), settings)
    return report


def read_layer_scales(file: str | Path) -> dict[str, float]:
    """{regular expression: scale} from a JSON file. Raises ConfigError."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
        scales = {str(pattern): float(scale) for pattern, scale in value.items()}
        for pattern in scales:
            re.compile(pattern)
    except (OSError, ValueError, TypeError, AttributeError, re.error) as error:
        raise ConfigError(f"--layer-scales {file}: expected a JSON object of regular expressions and numbers ({error})") from error
    return scales


def _check_flags(adapters: Sequence[tuple[str | Path, Scale]], dtype: str, signing_key: str | Path | None) -> None:
    if dtype not in DTYPE_CHOICES:
        raise ConfigError(f"--dtype {dtype}: unknown; choose from {', '.join(DTYPE_CHOICES)}")
    if not adapters:
        raise ConfigError("--adapter: give at least one adapter directory")
    for path, scale in adapters:
        for value in scale.values() if isinstance(scale, Mapping) else [scale]:
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"--adapter {path}: scale {value} must be a number ≥ 0; 1 subtracts exactly what was trained")
    if signing_key is not None:
        read_key(signing_key)


def check_unquantised(reader: CheckpointReader, dtype: str) -> None:
    """Refuse bases whose stored numbers are codes of the weights; FP8 ones are numbers and stay in their format. Raises CheckpointError."""
    settings = reader.config.get("quantization_config") or {}
    method = settings.get("quant_method")
    if method is None:
        return
    if method in FP8_METHODS or (method == "compressed-tensors" and settings.get("format") in ("float-quantized", "naive-quantized")):
        if dtype != "keep":
            raise CheckpointError(f"{reader.path}: is quantised to FP8, which --dtype {dtype} would mix with its scales; use --dtype keep")
        return
    raise CheckpointError(
        f"{reader.path}: is quantised ({method}), so an edit cannot be added to its weights; "
        "fuse into the unquantised model it was made from and quantise the result again"
    )


def _untied_head(reader: CheckpointReader, placed: dict[str, list[Placed]]) -> dict[str, TensorInfo]:
    """The output head as a tensor of its own, taking its values from the embedding it was tied to."""
    from sku_vllm.conversion import ModelNames

    names = ModelNames.of(reader)
    if names is None or not names.tied:
        raise ConfigError(f"--untie: the embeddings of {reader.path} are not tied; leave the flag out")
    return {head: reader.info(names.tied_source(head)) for head in names.tied if head not in reader}


def _check_space(reader: CheckpointReader, shards: Sequence[OutputShard], output: Path) -> None:
    """Holes of a sparse base stay holes, so what counts is what the base occupies."""
    base, planned = sum(shard.size for shard in reader.shards), sum(shard.size for shard in shards)
    occupied = sum(min(os.stat(shard.file).st_blocks * 512, shard.size) for shard in reader.shards)
    needed = int(occupied * planned / max(base, 1))
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise RunError(f"{output}: needs {needed / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB free; nothing was written there")


def _check_overflow(written: Written, dtype: str) -> None:
    for name, parts in written.merged.items():
        count = written.totals(parts).overflowed
        if count:
            raise RunError(f"{name}: {count} merged weights are too large for their dtype; use a smaller --scale, or --dtype float32")


def _write_small_files(reader: CheckpointReader, partial: Path, dtype: str, untie: bool, shards: Sequence[OutputShard]) -> None:
    """Config, tokenizer, generation config, chat template and licence as they are; config and index changed where the weights are."""
    if not reader.path.is_dir():
        return
    for file in sorted(reader.path.iterdir()):
        if (
            file.is_file()
            and not file.name.startswith(("sku_", "."))
            and not file.name.endswith((*NOT_COPIED, ".index.json"))
            and file.name != "README.md"
        ):
            shutil.copyfile(file, partial / file.name)
    for folder in ("additional_chat_templates",):
        if (reader.path / folder).is_dir():
            shutil.copytree(reader.path / folder, partial / folder)
    config = dict(reader.config)
    if dtype != "keep":
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = dtype
    if untie:
        config["tie_word_embeddings"] = False
    if config != reader.config:
        write_json(partial / "config.json", config)
    if reader.index is not None:
        _write_index(reader, partial, shards)


def _write_index(reader: CheckpointReader, partial: Path, shards: Sequence[OutputShard]) -> None:
    if all(tensor.dtype == tensor.source.dtype and tensor.name in reader for shard in shards for tensor in shard.tensors):
        shutil.copyfile(reader.path / INDEX, partial / INDEX)
        return
    names = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    size = sum(tensor.stop - tensor.start for shard in shards for tensor in shard.tensors)
    write_json(
        partial / INDEX, {"metadata": {**reader.index.get("metadata", {}), "total_size": size}, "weight_map": dict(sorted(names.items()))}
    )


def _report(
    reader: CheckpointReader,
    loaded: Sequence[tuple[LoraAdapter, Scale]],
    output: Path,
    dtype: str,
    shards: Sequence[OutputShard],
    written: Written,
    kinds: Sequence[str],
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
        for kind in kinds if name in written.simulated.get(kinds[0] if kinds else "", {}) else ():  # FP8 weights are what they are
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
        retained=overall.retained,
        noise=overall.noise,
        simulated={kind: {"retained": stats.retained, "noise": stats.noise} for kind, stats in together.items()},
        per_tensor=per_tensor,
        warnings=_warnings(per_tensor, together, dtype),
    )


def _warnings(per_tensor: Mapping[str, dict[str, Any]], together: Mapping[str, MergeStats], dtype: str) -> list[str]:
    lines = []
    weak = [name for name, row in per_tensor.items() if row["retained"] is not None and row["retained"] < ENOUGH]
    if weak:
        worst = min(weak, key=lambda name: per_tensor[name]["retained"])
        lines.append(
            f"{len(weak)} tensors keep less than {ENOUGH:.0%} of the edit (worst: {worst}, {per_tensor[worst]['retained']:.0%}): it is "
            "smaller than the spacing of their numbers; try --dtype float32, --stochastic, or a larger --scale"
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
            f"{clipped} FP8 weights ran into the limit of their kept scale; use a smaller --scale, or fuse into the unquantised model"
        )
    return lines


def _manifest(report: FuseReport, written: Written, kinds: Sequence[str], seed: int | None) -> dict[str, Any]:
    keys = ("retained", "noise", *kinds)
    return {
        "schema": "sku.manifest/1",
        "base_identity": report.base_identity,
        "adapters": [{"digest": adapter["digest"], "scale": adapter["scale"]} for adapter in report.adapters],
        "dtype": report.dtype,
        "rounding": "nearest" if seed is None else f"stochastic, seed {seed}",
        "backend": "torch-cpu",
        "tensors": {name: {key: row[key] for key in keys if key in row} for name, row in report.per_tensor.items()},
    }


def _digests(partial: Path, shards: Sequence[OutputShard], written: Written) -> dict[str, str]:
    known = {shard.file: combine([leaf for _, leaf in sorted(written.leaves.get(shard.file, {}).items())]) for shard in shards}
    names = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
    return {name: known.get(name) or file_digest(partial / name) for name in names}


def _write_card(partial: Path, report: FuseReport) -> None:
    lines = "".join(f"| `{adapter['digest'][:16]}…` | {adapter['scale']} |\n" for adapter in report.adapters)
    write_text(
        partial / "README.md",
        "# A checkpoint with knowledge subtracted\n\n"
        f"Written by `sku fuse`: base (identity `{report.base_identity[:16]}…`) minus\n\n| adapter digest | scale |\n|---|---|\n{lines}\n"
        "`sku verify` checks these files against `sku_manifest.json`, which also says how much of the edit survived rounding.\n"
        "Measure it with `sku eval` before you rely on it.\n",
    )
