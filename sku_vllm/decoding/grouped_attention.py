"""Attention in which several query heads share a key-value head, without a copy of keys and values for each of them.

transformers repeats keys and values of grouped-query attention wherever a batch is padded (`repeat_kv`). Here the query heads of a group
become more queries of one head instead. Open this file to change how attention is computed while answers are generated and scored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sku_grouped"


def grouped_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface.

    Args:
        query: [rows, heads, queries, size]. key, value: [rows, heads / group, keys, size].
        attention_mask: [rows, 1, queries, keys], true where a query may look; None for a causal mask.
        kwargs: as for transformers' `sdpa_attention_forward`, which computes what has no groups or no mask.

    Returns:
        [rows, queries, heads, size], and None in the place of attention weights.
    """
    rows, heads, queries, size = query.shape
    shared = key.shape[1]
    if heads == shared or attention_mask is None or kwargs.get("position_bias") is not None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    group = heads // shared
    mask = attention_mask if queries == 1 else attention_mask.repeat(1, 1, group, 1)
    # Head h of the model reads key-value head h // group, so the heads of a group lie side by side.
    grouped = query.reshape(rows, shared, group * queries, size)
    states = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=kwargs.get("scaling"))
    return states.view(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model whose attention is transformers' "sdpa" computes it in groups; others are left as they are."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
