"""The adversary's steps: as large in bfloat16 as in float32, and no larger the deeper the model is."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sku_vllm.train.adversary import Adversary, rounded


def test_rounding_keeps_the_mean_and_what_bfloat16_holds_already() -> None:
    held = torch.randn(500).to(torch.bfloat16)
    assert torch.equal(rounded(held.float(), "a"), held)
    between = torch.full((20_000,), 1 + 2**-10)  # an eighth of the way from 1 to the next number of bfloat16
    for sign in (1, -1):
        found = rounded(sign * between, "b").float()
        assert set(found.tolist()) == {sign * 1.0, sign * (1 + 2**-7)}
        assert float((found.abs() > 1).float().mean()) == pytest.approx(1 / 8, abs=0.01)
    assert torch.equal(rounded(between, "b"), rounded(between, "b")) and not torch.equal(rounded(between, "b"), rounded(between, "c"))


def adversary(dtype: torch.dtype, layers: int) -> Adversary:
    """One on a small Llama, with a learning rate of 0.01 in all; only the update of a weight is asked of it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    core = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers)).to(dtype)
    objective = SimpleNamespace(passes=SimpleNamespace(model=core, core=core))
    return Adversary(objective, SimpleNamespace(relearner_lr=0.01, relearner_steps=100))  # type: ignore[arg-type]


def moved(made: Adversary, steps: int) -> float:
    """How far a matrix is after so many steps along one gradient, as a share of its root mean square."""
    weight = next(parameter for parameter, name in made.names.items() if name.endswith("gate_proj.weight"))
    gradient, before = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), weight.detach().float().clone()
    for made.taken in range(steps):
        weight.grad = gradient.to(weight.dtype)
        made._descend(weight)
    return float((weight.detach().float() - before).mul(-gradient.sign()).mean() / before.square().mean().sqrt())


def test_steps_smaller_than_the_spacing_of_bfloat16_add_up() -> None:
    exact, narrow = (moved(adversary(dtype, layers=4), steps=20) for dtype in (torch.float32, torch.bfloat16))
    assert exact > 0.01
    assert narrow == pytest.approx(exact, rel=0.1)


def test_a_deeper_model_takes_smaller_steps() -> None:
    shallow, deep = (moved(adversary(torch.float32, layers), steps=1) for layers in (2, 8))
    assert shallow == pytest.approx(4 * deep, rel=0.02)


def test_weights_are_the_models_own_type_again_after_a_step() -> None:
    made = adversary(torch.bfloat16, layers=1)
    moved(made, steps=1)
    assert all(parameter.dtype is torch.bfloat16 and parameter.grad is None for parameter in made.names)
    assert all(isinstance(held, nn.Parameter) and held.numel() == 0 for held in made.moved.values())
