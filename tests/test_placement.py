"""Where a model is put: the first GPU, all of them only where the weights do not fit into it."""

from pathlib import Path

import pytest
import torch

from sku_vllm.model import _placement


def test_several_gpus_only_for_weights_that_one_cannot_hold(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _placement(tiny / "base", "cpu") == {"": "cpu"}
    size = sum(file.stat().st_size for file in (tiny / "base").glob("*.safetensors"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * size, 2 * size))
    assert _placement(tiny / "base", None) == {"": "cuda"}
    assert _placement(tiny / "base", "cuda:1") == {"": "cuda:1"}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, 2 * size))
    assert _placement(tiny / "base", None) == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _placement(tiny / "base", None) == {"": "cuda"}
