"""Attention over packed rows: bfloat16 computes what float32 does, forwards and backwards."""

import pytest
import torch
from torch import nn

from sku_vllm.methods.method import Side
from sku_vllm.train.packed_attention import packed_attention
from sku_vllm.train.packing import pack_rows

ROWS = [[5, 6, 7, 8, 9], [5, 6, 4], [1], [5, 6, 7, 2, 3, 4, 5, 6, 7, 8, 1]]  # three begin alike, one is a single token
HEADS, SIZE = 3, 16


def computed(dtype: torch.dtype) -> list[torch.Tensor]:
    """The result and the gradients of query, key and value, in float32."""
    pack = pack_rows(ROWS, [Side.SERVED] * len(ROWS))
    torch.manual_seed(0)
    module = nn.Module()
    module.training, module.is_causal = True, True
    states = [torch.randn(1, HEADS, pack.ids.shape[1], SIZE).to(dtype).requires_grad_() for _ in range(3)]
    found, _ = packed_attention(module, *states, None, pack=pack, scaling=SIZE**-0.5)
    assert found.dtype is dtype
    (found.float() * torch.randn(found.shape)).sum().backward()
    return [found.detach().float(), *(state.grad.float() for state in states)]


def test_bfloat16_gives_what_float32_gives_to_its_own_precision() -> None:
    for exact, narrow in zip(computed(torch.float32), computed(torch.bfloat16), strict=True):
        assert narrow.shape == exact.shape
        assert float((narrow - exact).norm() / exact.norm()) < 0.01  # a bfloat16 number is known to 0.4 %


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_in_a_pack_attends_to_itself_alone(dtype: torch.dtype) -> None:
    pack = pack_rows(ROWS, [Side.SERVED] * len(ROWS))
    torch.manual_seed(1)
    module = nn.Module()
    module.training, module.is_causal = True, True
    query, key, value = (torch.randn(1, HEADS, pack.ids.shape[1], SIZE).to(dtype) for _ in range(3))
    found, _ = packed_attention(module, query, key, value, None, pack=pack, scaling=SIZE**-0.5)
    for places in pack.rows:
        scores = (query[0][:, places].float() @ key[0][:, places].float().mT) * SIZE**-0.5
        mask = torch.ones(len(places), len(places), dtype=torch.bool).triu(1)
        alone = scores.masked_fill(mask, -torch.inf).softmax(-1) @ value[0][:, places].float()
        torch.testing.assert_close(found[0, places].float(), alone.transpose(0, 1), rtol=0.02, atol=0.02)
