"""Examples -> one Batch, packed (varlen). Targets are shifted here, and nowhere else."""

from collections.abc import Sequence

import numpy as np
import torch

from loop.data.batch import Batch, Example, Grid

NOTHING = Example([0], 0)
"""What stands in for no examples: one token without a target, which adds zero to the loss."""


def collate(examples: Sequence[Example], padding_free: bool) -> Batch:
    """Lay the rows end to end and shift: the target of a position is the token behind it.

    A token is a target if it stands at or after the example's `target_start` and is not its row's
    first, which nothing precedes. No token value means anything here, so a real end-of-text is a
    target even where the pad token is the same token.

    Shapes: T is the sum of the lengths, N the number of targets; (1,) and (0,) for no examples."""
    examples = examples or [NOTHING]
    lengths = [len(example.input_ids) for example in examples]
    ends = np.cumsum(lengths)
    input_ids = torch.tensor([token for example in examples for token in example.input_ids])
    target_positions = torch.tensor(
        [
            position
            for example, length, end in zip(examples, lengths, ends)
            for position in range(end - length + max(1, example.target_start) - 1, end - 1)
        ],
        dtype=torch.int64,
    )
    targets = input_ids[target_positions + 1]  # the shift
    starts = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    return Batch(input_ids, target_positions, targets, _grids(lengths, padding_free), starts)


def _grids(lengths: list[int], padding_free: bool) -> list[Grid]:
    """One grid for padded rows; else a row of a grid has two thirds to all of its first's length.

    Attention is computed on these, so sorted rows cost it few kernels and little padding."""
    starts = [0]
    for row, length in enumerate(lengths):
        first = lengths[starts[-1]]
        if padding_free and not 2 * first <= 3 * length <= 3 * first:
            starts.append(row)
    grids = []
    for start, end in zip(starts, [*starts[1:], len(lengths)]):
        width = max(lengths[start:end])
        rows = enumerate(lengths[start:end])
        positions = np.concatenate([row * width + np.arange(length) for row, length in rows])
        grids.append(Grid(end - start, width, torch.from_numpy(positions)))
    return grids
