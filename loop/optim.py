"""AdamW over the adapter, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loop.config import Config
from loop.errors import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def adamw(parameters: Iterable[nn.Parameter], config: Config) -> torch.optim.AdamW:
    """torch's AdamW (Loshchilov and Hutter 2019), in the order given. The step's learning rate is set by the loop."""
    return torch.optim.AdamW(
        list(parameters),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def warmup(config: Config, num_steps: int) -> int:
    """Warm-up in steps; a `warmup_steps` below 1 is a share of the run, rounded up."""
    return math.ceil(config.warmup_steps * num_steps) if config.warmup_steps < 1 else int(config.warmup_steps)


def learning_rate(step: int, config: Config, num_steps: int) -> float:
    """The learning rate of update `step` (0-based) of `num_steps`, whatever the number of processes.

    Source: transformers 5.23, optimization.py, get_{constant,linear,cosine}_schedule_with_warmup. So with warm-up
    step 0 has rate 0 and step `warmup` the peak, and the last step is one short of 0."""
    ramp = warmup(config, num_steps)
    if step < ramp:
        return config.learning_rate * step / ramp
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = (step - ramp) / max(1, num_steps - ramp)
    shape = 1 - progress if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * shape


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The moments of each tensor by name, such as `<tensor>.exp_avg`; empty before the first update."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in _MOMENTS
        if parameter in optimizer.state
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave. Raises: CheckpointError by name if a moment is missing or misshapen."""
    wanted = {f"{name}.{moment}" for name in parameters for moment in _MOMENTS}
    if set(tensors) != wanted:
        raise CheckpointError(f"optimizer.safetensors: unexpected or missing {sorted(set(tensors) ^ wanted)[:3]}")
    for name, parameter in parameters.items():
        state = {moment: tensors[f"{name}.{moment}"] for moment in _MOMENTS}
        if any(state[moment].shape != parameter.shape for moment in _MOMENTS[:2]):
            raise CheckpointError(f"optimizer.safetensors: {name} has another shape than the adapter's")
        # torch keeps AdamW's step counter on the CPU unless it is fused or captured.
        optimizer.state[parameter] = {
            moment: value.clone() if moment == "step" else value.to(parameter.device) for moment, value in state.items()
        }
