"""Attention over rows that lie end to end: each row sees itself, causally, and no other."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from loop.batch import Grid

ROWS = "rows"
"""The name under which transformers finds `rows_attention`, as it finds "sdpa" or "eager"."""


def biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grids: list[Grid]) -> Tensor:
    """Attention with `bias` added to its scores, -inf where a key is not to be seen.

    Shapes: query, key, value and the result (T, heads, head size); bias (heads, query, key) of the widest row."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width = q.shape[2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, :width, :width]).transpose(1, 2)

    return _on_grids(attend, query, key, value, grids)


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    grids: list[Grid] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' own SDPA, on each grid of rows. Padding stands behind every token of its row, so none sees it.

    Without `grids` (a sample that is generated) it is transformers' SDPA, unchanged.
    Shapes: query (1, heads, T, head size), key and value with their own heads; returns (1, T, heads, head size)."""
    if grids is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa_attention_forward(module, q, k, v, None, **options)[0]

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _on_grids(attend, query, key, value, grids)[None], None


def _on_grids(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, grids: list[Grid]
) -> Tensor:
    """(T, heads, head size) through `attend` on (rows, heads, width, head size), grid by grid, and back."""
    sizes = [len(grid.places) for grid in grids]
    mixed = []
    for grid, *qkv in zip(grids, *(torch.split(tensor, sizes) for tensor in (query, key, value))):
        q, k, v = (grid.pad(tensor).transpose(1, 2) for tensor in qkv)
        mixed.append(grid.unpad(attend(q, k, v)))
    return torch.cat(mixed)


AttentionInterface.register(ROWS, rows_attention)
