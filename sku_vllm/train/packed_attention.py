"""Causal attention over packed rows (packing.py), in which every row attends to itself alone.

All other layers, which are nearly all of the work, run on the pack's distinct tokens, without padding. For attention, rows of similar
length are spread into a right-padded block for one `scaled_dot_product_attention` call; a causal row never attends to padding at its
right, so no padding mask is needed. Open this file to support another kind of attention.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

if TYPE_CHECKING:
    from sku_vllm.train.packing import Pack

NAME = "sku_packed"


class _Spread(torch.autograd.Function):
    """Copy tokens [T, …] to their places in a pack's blocks [N, …]; backward adds up the gradients of a token's places."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, pack: "Pack") -> torch.Tensor:
        ctx.pack = pack
        return tokens.index_select(0, pack.source)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        shared, places = ctx.pack.again
        tokens = grad.index_select(0, ctx.pack.place)
        return tokens.index_add_(0, shared, grad.index_select(0, places)) if len(shared) else tokens, None


class _Gather(torch.autograd.Function):
    """Read each token's result [T, …] from the blocks [N, …]; a token with several places has equal results there, and one is read."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, pack: "Pack") -> torch.Tensor:
        ctx.pack, ctx.size = pack, places.shape[0]
        return places.index_select(0, pack.place)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, ctx.pack.place, grad), None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pack: "Pack",
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over a pack.

    Args:
        query, key, value: [1, heads, T, size]. attention_mask: not read, since a pack has none.
        scaling: of the scores. kwargs: what else the architecture passes; `sliding_window` and `softcap` are read.

    Returns:
        [1, T, heads, size], and None in the place of attention weights.

    Raises:
        NotImplementedError: soft-capped scores, which the kernel lacks (the trainer then falls back to padded batches).
    """
    if kwargs.get("softcap") is not None:
        raise NotImplementedError("soft-capped attention")
    spread: list[torch.Tensor] = [
        _Spread.apply(states[0].transpose(0, 1), pack)  # type: ignore[no-untyped-call]  # torch types no Function.apply
        for states in (query, key, value)
    ]
    # split, not slices: the gradient of a slice is a tensor of the whole's size, mostly zeros.
    parts = zip(*(torch.split(states, [count * length for count, length in pack.blocks]) for states in spread), strict=True)
    results = []
    for (count, length), part in zip(pack.blocks, parts, strict=True):
        queries, keys, values = (states.view(count, length, *states.shape[1:]).transpose(1, 2) for states in part)
        mask = _window(length, kwargs.get("sliding_window"), query.device)
        if slow_backward(queries):
            queries, keys, values = queries.float(), keys.float(), values.float()
        found, _ = sdpa_attention_forward(module, queries, keys, values, mask, scaling=scaling, is_causal=True)
        results.append(found.flatten(0, 1).to(query.dtype))
    gathered: torch.Tensor = _Gather.apply(torch.cat(results), pack)  # type: ignore[no-untyped-call]  # torch types no Function.apply
    return gathered.unsqueeze(0), None


def slow_backward(queries: torch.Tensor) -> bool:
    """Whether float32 is faster: torch's backward pass for bfloat16 on CPUs takes 2.6 times as long for rows of 64 to 100 tokens."""
    return queries.device.type == "cpu" and queries.dtype is torch.bfloat16 and queries.requires_grad


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """A causal band, only where rows are longer than the window."""
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return (ones.tril() & ones.triu(1 - window))[None, None]


AttentionInterface.register(NAME, packed_attention)
