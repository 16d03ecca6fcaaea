"""Causal attention over a pack: every row sees only itself, and only attention ever sees padding.

The linear layers, which are nearly all of the work, run on the tokens alone. Rows of similar length share one
`scaled_dot_product_attention` call on a right-padded view; under a causal mask the padding is never seen, so no mask exists.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

if TYPE_CHECKING:
    from sku_vllm.data.packing import Pack

NAME = "sku_packed"


class _Pad(torch.autograd.Function):
    """Tokens [T, …] to their places in [N, …]. Indexing's own backward would add where copying is enough."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        return tokens.new_zeros(size, *tokens.shape[1:]).index_copy_(0, places, tokens)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, block: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.size = block.shape[0]
        return block.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    pack: "Pack",
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over a pack; query [1, heads, T, size], result [1, T, heads, size].

    Raises:
        NotImplementedError: soft-capped scores, which the kernel lacks (the trainer then falls back to padded batches).
    """
    if softcap is not None:
        raise NotImplementedError("soft-capped attention")
    parts = []
    for bucket in pack.buckets:
        blocks = []
        for states in (query, key, value):
            tokens = states[0].transpose(0, 1)[bucket.start:bucket.stop]
            if bucket.places is not None:
                tokens = _Pad.apply(tokens, bucket.places, bucket.count * bucket.length)
            blocks.append(tokens.reshape(bucket.count, bucket.length, *tokens.shape[1:]).transpose(1, 2))
        mask = _window(bucket.length, sliding_window, query.device)
        block, _ = sdpa_attention_forward(module, *blocks, mask, scaling=scaling, is_causal=True)
        tokens = block.flatten(0, 1)
        parts.append(tokens if bucket.places is None else _Unpad.apply(tokens, bucket.places))
    return torch.cat(parts).unsqueeze(0), None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """A causal band, only where rows are longer than the window."""
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return (ones.tril() & ones.triu(1 - window))[None, None]


AttentionInterface.register(NAME, packed_attention)
