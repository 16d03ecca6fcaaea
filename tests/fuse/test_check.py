"""`--check`: what quantisers of record leave of an edit, and what is said where their packages are missing."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sku_vllm.errors import ConfigError
from sku_vllm.fuse.check_quantisers import _k_kind, quantisers
from sku_vllm.fuse.fuse_request import FuseRequest

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from fuse_cases import fuse, llama, lora  # noqa: E402

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(("kind", "package"), [("nf4", "bitsandbytes"), ("gguf:Q4_0", "gguf"), ("gguf:Q8_0", "gguf")])
def test_the_share_of_the_edit_that_a_quantiser_leaves(kind: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    base = llama(hidden_size=64)
    base.save_pretrained(tmp_path / "base")
    lora(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    report = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused", 0.05, check=[kind], simulate=["int8"])
    before, after = (load_file(tmp_path / name / "model.safetensors")[NAME] for name in ("base", "fused"))
    quantise = quantisers([kind], {})[kind]
    edit = before.double() - after.double()
    kept = quantise(NAME, before).double() - quantise(NAME, after).double()
    found = report.per_tensor[NAME][kind]
    assert found["retained"] == pytest.approx(((kept * edit).sum() / (edit * edit).sum()).item(), abs=1e-4)
    assert set(report.checked) == {kind} and set(report.simulated) == {"int8"}
    wide = quantise(NAME, torch.linspace(-1, 1, 4096).view(32, 128))
    assert (wide - torch.linspace(-1, 1, 4096).view(32, 128)).abs().max() < 0.16, "it is the weight, in few levels"


def test_what_cannot_run_here_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bitsandbytes", "bitsandbytes.functional", "gguf", "llama_cpp"):
        monkeypatch.setitem(sys.modules, module, None)
    for kind, extra in (("nf4", "nf4"), ("gguf:Q8_0", "gguf"), ("gguf:Q4_K_M", "gguf")):
        with pytest.raises(ConfigError, match=rf"^--check {kind}: needs \w+; install it with: pip install 'sku-vllm\[{extra}\]'$"):
            quantisers([kind], {})
    for kind, package in (("gptq", "gptqmodel"), ("awq", "llmcompressor")):
        with pytest.raises(ConfigError, match=rf"--check {kind}: is calibrated on text.*{package} \(pip install 'sku-vllm\[{kind}\]'\)"):
            FuseRequest("base", [("adapter", 1.0)], "out", check=[kind])
    with pytest.raises(ConfigError, match="--check int4: unknown; choose from nf4, gguf:Q4_0"):
        FuseRequest("base", [("adapter", 1.0)], "out", check=["int4"])


def test_the_mixture_of_q4_k_m() -> None:
    """Of 16 layers llama.cpp gives six bits to the first two, the last two, and every third between (use_more_bits)."""
    six = [layer for layer in range(16) if _k_kind(f"model.layers.{layer}.self_attn.v_proj.weight", 16) == "Q6_K"]
    assert six == [0, 1, 4, 7, 10, 13, 14, 15]
    assert _k_kind("model.layers.3.self_attn.q_proj.weight", 16) == "Q4_K" and _k_kind("lm_head.weight", 16) == "Q6_K"
