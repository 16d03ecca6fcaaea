"""Packed experts: in the orientations of PEFT's releases, and as a dense delta of a checkpoint that stores them one by one."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sku_vllm.errors import AdapterError
from sku_vllm.model import load_model
from sku_vllm.model_spec import ModelSpec

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from fuse_cases import PREFIX, SMALL, assert_equal, change_json, fuse, lora  # noqa: E402

EXPERTS, RANK = 3, 3
# Whether B's rows are the parameter's second dimension: einsum "o r e, e r i -> e o i" or "-> e i o" in peft/tuners/lora/layer.py
ROWS_FIRST = {"0.18.1": (False, False), "0.19.0": (False, True), "0.19.1": (True, False), "0.21.2": (True, False)}


def moe(kind: str, width: int) -> Any:
    """`width`: of an expert; its gate and up rows are 2 · width, or its columns for gpt-oss, which stores [experts, in, out]."""
    torch.manual_seed(0)
    sizes = {**SMALL, "hidden_size": 32, "intermediate_size": width, "num_experts_per_tok": 2}
    if kind == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(**sizes, num_experts=EXPERTS))
    base = GptOssForCausalLM(GptOssConfig(**sizes, head_dim=8, num_local_experts=EXPERTS))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return base


@pytest.mark.parametrize("version", ROWS_FIRST)
@pytest.mark.parametrize("kind", ["olmoe", "gpt-oss"])
@pytest.mark.parametrize("width", [16, 20])
def test_orientation_is_that_of_the_release(version: str, kind: str, width: int, tmp_path: Path) -> None:
    """With width 16, gate and up are square, so that only the release tells."""
    base = moe(kind, width)
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj"])
    name = "model.layers.1.mlp.experts.gate_up_proj"
    rows, columns = base.state_dict()[name].shape[1:]
    first = ROWS_FIRST[version][kind == "gpt-oss"]
    inner, outer = (columns, rows) if first else (rows, columns)
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(RANK * EXPERTS, inner, generator=generator), torch.randn(outer, RANK * EXPERTS, generator=generator)
    keys = {f"{PREFIX}model.layers.1.mlp.experts.lora_{side}.weight": factor for side, factor in (("A", a), ("B", b))}
    save_file(keys, tmp_path / "adapter/adapter_model.safetensors")
    change_json(tmp_path / "adapter/adapter_config.json", peft_version=version, target_parameters=["mlp.experts.gate_up_proj"])
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    left, right = b.double().reshape(outer, RANK, EXPERTS), a.double().reshape(EXPERTS, RANK, inner)
    wanted = {key: value.double() for key, value in base.state_dict().items()}
    wanted[name] -= 7 / RANK * torch.einsum(f"ore,eri->{'eoi' if first else 'eio'}", left, right)
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32).state_dict(), wanted, atol=1e-5)
    if first != ROWS_FIRST["0.21.2"][kind == "gpt-oss"]:  # PEFT of today would take them the other way round, square ones without a word
        with pytest.raises(AdapterError, match=rf"PEFT {version} wrote the factors of .*experts\.gate_up_proj.*sku fuse turns them"):
            load_model(ModelSpec(tmp_path / "base", adapter=tmp_path / "adapter"))
    for unclear in (None, "0.18.2.dev0", "0.19.1.dev0@0123abc"):
        change_json(tmp_path / "adapter/adapter_config.json", peft_version=unclear)
        if width == 16:
            with pytest.raises(AdapterError, match="peft_version"):
                fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "again")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_a_dense_delta_of_a_mixture_is_split_as_its_checkpoint_is(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=EXPERTS)),
        "qwen3-moe": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SMALL, moe_intermediate_size=24, num_experts=EXPERTS, num_experts_per_tok=2, head_dim=8)
        ),
        "gpt-oss": lambda: moe("gpt-oss", 20),
    }[kind]()
    base.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    delta = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in base.named_parameters()}
    (tmp_path / "vector").mkdir()
    save_file(delta, tmp_path / "vector/task_vector.safetensors")
    report = fuse(tmp_path / "base", tmp_path / "vector", tmp_path / "fused", 0.7)
    wanted = {name: value.double() - 0.7 * delta[name].double() for name, value in base.named_parameters()}
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32).state_dict(), wanted)
    assert abs(report.retained - 1) < 1e-6
