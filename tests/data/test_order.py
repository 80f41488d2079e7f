"""Which rows a step uses, and how they are cut and dealt."""

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.order import cut, draw, forward_tokens, num_positions, num_steps, permutation

quick = settings(derandomize=True, deadline=None, max_examples=60)


def rows_of_run(num_rows: int, epochs: float, batch: int, seed: int) -> list[list[int]]:
    positions = num_positions(num_rows, epochs, None, batch)
    return [
        draw(step, num_rows, positions, batch, seed)[1].tolist()
        for step in range(num_steps(positions, batch))
    ]


# The rows of a step.


@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [
        (0, 0, [0, 2, 3, 1]),
        (0, 1, [1, 2, 0, 3]),
        (42, 0, [4, 0, 3, 1, 2]),
        (7, 3, [1, 4, 5, 3, 2, 0]),
    ],
)
def test_the_order_of_an_epoch_is_the_one_of_order_version_1(
    seed: int, epoch: int, order: list[int]
) -> None:
    assert permutation(seed, epoch, len(order)).tolist() == order


def test_the_order_of_an_epoch_is_numpys_legacy_stream_of_seed_and_epoch() -> None:
    for seed, epoch, num_rows in [(42, 0, 563), (2**32 - 1, 2, 1000), (0, 100, 1)]:
        expected = np.random.RandomState([seed, epoch]).permutation(num_rows)
        np.testing.assert_array_equal(permutation(seed, epoch, num_rows), expected)


def test_steps_straddle_epochs_and_the_last_step_is_short() -> None:
    # Epoch 0 is 0 2 3 1 and epoch 1 is 1 2 0 3.
    assert rows_of_run(num_rows=4, epochs=2, batch=3, seed=0) == [[0, 2, 3], [1, 1, 2], [0, 3]]


def test_a_batch_larger_than_the_dataset_spans_epochs() -> None:
    assert rows_of_run(num_rows=4, epochs=2, batch=7, seed=0) == [[0, 2, 3, 1, 1, 2, 0], [3]]


@pytest.mark.parametrize(("step", "epoch"), [(0, 0), (1, 0), (2, 1)])
def test_the_epoch_of_a_step_is_its_first_rows(step: int, epoch: int) -> None:
    assert draw(step, num_rows=4, positions=8, global_batch_size=3, seed=0)[0] == epoch


