"""Attention over packed rows, block-diagonal and causal: each row sees itself and no other."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from loop.data.batch import Grid

ROWS = "rows"
"""The name under which transformers finds `rows_attention`, as it finds "sdpa" or "eager"."""


def biased_attention(qkv: Tensor, bias: Tensor, grids: list[Grid]) -> Tensor:
    """Attention with `bias` added to its scores, -inf where a key is not to be seen.

    Shapes: qkv (T, heads, 3, head size), a query, a key and a value; bias (1, heads, query, key) of
    the widest row, in four dimensions, because torch's kernels that keep no scores ask for them;
    returns (T, heads, head size)."""

    def attend(qkv: Tensor) -> Tensor:
        query, key, value = qkv.transpose(1, 2).unbind(-2)
        width = query.shape[2]
        mask = bias[..., :width, :width]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2)

    return _on_grids(attend, (qkv,), grids)


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    grids: list[Grid] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' own SDPA, on each grid of rows.

    Padding stands behind every token of its row, so none sees it. `grids` comes from `body.py`, as
    a keyword that the model's own forward hands down to its attention unread. Without it (a sample
    that is generated) this is transformers' SDPA, unchanged. Raises: ValueError for what that
    leaves to a mask, which is not made here, or does not have at all. Shapes: query (1, heads, T,
    head size), key and value with their own heads; returns (1, T, heads, head size)."""
    if grids is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window, widest = options.get("sliding_window"), max(grid.width for grid in grids)
    if options.get("s_aux") is not None or (window is not None and window < widest):
        raise ValueError("attention sinks, or a window narrower than a row")

    def attend(*padded: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in padded)
        return sdpa_attention_forward(module, q, k, v, None, **options)[0]

    end_to_end = tuple(tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _on_grids(attend, end_to_end, grids)[None], None


def _on_grids(
    attend: Callable[..., Tensor], tensors: tuple[Tensor, ...], grids: list[Grid]
) -> Tensor:
    """(T, ...) through `attend` on (rows, width, ...), grid by grid, and back."""
    sizes = [len(grid.positions) for grid in grids]
    mixed = []
    for grid, *parts in zip(grids, *(torch.split(tensor, sizes) for tensor in tensors)):
        mixed.append(grid.unpad(attend(*(grid.pad(part) for part in parts))))
    return torch.cat(mixed)


AttentionInterface.register(ROWS, rows_attention)
