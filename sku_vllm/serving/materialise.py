"""The negation LoRA of an arm: checked against the base, written once into a private directory, found again by its digest."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sku_vllm.adapter import LoraAdapter, load_adapter, write_negation
from sku_vllm.checkpoint import CheckpointReader, checkpoint_directory
from sku_vllm.errors import AdapterError
from sku_vllm.output import output_directory
from sku_vllm.placement import place
from sku_vllm.serving.arms import Arm

# The values vLLM accepts for max_lora_rank (vllm/config/lora.py, MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True)
class Negation:
    """A negated adapter on disk, ready for vLLM. path: its directory; rank: its largest rank."""

    path: Path
    rank: int


def materialise(arm: Arm, model: str, directory: Path, *, revision: str | None = None, any_base: bool = False) -> Negation:
    """Write base − scale·delta of a `lora:` arm as an adapter to be added, unless it is there already. `StateFile.stage` syncs it.

    Raises:
        AdapterError: not a LoRA adapter, made for another base, already negated, or of shapes this base does not have.
    """
    try:
        adapter = load_adapter(arm.source)
    except OSError as error:
        raise AdapterError(f"--arm {arm.name}: {arm.source[:200]}: {error.strerror}; give an adapter directory") from error
    if adapter.dense:
        raise AdapterError(
            f"--arm {arm.name}: {arm.source} is a dense task vector, which vLLM cannot add per request; "
            "fuse it and serve the result, or swap to it"
        )
    reader = base_reader(model, revision)
    adapter.check_base(reader, any_base=any_base)
    check_fit(adapter, reader, arm)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / f"{adapter.digest[:16]}@{arm.scale:.2f}"
    if not (path / "sku_run.json").is_file():
        with output_directory(path, mode=0o700, sync=False) as partial:
            write_negation(adapter, arm.scale, partial)
    return Negation(path, adapter_rank(adapter))


@functools.lru_cache(1)
def base_reader(model: str, revision: str | None) -> CheckpointReader:
    """The served base, whose headers and identity are read once: every new adapter is held against them."""
    return CheckpointReader(checkpoint_directory(model, revision))


def adapter_rank(adapter: LoraAdapter) -> int:
    """The largest rank among the adapter's factors."""
    return max(delta.a.shape[-2] for delta in adapter.deltas.values())


def check_fit(adapter: LoraAdapter, reader: CheckpointReader, arm: Arm) -> None:
    """Every delta has a base weight of its shape, and vLLM can add it per request.

    Raises:
        AdapterError: names everything that does not fit, or vLLM's limit.
    """
    if adapter.stacks:
        raise AdapterError(
            f"--arm {arm.name}: {arm.source} edits packed experts, which vLLM cannot add per request; fuse it, or swap to it"
        )
    if adapter.copies:
        names = ", ".join(sorted(adapter.copies))
        raise AdapterError(
            f"--arm {arm.name}: {arm.source} carries copies of {names} (modules_to_save), which vLLM refuses; train without them, or fuse"
        )
    try:
        place(reader, [(adapter, arm.scale)], untie=True)
    except AdapterError as error:
        raise AdapterError(f"--arm {arm.name}: {error}") from error
    if adapter_rank(adapter) > RANKS[-1]:
        raise AdapterError(
            f"--arm {arm.name}: {arm.source} has rank {adapter_rank(adapter)}; vLLM serves at most {RANKS[-1]}; fuse it, or swap to it"
        )


def served_rank(ranks: Iterable[int]) -> int:
    """The smallest max_lora_rank vLLM accepts that holds all of `ranks`."""
    largest = max(ranks, default=1)
    return next(rank for rank in RANKS if rank >= largest)
