"""The ranks that an adapter is padded to, and vLLM is told, are those that the installed vLLM takes."""

from typing import get_args

import pytest

from sku_vllm.adapter.vllm_ranks import VLLM_RANKS, vllm_rank


def test_the_next_rank_holds_the_adapter():
    assert [vllm_rank(rank) for rank in (1, 2, 8, 33, 512)] == [1, 8, 8, 64, 512]
    assert vllm_rank(513) == 512


def test_they_are_those_of_the_installed_vllm():
    lora = pytest.importorskip("vllm.config.lora")
    assert get_args(lora.MaxLoRARanks) == VLLM_RANKS
