"""Held-out loss per target token."""

import math

import torch
from accelerate import Accelerator

from loop.data.collate import collate
from loop.data.examples import Examples
from loop.data.order import cut
from loop.data.steps import Steps
from loop.errors import NonFiniteError
from loop.model.loss import SummedLoss


def heldout_loss(
    accelerator: Accelerator, loss: SummedLoss, examples: Examples, steps: Steps
) -> float:
    """Nats per target token over all held-out rows and processes, cut like training steps.

    Dropout is off, and the mode is put back. Each micro-batch's sum is float32, their sum float64.
    One collective. Raises: NonFiniteError, on every process alike."""
    pieces = cut(
        examples.lengths, steps.micro_batch_tokens, accelerator.num_processes, steps.padding_free
    )
    was_training = loss.training
    loss.eval()
    sums = []
    with torch.no_grad():
        for piece in pieces[accelerator.process_index :: accelerator.num_processes]:
            batch = collate(examples.read(piece), steps.padding_free)
            sums.append(loss(batch.to(accelerator.device)))
    loss.train(was_training)
    total = accelerator.reduce(torch.stack(sums).double().sum(), "sum")
    loss_per_target = float(total) / int(examples.num_targets.sum())
    if not math.isfinite(loss_per_target):
        raise NonFiniteError(
            f"the held-out loss is {loss_per_target}; the last checkpoint is intact"
        )
    return loss_per_target
