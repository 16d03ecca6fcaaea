"""Read an adapter directory as deltas: for each base weight's name, the matrix that is subtracted from it.

Two forms: a PEFT LoRA, whose delta is scaling·B@A, and a dense task vector (`task_vector.safetensors`, a tensor per base weight).
Open this file to see how an adapter is read, and when one is refused.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sku_vllm.adapter.adapter_keys import unwrapped
from sku_vllm.adapter.delta import Dense, LowRank
from sku_vllm.adapter.peft_format import WEIGHTS, check_config, read_factors
from sku_vllm.checkpoint.files import check_files
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import AdapterError, CheckpointError
from sku_vllm.json_object import read_json_object

if TYPE_CHECKING:
    import torch

DENSE, RUN = "task_vector.safetensors", "sku_run.json"
REMEDY = "copy the adapter again"


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter directory.

    Attributes:
        path: where it lies. run: its sku_run.json ({} when another tool made it). config: its adapter_config.json ({} when dense).
        deltas: base weight name (as transformers names parameters) to `LowRank` or `Dense`.
        stacks: module name to the factors of its packed experts (PEFT's `target_parameters`), innermost PEFT wrapper first.
        copies: name to a whole base weight that PEFT saved beside the factors (embeddings); it has to equal the base's.
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
        """Whether it is a dense task vector, not a LoRA."""
        return not self.config

    @property
    def quantised_base(self) -> str | None:
        """How the base was quantised while this adapter was trained ("4bit"), or None."""
        config = self.run.get("config")
        return config.get("quantize") if isinstance(config, dict) else None

    @property
    def file(self) -> Path:
        """The safetensors file that holds its tensors."""
        return self.path / (DENSE if self.dense else WEIGHTS)

    @cached_property
    def digest(self) -> str:
        """Hex sha256 over every delta's name, scaling, shapes, dtypes and bytes; where the adapter lies and its README do not matter."""
        digest = hashlib.sha256()
        for label, scaling, tensors in self._parts():
            digest.update(json.dumps([label, scaling]).encode() + b"\n")
            for tensor in tensors:
                digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(_bytes(tensor).numpy().data)
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
        """Refuse a base that is not the one this adapter was trained on; an adapter that records no base is accepted.

        Raises AdapterError unless `any_base`.
        """
        trained_on = self.run.get("base_identity")
        if not isinstance(trained_on, str | None):
            raise AdapterError(f"{self.path / RUN}: 'base_identity' must be a string; {REMEDY}")
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
    run = read_json_object(path / RUN, AdapterError, REMEDY) if (path / RUN).is_file() else {}
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
    if not reader.names:
        raise AdapterError(f"{path / DENSE}: holds no tensors, so nothing would be subtracted; copy the adapter again")
    deltas: dict[str, LowRank | Dense] = {}
    for name in reader.names:
        other = deltas.setdefault(unwrapped(name), Dense(reader, name))
        if isinstance(other, Dense) and other.name != name:
            raise AdapterError(
                f"{path / DENSE}: holds two spellings of one tensor ({other.name} and {name}), and nothing says which is meant; keep one"
            )
    return LoraAdapter(path, run, {}, deltas)


def _load_peft(path: Path, run: dict[str, Any]) -> LoraAdapter:
    if not (path / "adapter_config.json").is_file():
        inside = sorted(str(path / child.parent.name) for child in path.glob("*/adapter_config.json"))
        hint = f"give one of those below it: {', '.join(inside[:5])}{', …' if len(inside) > 5 else ''}" if len(inside) > 1 else ""
        hint = hint or f"did you mean {inside[0]}?" if inside else "give the directory that sku train or PEFT's save_pretrained wrote"
        raise AdapterError(f"{path}: holds neither adapter_config.json nor {DENSE}; {hint}")
    config = read_json_object(path / "adapter_config.json", AdapterError, REMEDY)
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


def _bytes(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)
