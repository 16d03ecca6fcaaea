"""The output layer gets one matrix, says the same, and is left as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sku_vllm.decoding.flat_head import flat_head
from sku_vllm.model import load_model
from sku_vllm.model_spec import ModelSpec

IDS = torch.arange(24).view(3, 8)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [1, 3, 0])
def test_logits_are_the_same(tiny: Path, edited: bool, dtype: str, kept: int) -> None:
    model = load_model(ModelSpec(tiny / "base", dtype=dtype, adapter=tiny / "adapter" if edited else None))
    inner: Any = model.get_base_model() if edited else model
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        plain = model(input_ids=IDS, logits_to_keep=kept).logits
        watched = inner.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with flat_head(inner):
            flat = model(input_ids=IDS, logits_to_keep=kept).logits
        watched.remove()
    assert flat.shape == plain.shape == (3, kept or 8, plain.shape[-1])
    assert torch.allclose(flat.float(), plain.float(), atol=1e-5 if dtype == "float32" else 0.02)
    assert "forward" not in vars(inner.get_output_embeddings()) and len(seen) == 1


def test_the_layer_multiplies_one_matrix(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = load_model(tiny / "base"), []
    head = model.get_output_embeddings()
    forward = head.forward

    def watched(states: torch.Tensor) -> torch.Tensor:
        shapes.append(states.shape)
        return forward(states)

    monkeypatch.setattr(head, "forward", watched)  # as accelerate does
    with torch.inference_mode(), flat_head(model):
        model(input_ids=IDS, logits_to_keep=1)
    assert shapes == [(3, model.config.hidden_size)] and head.forward is watched


def test_a_model_without_an_output_layer() -> None:
    class Headless:
        def get_output_embeddings(self) -> None:
            return None

    with flat_head(Headless()):  # type: ignore[arg-type]
        pass
