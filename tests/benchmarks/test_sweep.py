"""A sample of `make sweep`: classes that go through other conversions than those of tests/test_architectures.py."""

import time

import pytest

from sku_vllm.benchmarks.sweep import _limited, classes, sweep


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("DeepseekV3ForCausalLM", False),
        ("MixtralForCausalLM", True),
        ("Llama4ForCausalLM", False),  # its text model has the prefix of the multimodal one
        ("CTRLLMHeadModel", False),  # linear layers in a Sequential, called as the model's layers are
        ("MambaForCausalLM", False),  # PEFT takes no LoRA on some of its linear layers
        ("LagunaForCausalLM", False),  # PEFT's renaming takes new names for old ones
    ],
)
def test_a_class_walks_the_whole_road(name: str, full: bool) -> None:
    assert name in classes()
    (outcome,) = sweep([name], full=full)
    assert outcome.result == "agrees", outcome


def test_only_time_on_a_processor_counts() -> None:
    with _limited(1):
        time.sleep(1.3)
    with pytest.raises(TimeoutError, match="more than 1 s of processor time"), _limited(1):
        while True:
            pass
