"""Causal attention over a pack: every row sees only itself, and only attention ever sees padding.

The linear layers, which are nearly all of the work, run on the pack's different tokens alone. Rows of similar length share one
`scaled_dot_product_attention` call on a right-padded block; under a causal mask the padding is never seen, so no mask exists.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

if TYPE_CHECKING:
    from sku_vllm.data.packing import Pack

NAME = "sku_packed"


class _Spread(torch.autograd.Function):
    """Tokens [T, …] to the places of a pack's blocks [N, …]. Backward copies, and adds only where rows share tokens."""

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
    """Results [N, …] back to tokens [T, …]: rows that share a token have the same result there."""

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
    spread = [_Spread.apply(states[0].transpose(0, 1), pack) for states in (query, key, value)]
    # split, not slices: the gradient of a slice is a tensor of the whole's size, mostly zeros.
    parts = zip(*(states.split([count * length for count, length in pack.blocks]) for states in spread), strict=True)
    results = []
    for (count, length), part in zip(pack.blocks, parts, strict=True):
        block = [states.view(count, length, *states.shape[1:]).transpose(1, 2) for states in part]
        mask = _window(length, sliding_window, query.device)
        found, _ = sdpa_attention_forward(module, *block, mask, scaling=scaling, is_causal=True)
        results.append(found.flatten(0, 1))
    return _Gather.apply(torch.cat(results), pack).unsqueeze(0), None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """A causal band, only where rows are longer than the window."""
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return (ones.tril() & ones.triu(1 - window))[None, None]


AttentionInterface.register(NAME, packed_attention)
