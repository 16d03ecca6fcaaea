"""The negation LoRA of an arm: checked against the base, written once into a private directory, found again by its digest."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sku_vllm.adapter import LoraAdapter, load_adapter, negate
from sku_vllm.checkpoint import CheckpointReader, checkpoint_directory
from sku_vllm.errors import AdapterError
from sku_vllm.serving.arms import Arm

# The values vLLM accepts for max_lora_rank (vllm/config/lora.py, MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True)
class Negation:
    """A negated adapter on disk, ready for vLLM. path: its directory; rank: its largest rank."""

    path: Path
    rank: int


def materialise(arm: Arm, model: str, directory: Path, *, revision: str | None = None, any_base: bool = False) -> Negation:
    """Write base − scale·delta of a `lora:` arm as an adapter to be added, unless it is there already.

    Raises:
        AdapterError: not a LoRA adapter, made for another base, already negated, or of shapes this base does not have.
    """
    try:
        adapter = load_adapter(arm.source)
    except OSError as error:
        raise AdapterError(f"--arm {arm.name}: {arm.source[:200]}: {error.strerror}; give an adapter directory") from error
    if adapter.dense:
        raise AdapterError(f"--arm {arm.name}: {arm.source} is a dense task vector, which vLLM cannot add per request; fuse it and serve the result, or swap to it")
    reader = CheckpointReader(checkpoint_directory(model, revision))
    adapter.check_base(reader, any_base=any_base)
    check_fit(adapter, reader, arm)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / f"{adapter.digest[:16]}@{arm.scale:.2f}"
    if not (path / "sku_run.json").is_file():
        negate(arm.source, arm.scale, path)
    return Negation(path, adapter_rank(adapter))


def adapter_rank(adapter: LoraAdapter) -> int:
    """The largest rank among the adapter's factors."""
    return max(delta.a.shape[-2] for delta in adapter.deltas.values())


def check_fit(adapter: LoraAdapter, reader: CheckpointReader, arm: Arm) -> None:
    """Every delta has a base weight of its shape.

    Raises:
        AdapterError: names everything that does not fit, and a vLLM limit where one applies.
    """
    if adapter.stacks:
        raise AdapterError(f"--arm {arm.name}: {arm.source} edits packed experts, which vLLM cannot add per request; fuse it, or swap to it")
    if adapter.copies:
        names = ", ".join(sorted(adapter.copies))
        raise AdapterError(f"--arm {arm.name}: {arm.source} carries copies of {names} (modules_to_save), which vLLM refuses; train without them, or fuse")
    wrong = []
    for name, delta in adapter.deltas.items():
        found = next((each for each in spellings(name) if each in reader), None)
        if found is None:
            wrong.append(f"{name} is not in the base")
        elif tuple(reader.info(found).shape) != tuple(delta.shape):
            wrong.append(f"{name} is {list(reader.info(found).shape)} in the base and {list(delta.shape)} here")
    if wrong:
        raise AdapterError(f"--arm {arm.name}: {arm.source} does not fit {reader.path}: {'; '.join(wrong)}; give the adapter that was trained on this base")
    if adapter_rank(adapter) > RANKS[-1]:
        raise AdapterError(f"--arm {arm.name}: {arm.source} has rank {adapter_rank(adapter)}; vLLM serves at most {RANKS[-1]}; fuse it, or swap to it")


def spellings(name: str) -> Iterable[str]:
    """A weight's name as transformers and as older checkpoints write it (with and without the `model.` in front)."""
    return (name, name.removeprefix("model."), f"model.{name}")


def served_rank(ranks: Iterable[int]) -> int:
    """The smallest max_lora_rank vLLM accepts that holds all of `ranks`."""
    largest = max(ranks, default=1)
    return next(rank for rank in RANKS if rank >= largest)
