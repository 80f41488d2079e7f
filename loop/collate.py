"""Examples -> one padded Batch. Targets are shifted here, and nowhere else in the project."""

from collections.abc import Sequence

import torch

from loop.batch import IGNORE_INDEX, Batch, Example


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad on the right to the longest example and shift: the target of position t is token t + 1.

    A token is a target if it stands at or after the example's `target_start` and is not its first token, which
    nothing precedes. Padding is known by length, never by token value, so a real end-of-text is a target even where
    the pad token is the same token. No examples give one row of padding without a target: it adds zero to the loss.

    Shapes: (B, T) with T the longest length; (1, 1) for no examples."""
    width = max((len(example.input_ids) for example in examples), default=1)
    size = (max(1, len(examples)), width)
    input_ids = torch.full(size, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(size, dtype=torch.int64)
    targets = torch.full(size, IGNORE_INDEX, dtype=torch.int64)
    for row, (tokens, target_start) in enumerate(examples):
        length, start = len(tokens), max(1, target_start)
        ids = torch.tensor(tokens, dtype=torch.int64)
        input_ids[row, :length] = ids
        attention_mask[row, :length] = 1
        targets[row, start - 1 : length - 1] = ids[start:]
    if not examples:
        attention_mask[:] = 1  # a softmax over no position at all would be NaN
    return Batch(input_ids, attention_mask, targets)
