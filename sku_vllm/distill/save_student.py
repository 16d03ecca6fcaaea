"""Write the student as a checkpoint like the teacher's: its dtype, its config, tokenizer and other small files.

Open this file when something beside the weights is missing from a distilled checkpoint.
"""

import json
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sku_vllm.checkpoint.files import INDEX
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.fuse.companion_files import write_small_files


def save_student(student: PreTrainedModel, reader: CheckpointReader, partial: Path) -> str:
    """Write weights under the names that the architecture's checkpoints have, and the teacher's small files; returns the dtype stored."""
    dtype = reader.stored_dtype or "float32"
    student.to(getattr(torch, dtype))  # type: ignore[arg-type]  # a dtype, which transformers' signature leaves out
    student.save_pretrained(partial)
    own = partial / INDEX
    index = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else None
    write_small_files(reader, partial, "keep", False, index)
    if index is None and own.is_file():  # the teacher's, which lists shards that were not written
        own.unlink()
    os.chmod(partial, 0o755)  # unfinished runs are private, as adapters are; a checkpoint is not
    return dtype
