"""The dtype that each tensor of a fused checkpoint is stored in, and every place of config.json that names it.

`--dtype` means what `from_pretrained(dtype=…)` means: what transformers keeps in float32 stays as it is, such as the biases by which a
router chooses experts, whose spacing in bfloat16 exceeds their differences. Open this file when `--dtype` narrows what it should not.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sku_vllm.adapter.transformers_names import float32_parameters
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.checkpoint.safetensors_file import DTYPES

TORCH_TO_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CASTABLE = {"F64", "F32", "F16", "BF16"}
# The biases of DeepSeek-V3 and those who took its router over, in checkpoints whose code transformers does not have.
ROUTER_BIAS = re.compile(r"(e_score_correction_bias|expert_bias)$")


def output_dtypes(reader: CheckpointReader, dtype: str) -> dict[str, str]:
    """safetensors' spelling of each tensor's dtype in the output, by name. dtype: of the request; "keep" changes nothing."""
    infos = [reader.info(name) for name in reader.names]
    if dtype == "keep":
        return {info.name: info.dtype for info in infos}
    target = TORCH_TO_SAFETENSORS[dtype]
    narrowed = [info for info in infos if info.dtype in CASTABLE and _bits(info.dtype) > _bits(target)]
    stays = float32_parameters(reader, dtype) if narrowed and target != "F32" else None
    if stays is None:  # custom code: what its author stored wider than the rest is meant to be
        elements = Counter[str]()
        for info in infos:
            elements[info.dtype] += info.nbytes * (info.dtype in CASTABLE)
        usual = elements.most_common(1)[0][0] if elements else target
        wide = {info.name for info in narrowed if _bits(info.dtype) > _bits(usual) or ROUTER_BIAS.search(info.name)}
    else:
        wide = {info.name for info in narrowed if stays(info.name)}
    return {info.name: target if info.dtype in CASTABLE and info.name not in wide else info.dtype for info in infos}


def _bits(dtype: str) -> int:
    return DTYPES[dtype][1]


def config_with(config: Mapping[str, Any], dtype: str, untie: bool) -> dict[str, Any]:
    """config.json of the output: its dtype in every section and spelling that names one, and no section that ties embeddings.

    Args:
        dtype: of the request; "keep" leaves it as it is.
    """
    changed = _section(config, dtype, untie)
    if dtype != "keep" and not {"dtype", "torch_dtype"} & set(changed):
        changed["dtype"] = dtype
    if untie:
        changed["tie_word_embeddings"] = False
    return changed


def _section(section: Mapping[str, Any], dtype: str, untie: bool) -> dict[str, Any]:
    changed = dict(section)
    for key, value in section.items():
        if dtype != "keep" and key in ("dtype", "torch_dtype"):
            changed[key] = dtype
        elif untie and key == "tie_word_embeddings":
            changed[key] = False
        elif isinstance(value, dict) and key != "quantization_config" and (key.endswith("_config") or "model_type" in value):
            changed[key] = _section(value, dtype, untie)
            if untie and key == "text_config":  # loaded by itself it would be tied again, where that is its class's default
                changed[key]["tie_word_embeddings"] = False
    return changed
