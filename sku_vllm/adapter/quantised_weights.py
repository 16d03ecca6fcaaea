"""Weights that a checkpoint stores as a quantiser's codes, to which no edit can be added, and what to do instead.

Open this file when a quantised base is refused though the edited weights are not, or a new format of codes appears.
"""

import functools
from collections.abc import Sequence

from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.checkpoint.safetensors_file import TensorInfo

# Ends of the names of code tensors: GPTQ and AWQ, MXFP4 (gpt-oss), compressed-tensors.
CODES = (".qweight", "_blocks", ".weight_packed")
INTEGERS = ("I8", "U8", "I32", "I4", "U4", "F4")


@functools.lru_cache(maxsize=2)
def codes_in(reader: CheckpointReader) -> dict[str, TensorInfo]:
    """The tensors of codes, by the parameter's name without `.weight`, in file order."""
    found: dict[str, TensorInfo] = {}
    for info in map(reader.info, reader.names):
        end = next((end for end in CODES if info.name.endswith(end)), None)
        if end is None and info.name.endswith(".weight") and info.dtype in INTEGERS:
            end = ".weight"
        if end is not None:
            found.setdefault(info.name.removesuffix(end), info)
    return found


def code_of(reader: CheckpointReader, parameter: str) -> TensorInfo | None:
    """The tensor of codes that a parameter is stored as, or None."""
    return codes_in(reader).get(parameter.removesuffix(".weight"))


def remedy(reader: CheckpointReader, bases: Sequence[str]) -> str:
    """What to do about edits of weights that are stored as codes. bases: unquantised bases that the adapters name."""
    if (reader.config.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        return (
            "fuse into a copy of it in bfloat16: "
            'python -c "from transformers import AutoModelForCausalLM as M, Mxfp4Config as C; '
            f"M.from_pretrained('{reader.path}', quantization_config=C(dequantize=True), dtype='bfloat16')"
            f".save_pretrained('{reader.path}-bf16', save_original_format=False)\"; or train an adapter on the attention alone, "
            "which is stored as it is"
        )
    which = f" ({', '.join(bases)}: an adapter trained with --quantize belongs to the unquantised base)" if bases else ""
    return f"fuse into the unquantised model it was made from{which} and quantise the result again"
