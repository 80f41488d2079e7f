"""Before step 0: do the run's largest micro-batches fit, and does each tensor get a gradient?"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from loop.data.batch import Batch, Example
from loop.data.collate import collate
from loop.data.examples import Examples
from loop.data.steps import Steps
from loop.errors import EnvironmentFault
from loop.model.lora import gradients
from loop.process.memory import is_out_of_memory
from loop.run.prepare import Run
from loop.state.checkpoint import Checkpoint


def rehearse(run: Run, checkpoint: Checkpoint | None) -> Run:
    """Returns the run, with `micro_batch_tokens: auto` resolved.

    Leaves no other trace: gradients are dropped, and dropout is seeded anew for each micro-batch of
    a step. Raises: LoopError by the tensor's name; whatever the largest micro-batches raise."""
    if run.config.micro_batch_tokens == "auto":
        before = checkpoint.environment.get("micro_batch_tokens") if checkpoint else None
        fitting: dict[str, Any] = {"micro_batch_tokens": largest_that_fits(run, before)}
        config = dataclasses.replace(run.config, **fitting)
        steps = dataclasses.replace(run.steps, **fitting)
        environment = {**run.environment, **fitting}
        run = dataclasses.replace(run, config=config, steps=steps, environment=environment)
    else:
        forward_and_backward(run, run.steps.micro_batch_tokens)
    return run


def forward_and_backward(run: Run, micro_batch_tokens: int) -> None:
    """The run's largest micro-batches, once, beside the memory that optimizer and sum will need."""
    trained = sum(parameter.numel() for parameter in run.parameters.values())
    # The flat gradient and its copy; two moments, unless a resume has them already.
    copies = 2 if run.optimizer.state else 4
    room = torch.empty(copies * trained, device=run.accelerator.device)
    for batch in largest_batches(run.data.train, micro_batch_tokens, run.steps):
        run.accelerator.backward(run.loss(batch.to(run.accelerator.device)))
        gradients(run.parameters)
        run.optimizer.zero_grad(set_to_none=True)
    del room


def largest_that_fits(run: Run, first: int | None) -> int:
    """Halve, from `first` or a process's share of a step, until every process has the memory.

    Raises: EnvironmentFault where the longest row alone does not fit."""
    longest = run.data.longest
    rows = math.ceil(run.steps.global_batch_size / run.accelerator.num_processes)
    tokens = first or longest * rows
    while tokens:
        fits = torch.ones(1, device=run.accelerator.device)
        try:
            forward_and_backward(run, tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits -= 1
        if not fits:  # outside of the except clause, whose error keeps the forward's tensors alive
            run.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        if run.accelerator.gather(fits).all():
            return tokens
        tokens = 0 if tokens == longest else max(longest, tokens // 2)
    reason = f"not even the longest row, {longest} tokens, fits"
    raise EnvironmentFault(f"micro_batch_tokens: auto: {reason}; lower max_length")


def largest_batches(examples: Examples, micro_batch_tokens: int, steps: Steps) -> list[Batch]:
    """Micro-batches as large as any in training: in tokens, in width, in what attention keeps.

    Without padding it is one, of pieces of the longest row: attention pads rows to one that is up
    to half as long again, and keeps the padded copies, so behind the whole row stand pieces of two
    thirds of it, or, where no more rows come to a step, of as much as fills the budget."""
    repeats = 1
    if steps.positions > len(examples):  # a step may straddle epochs
        repeats += math.ceil(steps.global_batch_size / len(examples))
    longest_first = np.repeat(np.argsort(-examples.lengths, kind="stable"), repeats)
    widths = examples.lengths[longest_first].astype(np.int64)
    if steps.padding_free:
        longest = min(int(widths[0]), micro_batch_tokens)
        step = int(widths[: steps.global_batch_size].sum())
        even = longest + step // steps.num_processes  # `cut` evens the processes
        tokens = min(micro_batch_tokens, step, even)
        share = math.ceil((tokens - longest) / max(1, steps.global_batch_size - 1))
        others = max(math.ceil(2 * longest / 3), min(share, longest - 1))
        behind = range(longest, tokens, others)
        lengths = [longest, *(min(others, tokens - start) for start in behind)]
        (row,) = examples.read(longest_first[:1])
        pieces = [Example(row.input_ids[:length], 0) for length in lengths]
        return [collate(pieces, padding_free=True)]
    # What a layer keeps grows with the tokens, what eager attention keeps with the rows and the
    # square of the width.
    fits = np.minimum(micro_batch_tokens // widths, steps.global_batch_size)
    fits = np.minimum(fits, np.arange(len(widths), 0, -1))
    starts = sorted({0, int(np.argmax(fits * widths)), int(np.argmax(fits * widths**2))})
    wholes = [examples.read(longest_first[at : at + fits[at]]) for at in starts]
    return [
        collate([Example(row.input_ids, 0) for row in rows], padding_free=False) for rows in wholes
    ]
