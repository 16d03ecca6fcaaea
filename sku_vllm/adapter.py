"""A task vector on disk, read as deltas keyed by base weight name, and negated into an adapter that is meant to be added.

Two forms: a PEFT LoRA directory, whose delta is scaling·B@A, and a dense one (`task_vector.safetensors`, a tensor per base weight).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.checkpoint_files import check_files
from sku_vllm.delta import Dense, LowRank
from sku_vllm.errors import AdapterError, CheckpointError, ConfigError
from sku_vllm.output import json_text, output_directory, record, write_text
from sku_vllm.peft_format import FACTOR, WEIGHTS, check_config, read_factors

if TYPE_CHECKING:
    import torch

DENSE, RUN = "task_vector.safetensors", "sku_run.json"


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter directory.

    Attributes:
        path: where it lies. run: its sku_run.json ({} when another tool made it). config: its adapter_config.json ({} when dense).
        deltas: base weight name (as transformers names parameters) to `LowRank` or `Dense`.
        stacks: module name to the factors of PEFT's `target_parameters`, innermost wrapper first (packed experts).
        copies: untouched base weights that PEFT stored along (embeddings), name to tensor.
    """

    path: Path
    run: dict[str, Any]
    config: dict[str, Any]
    deltas: Mapping[str, LowRank | Dense]
    stacks: Mapping[str, list[LowRank]] = field(default_factory=dict)
    copies: Mapping[str, Dense] = field(default_factory=dict)

    @property
    def negated(self) -> dict[str, Any] | None:
        """{"scale", "source_digest"} when `sku negate` wrote it, else None."""
        return self.run.get("negated")

    @property
    def dense(self) -> bool:
        return not self.config

    @property
    def file(self) -> Path:
        """The one that holds its tensors."""
        return self.path / (DENSE if self.dense else WEIGHTS)

    @cached_property
    def digest(self) -> str:
        """Hex sha256 over what the adapter does: every delta's name, scaling, shapes, dtypes and bytes. Paths and cards don't count."""
        digest = hashlib.sha256()
        for label, scaling, tensors in self._parts():
            digest.update(json.dumps([label, scaling]).encode() + b"\n")
            for tensor in tensors:
                digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(memoryview(_bytes(tensor).numpy()))
        return digest.hexdigest()

    def _parts(self) -> Iterator[tuple[str, float, list["torch.Tensor"]]]:
        for name in sorted(self.deltas):
            delta = self.deltas[name]
            yield (name, 1.0, [delta.tensor()]) if isinstance(delta, Dense) else (name, delta.scaling, [delta.a, delta.b])
        for name in sorted(self.stacks):
            for depth, delta in enumerate(self.stacks[name]):
                patterns = [self.config.get("rank_pattern"), self.config.get("alpha_pattern")]
                yield json.dumps([name, depth, patterns], sort_keys=True), delta.scaling, [delta.a, delta.b]

    def check_base(self, reader: CheckpointReader, any_base: bool = False) -> None:
        """Refuse a base that is not the one this adapter was trained on; an adapter that names none passes.

        Raises AdapterError unless `any_base`.
        """
        trained_on = self.run.get("base_identity")
        if any_base or not trained_on or trained_on == reader.identity():
            return
        raise AdapterError(
            f"{self.path}: was trained on another base ({self.run.get('base') or 'unnamed'}, identity {trained_on[:12]}…) "
            f"than {reader.path} (identity {reader.identity()[:12]}…); "
            "give that base as --model, or --any-base if you know that the edit carries over"
        )


def load_adapter(path: str | Path, *, as_is: bool = False) -> LoraAdapter:
    """Read a PEFT LoRA directory or a dense task vector.

    Args:
        as_is: accept an adapter that `sku negate` wrote, and take its deltas as they stand.
    Raises:
        AdapterError: not an adapter, a kind whose edit is not scaling·B@A, or a negated one without `as_is`.
    """
    path = Path(path)
    if not path.is_dir():
        raise AdapterError(f"{path}: no such adapter directory; give the directory that sku train or PEFT's save_pretrained wrote")
    check_files(path, AdapterError)
    run = _read_json(path / RUN) if (path / RUN).is_file() else {}
    if not isinstance(run.get("negated", {}), dict | None):
        raise AdapterError(f"{path / RUN}: 'negated' must be an object; copy the adapter again")
    if run.get("negated") and not as_is:
        raise AdapterError(
            f"{path}: is already negated (scale {run['negated'].get('scale')}), so subtracting it would put the harm back; "
            "give the raw adapter it was made from, or --as-is if that is what you want"
        )
    if (path / DENSE).is_file():
        return _load_dense(path, run)
    return _load_peft(path, run)


