"""What several rows of tokens begin with, so that it is computed once. Open this file to change how that is found."""

from collections.abc import Sequence


def common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all rows begin with; the first and the last row in lexical order share what all share."""
    first, last = min(map(tuple, rows)), max(map(tuple, rows))
    same = next((at for at, token in enumerate(first) if token != last[at]), len(first))
    return list(first[:same])


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one token of each is not among them."""
    return min(len(common_prefix(prompts)), min(map(len, prompts)) - 1)
