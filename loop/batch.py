"""The data contract: what one forward is given, and nothing else."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Written where a position has no target. The value that `torch.nn.functional.cross_entropy` ignores."""


class Example(NamedTuple):
    """One tokenised row, before padding and before the shift."""

    input_ids: list[int]
    """All its tokens, a prompt's included, the end-of-text last unless the row was truncated."""
    target_start: int
    """Index of the first token that may be a target: the prompt's length, or 0."""


class Batch(NamedTuple):
    """One micro-batch: B rows, right-padded to the longest of them, T tokens wide.

    The field is called `targets`, not `labels`: it is already shifted, and a model's `labels` argument
    would shift it a second time. A NamedTuple, so that torch's loader pins it without a line of ours.

    Shapes: each field is (B, T), int64."""

    input_ids: Tensor  # token ids; any legal id at padding, where it is neither attended to nor a target
    attention_mask: Tensor  # 1 for a token of the row, 0 for padding; made from lengths, never from token values
    targets: Tensor  # targets[b, t] is the token that position t must predict, or IGNORE_INDEX

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`; asynchronous from pinned memory, because the stream orders what follows."""
        return Batch(*(field.to(device, non_blocking=True) for field in self))
