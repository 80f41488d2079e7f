"""Each row sees itself, causally, and no other: held against softmax written out, one row at a
time, in float64."""

import math
from contextlib import suppress
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from loop.data.batch import Batch, Example
from loop.data.collate import collate
from loop.model.attention import (
    ROWS,
    alibi_columns,
    biased_attention,
    can_pack,
    packed_alibi_attention,
    rows_attention,
)

LENGTHS = [9, 8, 5, 1, 1]
HEADS, SIZE = 4, 8


def layout(padding_free: bool = True) -> Batch:
    return collate([Example([7] * length, 0) for length in LENGTHS], padding_free)


def random(heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(LENGTHS), heads, SIZE, generator=generator, dtype=torch.float64)


def by_hand(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None = None) -> Tensor:
    """Row by row, head by head, query by query."""
    result, start = torch.empty_like(query), 0
    for length in LENGTHS:
        for head in range(HEADS):
            shared = head * key.shape[1] // HEADS
            for place in range(length):
                seen = slice(start, start + place + 1)
                scores = key[seen, shared] @ query[start + place, head] / math.sqrt(SIZE)
                if slopes is not None:
                    scores = scores + slopes[head] * torch.arange(place + 1)
                result[start + place, head] = scores.softmax(0) @ value[seen, shared]
        start += length
    return result


@pytest.mark.parametrize("padding_free", [True, False])  # five grids, or one
def test_attention_with_a_bias_is_softmax_over_the_rows_own_past(padding_free: bool) -> None:
    query, key, value = (random(HEADS, seed) for seed in range(3))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    bias = (slopes[:, None, None] * torch.arange(9)).expand(HEADS, 9, 9)
    bias = bias.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    found = biased_attention(
        torch.stack([query, key, value], 2), bias[None], layout(padding_free).grids
    )
    torch.testing.assert_close(found, by_hand(query, key, value, slopes), rtol=0, atol=1e-13)


