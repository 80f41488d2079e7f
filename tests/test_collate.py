"""Padding, the mask by length, and the one shift."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.batch import IGNORE_INDEX, Batch, Example
from loop.collate import collate

X = IGNORE_INDEX
EOS, PAD = 2, 3


def test_a_ragged_batch_is_padded_on_the_right_and_shifted_by_one() -> None:
    batch = collate([Example([11, 12, 13, EOS], 0), Example([21, EOS], 0), Example([31, 32, EOS], 0)], PAD)
    assert batch.input_ids.tolist() == [[11, 12, 13, EOS], [21, EOS, PAD, PAD], [31, 32, EOS, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.targets.tolist() == [[12, 13, EOS, X], [EOS, X, X, X], [32, EOS, X, X]]


def test_every_field_is_int64() -> None:
    assert {field.dtype for field in collate([Example([5, EOS], 0)], PAD)} == {torch.int64}


@pytest.mark.parametrize(
    ("target_start", "targets"),
    [
        (0, [12, 13, 14, X]),
        (1, [12, 13, 14, X]),  # nothing precedes the first token, so 0 and 1 are the same
        (2, [X, 13, 14, X]),
        (3, [X, X, 14, X]),
        (4, [X, X, X, X]),  # a prompt that fills the row
    ],
)
def test_tokens_of_the_prompt_are_never_targets(target_start: int, targets: list[int]) -> None:
    assert collate([Example([11, 12, 13, 14], target_start)], PAD).targets.tolist() == [targets]


def test_end_of_text_is_a_target_and_padding_is_not_where_both_are_one_token() -> None:
    batch = collate([Example([11, 12, EOS], 0), Example([21, EOS], 0)], pad_token_id=EOS)
    assert batch.input_ids.tolist() == [[11, 12, EOS], [21, EOS, EOS]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.targets.tolist() == [[12, EOS, X], [EOS, X, X]]


def test_the_pad_token_inside_a_text_is_a_token_like_any() -> None:
    batch = collate([Example([11, PAD, 12, EOS], 0), Example([21], 0)], PAD)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.targets.tolist() == [[PAD, 12, EOS, X], [X, X, X, X]]


def test_no_examples_give_one_position_without_a_target() -> None:
    batch = collate([], PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.attention_mask.tolist() == [[1]]
    assert batch.targets.tolist() == [[X]]


examples = st.lists(
    st.builds(Example, st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 12)), min_size=1, max_size=6
)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(examples, st.integers(0, 9))
def test_a_position_predicts_the_next_token_of_its_row_or_nothing(rows: list[Example], pad_token_id: int) -> None:
    batch = collate(rows, pad_token_id)
    width = max(len(tokens) for tokens, _ in rows)
    for row, (tokens, target_start) in enumerate(rows):
        for t in range(width):
            is_target = t + 1 < len(tokens) and t + 1 >= target_start
            assert batch.targets[row, t] == (tokens[t + 1] if is_target else X)
            assert batch.input_ids[row, t] == (tokens[t] if t < len(tokens) else pad_token_id)
            assert batch.attention_mask[row, t] == (t < len(tokens))


@pytest.fixture(scope="module")
def model(bloom: Path) -> transformers.PreTrainedModel:
    loaded: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(bloom).eval()
    return loaded


def mean_loss(model: transformers.PreTrainedModel, batch: Batch) -> float:
    """The textbook mean over targets, in numpy and float64."""
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits.double().numpy()
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    targets = batch.targets.numpy()
    rows, positions = np.nonzero(targets >= 0)
    return float(-log_probabilities[rows, positions, targets[rows, positions]].mean())


def test_the_shift_happens_once_as_in_transformers_own_loss(model: transformers.PreTrainedModel) -> None:
    tokens = [17, 300, 41, 41, 9, 250, 383, EOS]
    row = torch.tensor([tokens])
    with torch.no_grad():
        expected = model(row, labels=row).loss.item()
        twice = model(row, labels=collate([Example(tokens, 0)], PAD).targets).loss.item()
    assert mean_loss(model, collate([Example(tokens, 0)], PAD)) == pytest.approx(expected, abs=1e-6)
    assert twice != pytest.approx(expected, abs=1e-2), "this row would not notice a second shift"


def test_padding_changes_no_loss(model: transformers.PreTrainedModel) -> None:
    short, long = Example([17, 300, EOS], 0), Example([41, 9, 250, 383, 60, EOS], 2)
    both = mean_loss(model, collate([short, long], PAD)) * 6
    apart = mean_loss(model, collate([short], PAD)) * 2 + mean_loss(model, collate([long], PAD)) * 4
    assert both == pytest.approx(apart, abs=1e-5)


def test_targets_are_those_of_transformers_own_collator_where_pad_is_not_a_token(tokenizer_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = ["Reading widely is excellent.", "Stone.", "“My father could tell good stone by the sound.”"]
    rows = [tokenizer(text)["input_ids"] + [EOS] for text in texts]
    theirs = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row} for row in rows])
    ours = collate([Example(row, 0) for row in rows], PAD)
    assert ours.input_ids.equal(theirs["input_ids"])
    assert ours.attention_mask.equal(theirs["attention_mask"])
    assert ours.targets[:, :-1].equal(theirs["labels"][:, 1:])
    assert ours.targets[:, -1].eq(X).all()
