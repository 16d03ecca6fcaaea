"""base − scale·delta, written as a checkpoint that loads like its base."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sku_vllm.adapter import load_adapter
from sku_vllm.checkpoint import CheckpointReader, checkpoint_directory
from sku_vllm.errors import ConfigError, RunError
from sku_vllm.fp8 import contents_of, find_scales
from sku_vllm.fuse_checks import check_device, check_flags, check_unquantised
from sku_vllm.fuse_report import FuseReport, build_manifest, build_report, write_card
from sku_vllm.load_kernel import load_kernel
from sku_vllm.manifest import combine, file_digest, read_key, verify_checkpoint, write_manifest
from sku_vllm.output import check_output, output_directory, record
from sku_vllm.placement import Placed, Scale, place
from sku_vllm.plain_copy import estimate_copy
from sku_vllm.safetensors_file import TensorInfo
from sku_vllm.shards import OutputShard, fingerprint, plan_shards
from sku_vllm.simulate import check_kinds
from sku_vllm.small_files import write_small_files
from sku_vllm.writer import ShardWriter, Written

__all__ = ["FuseReport", "fuse_checkpoint", "verify_checkpoint"]


def fuse_checkpoint(
    model: str | Path,
    adapters: Sequence[tuple[str | Path, Scale]],
    output: str | Path,
    *,
    dtype: str = "keep",
    untie: bool = False,
    fp8_scales: str = "keep",
    kinds: Sequence[str] = (),
    digests: bool = True,
    any_base: bool = False,
    as_is: bool = False,
    seed: int | None = None,
    device: str = "auto",
    signing_key: str | Path | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FuseReport:
    """Subtract adapters from a checkpoint and write the result, complete or not at all.

    Args:
        adapters: (directory, scale); a mapping of name patterns to numbers gives layers scales of their own.
        dtype: "keep" leaves every byte outside the edited tensors as it is; else floating tensors are cast.
        untie: write tied embeddings apart. fp8_scales: "keep" those of FP8 weights and count clips, or "recompute" them in a first pass.
        kinds: "int4", "int8", "fp8" to simulate. seed: stochastic rounding instead of nearest.
        device: "cpu", "cuda" (FP8 weights stay on the CPU), or "auto": the one that is measured to be faster.
        any_base, as_is: accept an adapter of another base, or a negated one. progress: called with bytes done and in all.
    Raises:
        InputError (and its children) before anything is written; RunError and SkuError for what goes wrong later.
    """
    output = check_output(output)
    check_flags(adapters, dtype)
    key = None if signing_key is None else read_key(signing_key)
    kinds = check_kinds(kinds)
    reader = CheckpointReader(checkpoint_directory(model, revision))
    before = fingerprint(shard.file for shard in reader.shards)
    loaded = [(load_adapter(path, as_is=as_is), scale) for path, scale in adapters]
    before |= fingerprint(adapter.file for adapter, _ in loaded)
    check_unquantised(reader, dtype, [adapter for adapter, _ in loaded])
    for adapter, _ in loaded:
        adapter.check_base(reader, any_base)
    placed = place(reader, loaded, untie=untie)
    began = time.perf_counter()
    backend = check_device(device)
    load_kernel(backend, reader, placed, dtype, seed)
    started = time.perf_counter()
    scales = find_scales(reader, placed, fp8_scales)
    shards = plan_shards(reader, placed, dtype, _untied_head(reader, placed) if untie else None, contents_of(scales.values()))
    _check_space(reader, shards, output)
    total, done = sum(shard.size for shard in shards), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    with output_directory(output) as partial, ThreadPoolExecutor(1) as aside:
        for thing, name in [(reader, "_identity"), *((adapter, "digest") for adapter, _ in loaded)]:
            aside.submit(getattr, thing, name)  # hashed while the disk is busy; kept by the property for the report
        pairs = {name: (scale.old, scale.new) for name, scale in scales.items()}
        writer = ShardWriter(partial, digests=digests, kinds=kinds, seed=seed, scales=pairs, backend=backend, progress=advance)
        written = writer.write(shards)
        _check_overflow(written, dtype)
        changed = [str(file.parent) for file, found in fingerprint(before).items() if found != before[file]]
        if changed:
            raise RunError(f"{changed[0]}: changed while it was read; nothing was written, start again when it is at rest")
        write_small_files(reader, partial, dtype, untie, shards)
        report = build_report(reader, loaded, output, dtype, shards, written, kinds, fp8_scales if scales else None)
        manifest = build_manifest(report, kinds, seed, backend.name)
        write_card(partial, report)
        if digests:
            manifest["files"] = _digests(partial, shards, written)
        write_manifest(partial, manifest, key)
        report.seconds, report.setup_seconds = round(time.perf_counter() - started, 3), round(started - began, 3)
        report.compare(estimate_copy(reader, partial))
        settings = {
            "model": str(model),
            "adapters": [[str(path), scale] for path, scale in adapters],
            "dtype": dtype,
            "untie": untie,
            "fp8_scales": fp8_scales,
            "simulate": list(kinds),
            "digests": digests,
            "any_base": any_base,
            "as_is": as_is,
            "seed": seed,
            "device": device,
            "revision": revision,
        }
        record(partial, "fuse", report.to_json(), settings)
    return report


def read_layer_scales(file: str | Path) -> dict[str, float]:
    """{regular expression: scale} from a JSON file. Raises ConfigError."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
        scales = {str(pattern): float(scale) for pattern, scale in value.items()}
        if not scales:
            raise ValueError("it is empty, so nothing would be subtracted")
        for pattern in scales:
            re.compile(pattern)
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, re.error) as error:
        raise ConfigError(f"--layer-scales {file}: expected a JSON object of regular expressions and numbers ({error})") from error
    return scales


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
            raise RunError(
                f"{name}: {count} merged weights are NaN or too large for their dtype; "
                "look for NaN in a dense adapter, else use a smaller --scale, or --dtype float32"
            )


def _digests(partial: Path, shards: Sequence[OutputShard], written: Written) -> dict[str, str]:
    known = {shard.file: combine([leaf for _, leaf in sorted(written.leaves.get(shard.file, {}).items())]) for shard in shards}
    names = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
    return {name: known.get(name) or file_digest(partial / name) for name in names}
