"""Before step 0: does the largest micro-batch of the run fit, does every tensor learn, are these the model's logits?"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from loop.batch import Batch
from loop.checkpoint import Checkpoint
from loop.collate import collate
from loop.data import Examples
from loop.errors import EnvironmentFault
from loop.loss import check_head
from loop.memory import is_out_of_memory
from loop.model import gradients
from loop.run import Run


def rehearse(run: Run, checkpoint: Checkpoint | None) -> tuple[Run, list[str]]:
    """Returns the run, with `micro_batch_tokens: auto` resolved, and a notice where the model's own logits are used.

    Leaves no other trace: gradients are dropped, and dropout is seeded anew for each micro-batch of a step.
    Raises: LoopError by the tensor's name; whatever the largest micro-batch raises."""
    exact = run.accelerator.mixed_precision == "no" and next(run.loss.parameters()).dtype.itemsize >= 4
    first = collate(run.data.train.read(np.array([0])), run.steps.pad_token_id).to(run.accelerator.device)
    difference = check_head(run.loss.eval(), first, tolerance=1e-4 if exact else 1e-2)
    run.loss.train()
    if run.config.micro_batch_tokens == "auto":
        before = checkpoint.environment.get("micro_batch_tokens") if checkpoint else None
        found: dict[str, Any] = {"micro_batch_tokens": largest_that_fits(run, before)}
        config, steps = dataclasses.replace(run.config, **found), dataclasses.replace(run.steps, **found)
        run = dataclasses.replace(run, config=config, steps=steps, environment={**run.environment, **found})
    else:
        forward_and_backward(run, run.steps.micro_batch_tokens)
    words = f"head(hidden) is {difference:.1%} off this model's own loss: its own logits are used, at their memory"
    return run, [words] if run.loss.whole_model else []


def forward_and_backward(run: Run, micro_batch_tokens: int) -> None:
    """The largest micro-batch of the run, once, beside as much memory as the optimizer and the sum will need."""
    trained = sum(parameter.numel() for parameter in run.parameters.values())
    room = torch.empty(4 * trained, device=run.accelerator.device)  # two moments, the flat gradient and its copy
    batch = largest_batch(run.data.train, micro_batch_tokens, run.steps.global_batch_size, run.steps.pad_token_id)
    run.accelerator.backward(run.loss(batch.to(run.accelerator.device)))
    gradients(run.parameters)
    run.optimizer.zero_grad(set_to_none=True)
    del room


def largest_that_fits(run: Run, first: int | None) -> int:
    """Halve, from `first` or a whole step in one forward per process, until every process has the memory.

    Raises: EnvironmentFault where the longest row alone does not fit."""
    longest = max(int(part.lengths.max(initial=2)) for part in (run.data.train, run.data.heldout))
    tokens = first or longest * math.ceil(run.steps.global_batch_size / run.accelerator.num_processes)
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
    raise EnvironmentFault(
        f"micro_batch_tokens: auto: not even the longest row, {longest} tokens, fits; lower max_length"
    )


def largest_batch(examples: Examples, micro_batch_tokens: int, global_batch_size: int, pad_token_id: int) -> Batch:
    """Rows of neighbouring lengths that fill one forward most: no micro-batch of training has more padded tokens."""
    longest_first = np.argsort(-examples.lengths, kind="stable")
    widths = examples.lengths[longest_first]
    rows = np.minimum(np.minimum(micro_batch_tokens // widths, global_batch_size), np.arange(len(widths), 0, -1))
    start = int(np.argmax(rows * widths))
    return collate(examples.read(longest_first[start : start + rows[start]]), pad_token_id)
