"""A sample of `make sweep`: classes that go through other conversions than those of tests/test_architectures.py."""

import pytest

from sku_vllm.benchmarks.sweep import classes, sweep


@pytest.mark.parametrize(("name", "full"), [("DeepseekV3ForCausalLM", False), ("MixtralForCausalLM", True)])
def test_a_class_walks_the_whole_road(name: str, full: bool) -> None:
    assert name in classes()
    (outcome,) = sweep([name], full=full)
    assert outcome.result == "agrees", outcome
