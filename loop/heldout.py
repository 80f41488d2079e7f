"""Held-out loss per target token."""

import torch
from accelerate import Accelerator

from loop.collate import collate
from loop.data import Examples
from loop.loss import SummedLoss
from loop.order import cut


def heldout_loss(
    accelerator: Accelerator, loss: SummedLoss, examples: Examples, micro_batch_tokens: int, pad_token_id: int
) -> float:
    """Nats per target token over all held-out rows and processes; dropout off, the module's mode put back.

    Each micro-batch's sum is float32, their sum float64. One collective.
    """
    pieces = cut(examples.lengths, micro_batch_tokens, accelerator.num_processes)
    was_training = loss.training
    loss.eval()
    sums = []
    with torch.no_grad():
        for piece in pieces[accelerator.process_index :: accelerator.num_processes]:
            batch = collate(examples.read(piece), pad_token_id)
            sums.append(loss(batch.to(accelerator.device)))
    loss.train(was_training)
    total = accelerator.reduce(torch.stack(sums).double().sum(), "sum")
    return float(total) / int(examples.num_targets.sum())
