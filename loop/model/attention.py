"""Attention over packed rows, block-diagonal and causal: each row sees itself and no other."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from loop.data.batch import Batch, Grid

ROWS = "rows"
"""The name under which transformers finds `rows_attention`, as it finds "sdpa" or "eager"."""
_VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters
# torch 2.11 takes fewer heads of keys without being told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in _VARLEN_OPTIONS else {}
_ALIBI_COLUMNS = 8
"""The kernel's head sizes are multiples of 8; six are used: three parts of a slope by two of a
position."""


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Does torch's FlashAttention 2 (Dao 2023) run here? It does in 16 bits, from Ampere on."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def can_pack(device: torch.device, dtype: torch.dtype, head_sizes: set[int]) -> bool:
    """Can all packed rows go through one launch? Elsewhere they go grid by grid."""
    size = max(head_sizes)
    return len(head_sizes) == 1 and size <= 256 and size % 8 == 0 and has_flash(device, dtype)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    scale: float | None = None,
) -> Tensor:
    """Block-diagonal causal attention of all rows in one launch, whatever their lengths.

    Its backward adds in no fixed order where a row is longer than one of its blocks, unless
    `full_determinism` asks for one. Shapes: (T, heads, head size) all, key and value with their own
    heads; starts (rows + 1,)."""
    causal: dict[str, Any] = {"window_size": (-1, 0), "scale": scale, **_GROUPED}
    mixed = varlen_attn(query, key, value, starts, starts, longest, longest, **causal)
    assert isinstance(mixed, Tensor)  # a pair only where its sums are wanted too
    return mixed


def alibi_columns(
    batch: Batch, slopes: Tensor, dtype: torch.dtype, head_size: int
) -> tuple[Tensor, Tensor]:
    """ALiBi for a kernel without a bias: columns of query and key whose product is the bias.

    Softmax does not change if all scores of a query do alike, so slope * the key's position will
    do. The slope, times what undoes the kernel's scale, is the sum of three numbers of 16 bits, the
    position of two, so that ALiBi is exact to float32; a bias in bfloat16 is off by half a nat at
    256 tokens, by four at 2,048.

    Source: Press et al. 2022 (ALiBi). Shapes: slopes (heads,) -> (T, heads, 8) for the query, the
    same for the key."""
    position = batch.position_ids
    rest, parts = slopes.float() * head_size**0.5, []
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    coarse, fine = (position - position % 256).to(dtype), (position % 256).to(dtype)
    unused = (0, _ALIBI_COLUMNS - 6)
    of_query = F.pad(torch.stack(parts * 2, -1), unused)
    of_key = F.pad(torch.stack([coarse] * 3 + [fine] * 3, -1), unused)
    shape = (len(position), len(slopes), _ALIBI_COLUMNS)
    return of_query[None].expand(shape), of_key[:, None].expand(shape)


def packed_alibi_attention(
    qkv: Tensor, columns: tuple[Tensor, Tensor], starts: Tensor, longest: int
) -> Tensor:
    """`packed_attention` with `alibi_columns`. Shapes: as those of `biased_attention`."""
    query, key, value = qkv.unbind(2)
    size = qkv.shape[-1]
    query, key = (torch.cat(pair, -1) for pair in zip((query, key), columns))
    value = F.pad(value, (0, _ALIBI_COLUMNS))  # the kernel takes one head size for all three
    return packed_attention(query, key, value, starts, longest, size**-0.5)[..., :size]


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
    batch: Batch | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """All rows in one launch where there is a kernel for it, else transformers' SDPA, by grids.

    In a grid padding stands behind every token of its row, so none sees it. `batch` comes from
    `body.py`, as a keyword that the model's own forward hands down to its attention unread. Without
    it (a sample that is generated) this is transformers' SDPA, unchanged.

    Raises: ValueError for what that leaves to a mask, which is not made here, or does not have.
    Shapes: query (1, heads, T, head size), key and value with their own heads; returns (1, T,
    heads, head size)."""
    if batch is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    if options.get("s_aux") is not None or (window is not None and window < batch.longest):
        raise ValueError("attention sinks, or a window narrower than a row")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    dtype, head_sizes = attention_dtype(query), {tensor.shape[-1] for tensor in (q, k, v)}
    if _is_plain(module, options) and can_pack(query.device, dtype, head_sizes):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        scale = options.get("scaling")
        return packed_attention(q, k, v, batch.starts, batch.longest, scale)[None], None
    if query.is_cuda and not has_flash(query.device, dtype):
        # Only flash takes fewer heads of keys; other kernels without scores want them repeated, and
        # a module that does not say how many there were.
        module, options = nn.Module(), {**options, "is_causal": _is_causal(module, options)}
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))

    def attend(*padded: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in padded)
        return sdpa_attention_forward(module, q, k, v, None, **options)[0]

    return _on_grids(attend, (q, k, v), batch.grids)[None], None


def _is_plain(module: nn.Module, options: dict[str, Any]) -> bool:
    """Does the model want nothing of its attention that the packed kernel is not told?"""
    others = ("softcap", "position_bias")
    is_extended = any(options.get(name) is not None for name in others)
    return _is_causal(module, options) and not options.get("dropout") and not is_extended


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def attention_dtype(values: Tensor) -> torch.dtype:
    """What autocast makes of these for attention."""
    device = values.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype


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
