"""The adapter that a `lora:` arm puts into the engine: checked against the base, negated at the arm's scale, and written once.

Open this file to see which adapters can be served per request, and where their negated copies are written.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sku_vllm.adapter.adapter import LoraAdapter, load_adapter
from sku_vllm.adapter.delta import LowRank
from sku_vllm.adapter.negation import write_negation
from sku_vllm.adapter.placement import place
from sku_vllm.adapter.vllm_ranks import VLLM_RANKS, vllm_rank
from sku_vllm.checkpoint.reader import CheckpointReader, checkpoint_directory
from sku_vllm.errors import AdapterError
from sku_vllm.output import output_directory
from sku_vllm.serving.arms import Arm


@dataclass(frozen=True, slots=True)
class ArmAdapter:
    """An arm's negated adapter on disk, ready for vLLM. path: its directory; rank: its largest rank."""

    path: Path
    rank: int


def write_arm_adapter(arm: Arm, model: str, directory: Path, *, revision: str | None = None, any_base: bool = False) -> ArmAdapter:
    """Write −scale·delta of a `lora:` arm as an adapter that vLLM can add, into `directory`/DIGEST@SCALE; an existing one is reused.

    It is not synced to disk here: `StateFile.stage` syncs it before the routing table refers to it.

    Raises:
        AdapterError: not a LoRA adapter, made for another base, already negated, or of shapes this base does not have.
    """
    adapter = load_arm(arm)
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
            write_negation(adapter, arm.scale, partial, reader)
    return ArmAdapter(path, adapter_rank(adapter))


def load_arm(arm: Arm) -> LoraAdapter:
    """The raw adapter of a `lora:` arm. Raises AdapterError, which names the arm where there is no such directory."""
    try:
        return load_adapter(arm.source)
    except OSError as error:
        raise AdapterError(f"--arm {arm.name}: {arm.source[:200]}: {error.strerror}; give an adapter directory") from error


@functools.lru_cache(1)
def base_reader(model: str, revision: str | None) -> CheckpointReader:
    """A reader of the served base checkpoint, cached so that its headers and identity are not read again for every adapter."""
    return CheckpointReader(checkpoint_directory(model, revision))


def adapter_rank(adapter: LoraAdapter) -> int:
    """The largest rank among the adapter's factors; 0 where it has none."""
    return max((delta.a.shape[-2] for delta in adapter.deltas.values() if isinstance(delta, LowRank)), default=0)


def check_fit(adapter: LoraAdapter, reader: CheckpointReader, arm: Arm) -> None:
    """Check that every delta has a base weight of its shape and that vLLM can add the adapter per request.

    Raises:
        AdapterError: names the deltas without a matching base weight, or the limit of vLLM that is exceeded.
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
    if adapter_rank(adapter) > VLLM_RANKS[-1]:
        raise AdapterError(
            f"--arm {arm.name}: {arm.source} has rank {adapter_rank(adapter)}; vLLM serves at most {VLLM_RANKS[-1]}; fuse it, or swap to it"
        )


def served_rank(ranks: Iterable[int]) -> int:
    """The smallest max_lora_rank vLLM accepts that holds all of `ranks`."""
    return vllm_rank(max(ranks, default=1))
