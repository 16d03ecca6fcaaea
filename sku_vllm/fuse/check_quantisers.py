"""Quantisers of record for `sku fuse --check`: the code that people quantise with, from optional packages, run on the edited weights.

bitsandbytes' NF4, and llama.cpp's formats: the plain ones by the package gguf, the K formats by llama.cpp's own library. Each makes of a
weight what a model served in that format computes with; those that are calibrated on text stand in `calibrated_quantisers.py`.
`--simulate` (`sku_vllm/quantize.py`) is the estimate that needs no package. Open this file to add a quantiser.
"""

import ctypes
import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sku_vllm.errors import ConfigError

# rows [rows, cols] of the weight of that name, to what is left of them
Quantiser = Callable[[str, Tensor], Tensor]
PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
FORMS = ("nf4", *(f"gguf:{kind}" for kind in PLAIN), "gguf:Q4_K_M")
CALIBRATED = {"gptq": "gptqmodel", "awq": "llmcompressor"}


def check_names(kinds: Sequence[str]) -> tuple[str, ...]:
    """`kinds` without repetitions. Raises ConfigError for an unknown one."""
    known = (*FORMS, *CALIBRATED)
    for kind in kinds:
        if kind not in known:
            raise ConfigError(f"--check {kind}: unknown; choose from {', '.join(known)}")
    return tuple(dict.fromkeys(kinds))


def quantisers(kinds: Sequence[str], config: Mapping[str, Any]) -> dict[str, Quantiser]:
    """The quantisers of these names that need a weight alone, with their packages loaded. config: the base's config.json.

    Raises:
        ConfigError: a package is not installed; names the extra that brings it.
    """
    sections = [config, *(value for key, value in config.items() if key == "text_config" and isinstance(value, dict))]
    layers = next((section["num_hidden_layers"] for section in sections if isinstance(section.get("num_hidden_layers"), int)), 0)
    found: dict[str, Quantiser] = {}
    for kind in kinds:
        if kind == "nf4":
            found[kind] = _nf4(_package(kind, "bitsandbytes.functional", "nf4"))
        elif kind == "gguf:Q4_K_M":
            found[kind] = functools.partial(_k_quant, _package(kind, "gguf", "gguf"), _ggml(kind), layers)
        elif kind not in CALIBRATED:
            found[kind] = functools.partial(_gguf, _package(kind, "gguf", "gguf"), kind.removeprefix("gguf:"))
    return found


def _package(kind: str, module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--check {kind}: needs {module.split('.')[0]}; install it with: pip install 'sku-vllm[{extra}]'") from error


def _nf4(functional: Any) -> Quantiser:
    """bitsandbytes' NF4: 16 levels, one scale for 64 elements in row-major order."""

    def quantise(name: str, weight: Tensor) -> Tensor:
        codes, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4", blocksize=64)
        restored: Tensor = functional.dequantize_4bit(codes, state)
        return restored.to(torch.float32).view(weight.shape)

    return quantise


def _gguf(gguf: Any, kind: str, name: str, weight: Tensor) -> Tensor:
    """A plain format of llama.cpp: one scale for 32 elements of a row; float16 for rows of no such length."""
    if weight.shape[1] % 32:
        return weight.half().float()
    which = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.float().numpy(), which), which))


def _k_quant(gguf: Any, library: Any, layers: int, name: str, weight: Tensor) -> Tensor:
    """Q4_K_M as llama.cpp mixes it: six bits for the head and for some layers' value and down projections, else four."""
    kind = _k_kind(name, layers)
    if weight.shape[1] % 256:  # llama.cpp's fallback for rows that its superblocks do not divide
        return _gguf(gguf, {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}[kind], name, weight)
    which = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[which]
    rows, columns = weight.shape
    source = np.ascontiguousarray(weight.float().numpy())
    codes = np.empty((rows, columns // block * size), np.uint8)
    library.ggml_quantize_chunk(
        int(which), source.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), codes.ctypes.data_as(ctypes.c_void_p), 0, rows, columns, None
    )
    return torch.from_numpy(gguf.quants.dequantize(codes, which))


def _k_kind(name: str, layers: int) -> str:
    """The format of one weight in Q4_K_M (llama.cpp, llama_tensor_get_type)."""
    number = re.search(r"\.(\d+)\.", name)
    layer, eighth = int(number[1]) if number else 0, layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    if re.search(r"lm_head|embed_out", name):
        return "Q6_K"
    if re.search(r"qkv_proj|query_key_value|c_attn", name):
        return "Q5_K"
    return "Q6_K" if more and re.search(r"v_proj|down_proj|fc2|c_proj|dense_4h_to_h", name) else "Q4_K"


def _ggml(kind: str) -> Any:
    """llama.cpp's library, of an installed llama.cpp or of the package llama-cpp-python."""
    from ctypes.util import find_library
    from importlib.util import find_spec

    package = find_spec("llama_cpp")
    inside = sorted(Path(package.origin).parent.glob("lib/libggml-base*.so*")) if package is not None and package.origin else []
    where = str(inside[0]) if inside else find_library("ggml-base")
    if where is None:
        raise ConfigError(
            f"--check {kind}: llama.cpp's library (libggml-base) is not here; install llama.cpp, or: pip install 'sku-vllm[gguf-k]'"
        )
    library = ctypes.CDLL(where)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    return library
