"""Each row sees itself, causally, and no other: held against softmax written out, one row at a
time, in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from loop.data.batch import Batch, Example
from loop.data.collate import collate
from loop.model.attention import ROWS, biased_attention, rows_attention

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
    grids = layout(padding_free).grids
    found, _ = rows_attention(
        Module(HEADS // kv_heads), *given, None, grids=grids, scaling=SIZE**-0.5
    )
    assert found.shape == (1, sum(LENGTHS), HEADS, SIZE)
    torch.testing.assert_close(found[0], by_hand(query, key, value), rtol=0, atol=1e-13)


def test_without_grids_it_is_transformers_own() -> None:
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
        rows_attention(Module(1), *given, None, grids=layout(padding_free=True).grids, **option)


def test_a_window_as_wide_as_the_longest_row_changes_nothing() -> None:
    given = [random(HEADS, seed).transpose(0, 1)[None] for seed in range(3)]
    found, _ = rows_attention(
        Module(1), *given, None, grids=layout(padding_free=True).grids, sliding_window=9
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