@quick
@given(
    num_rows=st.integers(1, 40),
    epochs=st.integers(1, 4),
    batch=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_is_drawn_once_an_epoch(
    num_rows: int, epochs: int, batch: int, seed: int
) -> None:
    steps = rows_of_run(num_rows, epochs, batch, seed)
    drawn = [row for step in steps for row in step]
    assert len(drawn) == epochs * num_rows
    for epoch in range(epochs):
        assert sorted(drawn[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    assert {len(step) for step in steps[:-1]} <= {batch}
    assert 1 <= len(steps[-1]) <= batch


@quick
@given(
    num_rows=st.integers(1, 40),
    batch=st.integers(1, 50),
    step=st.integers(0, 20),
    seed=st.integers(0, 9),
)
def test_the_rows_of_a_step_do_not_depend_on_the_steps_asked_for_before(
    num_rows: int, batch: int, step: int, seed: int
) -> None:
    epochs = math.ceil((step + 1) * batch / num_rows)
    from_the_start = [
        np.random.RandomState([seed, epoch]).permutation(num_rows) for epoch in range(epochs)
    ]
    expected = np.concatenate(from_the_start)[step * batch : (step + 1) * batch]
    np.testing.assert_array_equal(draw(step, num_rows, 10**6, batch, seed)[1], expected)


def test_another_seed_and_another_epoch_are_another_order() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize(
    ("num_rows", "epochs", "drawn"),
    [
        (10, 1.0, 10),
        (10, 1.1, 11),
        (100, 1.1, 110),
        (100, 0.07, 7),
        (3, 2.5, 8),
        (10, 0.05, 1),
        (1000, 0.29, 290),
        (7, 3.0, 21),
        (10**9, 0.7, 7 * 10**8),
    ],
)
def test_a_fraction_of_an_epoch_is_rounded_up_to_a_row(
    num_rows: int, epochs: float, drawn: int
) -> None:
    assert num_positions(num_rows, epochs, None, 4) == drawn


def test_max_steps_replaces_epochs_and_every_step_is_full() -> None:
    assert num_positions(num_rows=10, num_train_epochs=3.0, max_steps=5, global_batch_size=4) == 20
    assert [len(draw(step, 10, 20, 4, seed=0)[1]) for step in range(5)] == [4] * 5


@pytest.mark.parametrize(
    ("positions", "batch", "steps"), [(20, 4, 5), (21, 4, 6), (3, 4, 1), (4, 1, 4)]
)
def test_the_last_step_may_be_short(positions: int, batch: int, steps: int) -> None:
    assert num_steps(positions, batch) == steps


# The micro-batches of a step.


@pytest.mark.parametrize(
    ("lengths", "budget", "processes", "pieces"),
    [
        ([1, 9, 3, 5], 10, 1, [[1], [3], [2, 0]]),  # 9 | 5 | 3 1: 5 5 would fit, 5 3 1 is 15
        ([4, 4, 4, 4], 8, 1, [[0, 1], [2, 3]]),  # equal lengths keep the drawn order
        ([2, 4, 2, 4, 2], 100, 1, [[1, 3, 0, 2, 4]]),
        ([5, 1, 1, 1, 1, 1], 6, 1, [[0], [1, 2, 3, 4, 5]]),
        ([3, 2, 1], 100, 3, [[0], [1], [2]]),  # three processes, one row each
        ([3], 100, 4, [[0], [], [], []]),
        ([], 100, 2, [[], []]),
        ([4, 4, 1, 1, 1, 1, 1], 8, 2, [[0, 1], [2, 3, 4, 5, 6]]),
        # 8 padded tokens need three pieces, two processes take four: the largest then holds 4.
        ([4, 4, 4, 1, 1, 1], 8, 2, [[0], [1], [2], [3, 4, 5]]),
    ],
)
def test_padded_rows_are_cut_longest_first(
    lengths: list[int], budget: int, processes: int, pieces: list[list[int]]
) -> None:
    assert [
        piece.tolist() for piece in cut(np.array(lengths), budget, processes, padding_free=False)
    ] == pieces


@pytest.mark.parametrize(
    ("lengths", "budget", "processes", "pieces"),
    [
        ([1, 9, 3, 5], 10, 1, [[1], [3, 2, 0]]),  # 9 | 5 3 1
        ([1, 9, 3, 5], 18, 1, [[1, 3, 2, 0]]),
        ([4, 4, 4, 4], 8, 1, [[0, 1], [2, 3]]),
        ([5, 1, 1, 1, 1, 1], 6, 1, [[0], [1, 2, 3, 4, 5]]),  # 5 | 5, not 6 | 4
        ([3, 2, 1], 100, 3, [[0], [1], [2]]),
        ([6, 6, 6, 6], 24, 2, [[0, 1], [2, 3]]),
        ([3], 100, 4, [[0], [], [], []]),
        ([], 100, 2, [[], []]),
    ],
)
def test_rows_without_padding_are_cut_by_the_sum_of_their_lengths(
    lengths: list[int], budget: int, processes: int, pieces: list[list[int]]
) -> None:
    assert [
        piece.tolist() for piece in cut(np.array(lengths), budget, processes, padding_free=True)
    ] == pieces


def test_the_pieces_allowed_are_used_to_make_the_largest_small() -> None:
    # The budget alone would put all four on process 0.
    assert [piece.tolist() for piece in cut(np.array([6, 6, 6, 6]), 24, 2, padding_free=False)] == [
        [0, 1],
        [2, 3],
    ]


@pytest.mark.parametrize(
    ("lengths", "padded", "free"), [([7, 2, 2], 21, 11), ([7], 7, 7), ([], 1, 1)]
)
def test_a_forward_computes_every_token_or_as_many_a_row_as_the_longest_has(
    lengths: list[int], padded: int, free: int
) -> None:
    rows = np.array(lengths, dtype=np.int32)
    assert (forward_tokens(rows, padding_free=False), forward_tokens(rows, padding_free=True)) == (
        padded,
        free,
    )


def size(lengths: np.ndarray, piece: np.ndarray, padding_free: bool) -> int:
    held = [int(lengths[row]) for row in piece]
    return sum(held) if padding_free else len(held) * max(held, default=0)


cuts = st.tuples(
    st.lists(st.integers(1, 30), max_size=40),
    st.integers(30, 200),
    st.integers(1, 5),
    st.booleans(),
)


@quick
@given(cuts)
def test_the_pieces_are_a_partition_of_the_rows_within_the_budget(
    case: tuple[list[int], int, int, bool],
) -> None:
    lengths, budget, processes, padding_free = np.array(case[0], dtype=np.int32), *case[1:]
    pieces = cut(lengths, budget, processes, padding_free)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(lengths)))
    assert max(size(lengths, piece, padding_free) for piece in pieces) <= budget
    assert len(pieces) % processes == 0


@quick
@given(cuts)
def test_rows_are_sorted_longest_first_and_equal_lengths_keep_the_drawn_order(
    case: tuple[list[int], int, int, bool],
) -> None:
    lengths = case[0]
    dealt = [
        int(row) for piece in cut(np.array(lengths, dtype=np.int32), *case[1:]) for row in piece
    ]
    assert dealt == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


@quick
@given(cuts)
def test_a_piece_is_empty_only_where_rows_are_fewer_than_pieces(
    case: tuple[list[int], int, int, bool],
) -> None:
    sizes = [len(piece) for piece in cut(np.array(case[0], dtype=np.int32), *case[1:])]
    assert sizes.count(0) == max(0, len(sizes) - len(case[0]))
    assert sizes == sorted(sizes, key=lambda size: size == 0), "empty pieces are last"


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    """Every way to put rows into groups, without order."""
    if not rows:
        yield []
        return
    for smaller in partitions(rows[1:]):
        yield [rows[:1], *smaller]
        for i, group in enumerate(smaller):
            yield [*smaller[:i], [rows[0], *group], *smaller[i + 1 :]]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(12, 40), st.integers(1, 3))
def test_no_way_to_group_the_rows_needs_fewer_pieces(
    lengths: list[int], budget: int, processes: int
) -> None:
    within = [
        way
        for way in partitions(lengths)
        if all(len(group) * max(group) <= budget for group in way)
    ]
    fewest = min(len(way) for way in within)
    allowed = math.ceil(fewest / processes) * processes
    pieces = cut(np.array(lengths), budget, processes, padding_free=False)
    assert len(pieces) == allowed
    smallest = min(
        max(len(group) * max(group) for group in way) for way in within if len(way) <= allowed
    )
    assert (
        max(len(piece) * max((lengths[row] for row in piece), default=0) for piece in pieces)
        == smallest
    )


def test_a_row_above_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="11 tokens is above micro_batch_tokens 10"):
        cut(np.array([3, 11]), 10, 1, padding_free=True)


def test_a_row_of_exactly_the_budget_fits() -> None:
    assert Counter(len(piece) for piece in cut(np.array([10, 10]), 10, 1, True)) == {1: 2}
