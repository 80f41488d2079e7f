"""Rows end to end, the grids they are padded on, and the one shift."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.batch import Batch, Example, Grid
from loop.data.collate import collate
from loop.model.body import padded_inputs

EOS, PAD = 2, 3


def test_rows_lie_end_to_end_and_each_target_is_the_token_behind_its_place() -> None:
    batch = collate(
        [Example([11, 12, 13, EOS], 0), Example([21, EOS], 0), Example([31, 32, EOS], 0)], True
    )
    assert batch.input_ids.tolist() == [11, 12, 13, EOS, 21, EOS, 31, 32, EOS]
    assert batch.target_positions.tolist() == [0, 1, 2, 4, 6, 7]
    assert batch.targets.tolist() == [12, 13, EOS, EOS, 32, EOS]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]


def test_for_a_model_that_is_given_padded_rows_all_are_one_grid_padded_on_the_right() -> None:
    batch = collate(
        [Example([11, 12, 13, EOS], 0), Example([21, EOS], 0), Example([31, 32, EOS], 0)], False
    )
    given_to_it = padded_inputs(batch)
    assert given_to_it["input_ids"].tolist() == [
        [11, 12, 13, EOS],
        [21, EOS, 0, 0],
        [31, 32, EOS, 0],
    ]
    assert given_to_it["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.target_positions.tolist() == [0, 1, 2, 4, 6, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ([9], [(1, 9)]),
        ([9, 9, 6], [(3, 9)]),  # 6 is two thirds of 9
        ([9, 9, 5], [(2, 9), (1, 5)]),
        ([90, 60, 59, 40, 39, 2, 1], [(2, 90), (2, 59), (1, 39), (1, 2), (1, 1)]),
        ([4, 9, 9], [(1, 4), (2, 9)]),  # a longer row never widens a grid
    ],
)
def test_rows_of_like_length_share_a_grid(
    lengths: list[int], shapes: list[tuple[int, int]]
) -> None:
    batch = collate([Example([7] * length, 0) for length in lengths], True)
    assert [(grid.rows, grid.width) for grid in batch.grids] == shapes


def test_every_field_is_int64_also_without_targets() -> None:
    for examples in ([Example([5, EOS], 0)], [Example([5], 0)], []):
        batch = collate(examples, True)
        assert {field.dtype for field in (*batch[:3], batch.grids[0].positions)} == {torch.int64}


@pytest.mark.parametrize(
    ("target_start", "targets"),
    [
        (0, [12, 13, 14]),
        (1, [12, 13, 14]),  # nothing precedes the first token, so 0 and 1 are the same
        (2, [13, 14]),
        (3, [14]),
        (4, []),  # a prompt that fills the row
        (9, []),  # and is cut
    ],
)
def test_tokens_of_the_prompt_are_never_targets(target_start: int, targets: list[int]) -> None:
    batch = collate([Example([8, 9], 0), Example([11, 12, 13, 14], target_start)], True)
    assert batch.targets.tolist() == [9, *targets]
    assert batch.target_positions.tolist() == [0, *range(5 - len(targets), 5)]


@pytest.mark.parametrize("padding_free", [True, False])
def test_end_of_text_is_a_target_and_padding_is_not_where_both_are_one_token(
    padding_free: bool,
) -> None:
    zero = 0  # what stands at padding
    batch = collate([Example([11, 12, zero], 0), Example([21, zero], 0)], padding_free)
    assert batch.targets.tolist() == [12, zero, zero]
    assert batch.target_positions.tolist() == [0, 1, 3]
    if not padding_free:
        assert padded_inputs(batch)["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_the_pad_token_inside_a_text_is_a_token_like_any() -> None:
    batch = collate([Example([11, PAD, 12, EOS], 0), Example([21], 0)], False)
    assert padded_inputs(batch)["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.targets.tolist() == [PAD, 12, EOS]


@pytest.mark.parametrize("padding_free", [True, False])
def test_no_examples_give_one_position_without_a_target(padding_free: bool) -> None:
    batch = collate([], padding_free)
    assert batch.input_ids.tolist() == [0]
    assert batch.targets.tolist() == batch.target_positions.tolist() == []
    assert [(grid.rows, grid.width, grid.positions.tolist()) for grid in batch.grids] == [
        (1, 1, [0])
    ]


examples = st.lists(
    st.builds(Example, st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 12)),
    min_size=1,
    max_size=6,
)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(examples, st.booleans())
def test_a_position_predicts_the_next_token_of_its_row_or_nothing(
    rows: list[Example], padding_free: bool
) -> None:
    batch = collate(rows, padding_free)
    wanted = dict(zip(batch.target_positions.tolist(), batch.targets.tolist()))
    place = 0
    for tokens, target_start in rows:
        for t, token in enumerate(tokens):
            is_target = t + 1 < len(tokens) and t + 1 >= target_start
            assert batch.input_ids[place] == token
            assert batch.position_ids[place] == t
            assert wanted.get(place) == (tokens[t + 1] if is_target else None)
            place += 1
    assert place == len(batch.input_ids)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(examples, st.booleans())
def test_padding_and_back_is_what_it_was_and_zero_elsewhere(
    rows: list[Example], padding_free: bool
) -> None:
    batch, start = collate(rows, padding_free), 0
    for grid in batch.grids:
        values = batch.input_ids[start : start + len(grid.positions)] + 1
        padded = grid.pad(values)
        assert padded.shape == (grid.rows, grid.width)
        assert grid.unpad(padded).equal(values)
        assert int(padded.sum()) == int(values.sum())
        start += len(values)
    assert start == len(batch.input_ids)


def test_padding_keeps_none_of_its_values_for_the_backward() -> None:
    grid = Grid(
        rows=2, width=3, positions=torch.tensor([0, 1, 2, 3])
    )  # three tokens, and one with two of padding
    values, kept = torch.arange(8.0).view(4, 2).requires_grad_(), list[int]()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda t: t
    ):
        padded = grid.pad(values)
    assert values.data_ptr() not in kept
    (padded * torch.arange(12.0).view(2, 3, 2)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.fixture(scope="module")
def model(bloom: Path) -> transformers.PreTrainedModel:
    loaded: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        bloom
    ).eval()
    return loaded


def mean_loss(model: transformers.PreTrainedModel, batch: Batch) -> float:
    """The textbook mean over targets, in numpy and float64."""
    (grid,) = batch.grids
    with torch.no_grad():
        logits = grid.unpad(model(**padded_inputs(batch)).logits).double().numpy()
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(-log_probabilities[batch.target_positions.numpy(), batch.targets.numpy()].mean())


def test_the_shift_happens_once_as_in_transformers_own_loss(
    model: transformers.PreTrainedModel,
) -> None:
    tokens = [17, 300, 41, 41, 9, 250, 383, EOS]
    row, batch = torch.tensor([tokens]), collate([Example(tokens, 0)], False)
    shifted = torch.tensor([[*batch.targets.tolist(), -100]])
    with torch.no_grad():
        expected = model(row, labels=row).loss.item()
        twice = model(row, labels=shifted).loss.item()
    assert mean_loss(model, batch) == pytest.approx(expected, abs=1e-6)
    assert twice != pytest.approx(expected, abs=1e-2), "this row would not notice a second shift"


def test_padding_changes_no_loss(model: transformers.PreTrainedModel) -> None:
    short, long = Example([17, 300, EOS], 0), Example([41, 9, 250, 383, 60, EOS], 2)
    both = mean_loss(model, collate([short, long], False)) * 6
    apart = (
        mean_loss(model, collate([short], False)) * 2 + mean_loss(model, collate([long], False)) * 4
    )
    assert both == pytest.approx(apart, abs=1e-5)


def test_targets_are_those_of_transformers_own_collator_where_pad_is_not_a_token(
    tokenizer_folder: Path,
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = [
        "Reading widely is excellent.",
        "Stone.",
        "“My father could tell good stone by the sound.”",
    ]
    rows = [tokenizer(text)["input_ids"] + [EOS] for text in texts]
    theirs = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)(
        [{"input_ids": row} for row in rows]
    )
    ours = collate([Example(row, 0) for row in rows], False)
    mask = padded_inputs(ours)["attention_mask"]
    assert mask.equal(theirs["attention_mask"])
    assert ours.input_ids.equal(theirs["input_ids"][mask.bool()])
    shifted = theirs["labels"][:, 1:]
    assert ours.targets.equal(shifted[shifted != -100])
