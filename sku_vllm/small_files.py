"""The small files beside the weights: config, tokenizer and the rest as they are, changed only where the weights are."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from sku_vllm.checkpoint import CheckpointReader
from sku_vllm.checkpoint_files import FOREIGN, INDEX
from sku_vllm.output import write_json
from sku_vllm.shards import OutputShard

# Weights in other formats; cards describe the base, and sku_*.json what sku commands did there.
NOT_COPIED = (*FOREIGN, ".safetensors", ".index.json", "README.md")


def write_small_files(reader: CheckpointReader, partial: Path, dtype: str, untie: bool, shards: Sequence[OutputShard]) -> None:
    """Config, tokenizer, generation config, chat template and licence as they are; config and index changed where the weights are."""
    if not reader.path.is_dir():
        return
    for file in sorted(reader.path.iterdir()):
        if file.is_file() and not file.name.startswith(("sku_", ".")) and not file.name.endswith(NOT_COPIED):
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
        partial / INDEX, {"metadata": {**reader.index["metadata"], "total_size": size}, "weight_map": dict(sorted(names.items()))}
    )
