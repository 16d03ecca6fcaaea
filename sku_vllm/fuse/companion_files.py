"""Copy the small files beside the weights (config, tokenizer and the rest); only config and index change, to match the new weights.

Open this file when something beside the weights is missing from a fused checkpoint, or should not be there.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sku_vllm.checkpoint.files import FOREIGN, INDEX
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.fuse.output_dtypes import config_with
from sku_vllm.output import write_json

# Not copied: weights, their index, and the base's README, which does not describe the fused checkpoint.
NOT_COPIED = (*FOREIGN, ".safetensors", ".index.json", "README.md")
# Left behind and named: loaders that find the configuration of an adapter load that adapter too, whose weights are not copied.
LEFT_BEHIND = ("adapter_config.json",)


def left_behind(reader: CheckpointReader) -> list[str]:
    """Names of the base's files that a reader might expect in the output, but that would keep it from loading."""
    return [name for name in LEFT_BEHIND if (reader.directory / name).is_file()] if reader.path.is_dir() else []


def write_small_files(reader: CheckpointReader, partial: Path, dtype: str, untie: bool, index: Mapping[str, Any] | None) -> None:
    """Copy config, tokenizer, generation config, chat template and licence; write config.json and the index anew where weights changed.

    Not copied are hidden files, NOT_COPIED, LEFT_BEHIND, and sku_*.json, the reports of commands that ran on the base.

    Args:
        index: content of a new index; None copies the base's, if it has one.
    """
    if not reader.path.is_dir():
        return
    for file in sorted(reader.path.iterdir()):
        if file.is_file() and not file.name.startswith(("sku_", ".")) and not file.name.endswith((*NOT_COPIED, *LEFT_BEHIND)):
            shutil.copyfile(file, partial / file.name)
    for folder in ("additional_chat_templates",):
        if (reader.path / folder).is_dir():
            shutil.copytree(reader.path / folder, partial / folder)
    config = config_with(reader.config, dtype, untie)
    if config != reader.config:
        write_json(partial / "config.json", config)
    if index is not None:
        write_json(partial / INDEX, index)
    elif reader.index is not None:
        shutil.copyfile(reader.path / INDEX, partial / INDEX)