def _load_dense(path: Path, run: dict[str, Any]) -> LoraAdapter:
    reader = CheckpointReader(path / DENSE)
    return LoraAdapter(path, run, {}, {name: Dense(reader, name) for name in reader.names})


def _load_peft(path: Path, run: dict[str, Any]) -> LoraAdapter:
    if not (path / "adapter_config.json").is_file():
        inside = sorted(child.parent.name for child in path.glob("*/adapter_config.json"))
        hint = f"did you mean {path / inside[0]}?" if inside else "give the directory that sku train or PEFT's save_pretrained wrote"
        raise AdapterError(f"{path}: holds neither adapter_config.json nor {DENSE}; {hint}")
    config = _read_json(path / "adapter_config.json")
    check_config(path, config)
    if not (path / WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        remedy = "load it with PEFT where you trust its source and save it again (safetensors)" if pickled else "copy it there"
        raise AdapterError(f"{path / WEIGHTS}: is missing; {remedy}")
    try:
        reader = CheckpointReader(path / WEIGHTS)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    return LoraAdapter(path, run, config, *read_factors(path / WEIGHTS, config, reader))


def negate(path: str | Path, scale: float, output: str | Path, *, as_is: bool = False) -> dict[str, Any]:
    """Write an adapter whose addition is base − scale·delta: every B is multiplied by −scale, nothing else changes.

    Scaling B alone keeps alpha_pattern, rank_pattern and rsLoRA right in every reader. A product that its dtype cannot
    hold is stored in float32. PEFT and vLLM load the result unchanged.

    Returns:
        What `sku negate --json` prints. Raises AdapterError and ConfigError for bad input.
    """
    import math

    if not math.isfinite(scale) or scale < 0:
        raise ConfigError(f"--scale {scale}: must be a number ≥ 0; 1 subtracts exactly what was trained")
    adapter = load_adapter(path, as_is=as_is)
    with output_directory(output, mode=0o700) as partial:
        tensors = write_negation(adapter, scale, partial)
        write_text(partial / "README.md", _card(adapter, scale))
        result = {"adapter": str(path), "scale": scale, "source_digest": adapter.digest, "tensors": tensors, "output": str(output)}
        record(partial, "negate", result, {"adapter": str(path), "scale": scale, "as_is": as_is, "output": str(output)})
    return result


def write_negation(adapter: LoraAdapter, scale: float, directory: Path) -> int:
    """The files that PEFT and vLLM read of a negated adapter, into an `output_directory` (which syncs them); how many tensors they hold."""
    from safetensors.torch import save_file

    reader = CheckpointReader(adapter.file)
    tensors = {}
    for key in reader.names:
        factor = FACTOR.match(key)
        if adapter.dense or (factor and factor["side"] == "B"):
            tensors[key] = _times(reader.mapped(key), -scale)
        elif factor:
            tensors[key] = reader.mapped(key)
    run = {**adapter.run, "schema": "sku.run/1", "negated": {"scale": scale, "source_digest": adapter.digest}}
    run.setdefault("adapter_kind", "dense" if adapter.dense else "lora")
    save_file(tensors, directory / adapter.file.name, metadata={"format": "pt"})
    if not adapter.dense:
        (directory / "adapter_config.json").write_text(json_text({**adapter.config, "inference_mode": True}), encoding="utf-8")
    (directory / RUN).write_text(json_text(run), encoding="utf-8")
    return len(tensors)


def _times(tensor: "torch.Tensor", factor: float) -> "torch.Tensor":
    product = tensor.double() * factor
    narrow = product.to(tensor.dtype)
    if not bool(product.float().isfinite().all()):
        raise AdapterError(f"scale {-factor:g} makes factors that float32 cannot hold; use a smaller --scale")
    return narrow.contiguous() if bool((narrow.double() == product).all()) else product.float().contiguous()


def _card(adapter: LoraAdapter, scale: float) -> str:
    base = adapter.config.get("base_model_name_or_path") or adapter.run.get("base") or "unknown"
    return (
        f"---\nbase_model: {base}\n---\n\n# Negated task vector, scale {scale:g}\n\n"
        "Adding this adapter to its base subtracts the harmful knowledge that was identified there. Its mirror image *is* that\n"
        "knowledge: whoever flips its sign has the harmful adapter back. Serve it; do not publish it. `sku fuse`,\n"
        "`sku eval` and `sku negate` refuse it where a raw adapter belongs.\n"
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: not valid JSON ({error}); copy the adapter again") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{file}: expected a JSON object; copy the adapter again")
    return value


def _bytes(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)
