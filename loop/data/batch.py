"""The data contract: what one forward is given, and nothing else."""

from typing import NamedTuple

import torch
from torch import Tensor


class Example(NamedTuple):
    """One tokenized row, before the shift."""

    input_ids: list[int]
    """All its tokens, a prompt's included, the end-of-text last unless the row was truncated."""
    target_start: int
    """Index of the first token that may be a target: the prompt's length, or 0."""


class Grid(NamedTuple):
    """Consecutive rows of a micro-batch as a rectangle, padded on the right."""

    rows: int
    width: int  # tokens of the longest of them
    positions: Tensor  # (tokens of the rows,) int64: where each is in the rectangle, row by row

    def pad(self, values: Tensor) -> Tensor:
        """(tokens, ...) -> (rows, width, ...), zero at padding."""
        padded = values
        if not self._is_full:
            padded = values.new_zeros((self.rows * self.width, *values.shape[1:]))
            padded[self.positions] = values  # index_copy_ would keep `values` for backward
        return padded.view(self.rows, self.width, *values.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """(rows, width, ...) -> (tokens, ...)."""
        flat = padded.flatten(0, 1)
        return flat if self._is_full else flat.index_select(0, self.positions)

    @property
    def _is_full(self) -> bool:
        """Is no row shorter than another? Then nothing need be copied."""
        return len(self.positions) == self.rows * self.width


class Batch(NamedTuple):
    """One micro-batch: its rows end to end, T tokens, without padding; N of them have a target.

    The field is called `targets`, not `labels`: it is already shifted, and a model's `labels`
    argument would shift it a second time. Everything is laid out on the host, so that no forward
    waits for a count from the GPU. A NamedTuple is what torch's loader pins by itself."""

    input_ids: Tensor  # (T,) int64
    target_positions: Tensor  # (N,) int64: the positions that have a target, ascending
    targets: Tensor  # (N,) int64: the token that each of them must predict
    grids: list[Grid]  # the rows in their order; one grid for a model that is given padded rows
    starts: Tensor  # (rows + 1,) int32: where each row starts, and T, for attention's packed kernel

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(grid.width for grid in self.grids)

    @property
    def position_ids(self) -> Tensor:
        """(T,) int64: the position of each token in its row."""
        return torch.cat([grid.positions % grid.width for grid in self.grids])

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`; asynchronous from pinned memory: the stream orders what follows."""
        ids, target_positions, targets, starts = (
            field.to(device, non_blocking=True) for field in (*self[:3], self.starts)
        )
        grids = [
            grid._replace(positions=grid.positions.to(device, non_blocking=True))
            for grid in self.grids
        ]
        return Batch(ids, target_positions, targets, grids, starts)