class Module(nn.Module):
    """What transformers' SDPA reads of a module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])  # 2 and 1: several heads share keys
def test_attention_of_any_model_is_softmax_over_the_rows_own_past(
    padding_free: bool, kv_heads: int
) -> None:
    query, key, value = random(HEADS, 0), random(kv_heads, 1), random(kv_heads, 2)
    given = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    batch = layout(padding_free)
    found, _ = rows_attention(
        Module(HEADS // kv_heads), *given, None, batch=batch, scaling=SIZE**-0.5
    )
    assert found.shape == (1, sum(LENGTHS), HEADS, SIZE)
    torch.testing.assert_close(found[0], by_hand(query, key, value), rtol=0, atol=1e-13)


def test_without_a_batch_it_is_transformers_own() -> None:
    given = [random(HEADS, seed).transpose(0, 1)[None] for seed in range(3)]
    expected, _ = sdpa_attention_forward(Module(1), *given, None)
    assert rows_attention(Module(1), *given, None)[0].equal(expected)


@pytest.mark.parametrize(
    "option", [{"s_aux": torch.zeros(HEADS)}, {"sliding_window": 8}]
)  # a row has 9 tokens
def test_what_transformers_leaves_to_a_mask_or_ignores_in_its_sdpa_is_refused(
    option: dict[str, Any],
) -> None:
    given = [random(HEADS, seed).transpose(0, 1)[None] for seed in range(3)]
    with pytest.raises(ValueError, match="attention sinks, or a window narrower than a row"):
        rows_attention(Module(1), *given, None, batch=layout(padding_free=True), **option)


def test_a_window_as_wide_as_the_longest_row_changes_nothing() -> None:
    given = [random(HEADS, seed).transpose(0, 1)[None] for seed in range(3)]
    found, _ = rows_attention(
        Module(1), *given, None, batch=layout(padding_free=True), sliding_window=9
    )
    torch.testing.assert_close(
        found[0], by_hand(*(t[0].transpose(0, 1) for t in given)), rtol=0, atol=1e-13
    )


def test_transformers_finds_it_by_its_name() -> None:
    assert AttentionInterface()[ROWS] is rows_attention


def test_attention_with_a_bias_keeps_no_scores_for_the_backward() -> None:
    """Of one row of 512 tokens; its scores would be as large as the bias, which every layer
    shares."""
    kept: list[int] = []
    qkv = torch.randn(512, HEADS, 3, SIZE, requires_grad=True)
    bias = torch.zeros(1, HEADS, 512, 512)
    grids = collate([Example([7] * 512, 0)], padding_free=True).grids
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.untyped_storage().nbytes()), id
    ):
        biased_attention(qkv, bias, grids)
    assert kept.count(4 * HEADS * 512 * 512) == 1  # 4 MiB, the bias itself
    assert sum(kept) < 1.25 * 4 * HEADS * 512 * 512


def stand_in(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *_: object, scale: float, **how: Any
) -> Tensor:
    """What torch's packed kernel computes, row by row, on a machine without a GPU."""
    assert how.pop("window_size") == (-1, 0)  # causal
    assert set(how) <= {"enable_gqa"}
    mixed, ends = [], starts.tolist()
    for start, end in pairwise(ends):
        row = [tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value)]
        mixed.append(
            F.scaled_dot_product_attention(*row, is_causal=True, scale=scale, enable_gqa=True)[0]
        )
    return torch.cat(mixed, 1).transpose(0, 1)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loop.model.attention.varlen_attn", stand_in)
    monkeypatch.setattr("loop.model.attention.can_pack", lambda *_: True)


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_attention_of_any_model_is_softmax_over_the_rows_own_past(kv_heads: int) -> None:
    query, key, value = random(HEADS, 0), random(kv_heads, 1), random(kv_heads, 2)
    given = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    found, _ = rows_attention(
        Module(HEADS // kv_heads), *given, None, batch=layout(), scaling=SIZE**-0.5
    )
    torch.testing.assert_close(found[0], by_hand(query, key, value), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize("option", [{"dropout": 0.1}, {"softcap": 30.0}])
def test_what_the_packed_kernel_is_not_told_goes_to_transformers_own(
    option: dict[str, Any],
) -> None:
    given, batch = [random(HEADS, seed).transpose(0, 1)[None] for seed in range(3)], layout()
    with mock.patch("loop.model.attention.packed_attention") as packed, suppress(ValueError):
        rows_attention(Module(1), *given, None, batch=batch, **option)
    packed.assert_not_called()


@pytest.mark.usefixtures("packs")
def test_packed_attention_with_alibi_is_softmax_with_the_bias_of_the_keys_place() -> None:
    query, key, value = (random(HEADS, seed) for seed in range(3))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    batch = layout()
    columns = alibi_columns(batch, slopes, torch.float64, SIZE)
    found = packed_alibi_attention(
        torch.stack([query, key, value], 2), columns, batch.starts, batch.longest
    )
    torch.testing.assert_close(
        found, by_hand(query, key, value, slopes), rtol=0, atol=1e-5
    )  # slopes are float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-7), (torch.float16, 1e-6)])
def test_columns_of_16_bits_hold_alibi_to_float32(dtype: torch.dtype, tolerance: float) -> None:
    slopes = torch.tensor(
        [0.84089642, 0.00390625], dtype=torch.float32
    )  # bloom-7b1's first and last
    of_query, of_key = alibi_columns(collate([Example([7] * 2048, 0)], True), slopes, dtype, 128)
    bias = torch.einsum("thc,thc->th", of_query.double(), of_key.double()) / math.sqrt(128)
    expected = slopes.double() * torch.arange(2048)[:, None]
    torch.testing.assert_close(bias, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("head_sizes", "found"), [({128}, True), ({128, 64}, False), ({264}, False), ({12}, False)]
)
def test_packed_kernel_is_taken_from_ampere_on_in_16_bits(
    head_sizes: set[int], found: bool
) -> None:
    gpu = torch.device("cuda")
    with mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)):
        assert can_pack(gpu, torch.bfloat16, head_sizes) == found
        assert not can_pack(gpu, torch.float32, head_sizes)
        assert not can_pack(torch.device("cpu"), torch.bfloat16, head_sizes)
    with mock.patch("torch.cuda.get_device_capability", return_value=(7, 5)):
        assert not can_pack(gpu, torch.float16, head_sizes)
