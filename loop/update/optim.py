"""AdamW over the adapter, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable

import bitsandbytes
import torch
from torch import Tensor, nn

from loop.config.knobs import Config
from loop.errors import CheckpointError, ConfigError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_bnb_8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
}
"""What each value of the knob `optim` builds."""


def adamw(parameters: Iterable[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over the parameters in order; the loop sets its rate.

    torch's, or bitsandbytes' with moments in blocks of 8 bits (Dettmers et al. 2022), or paged: in
    memory that the GPU's driver moves out when it is short. Raises: ConfigError for a paged one
    without a GPU."""
    parameters = list(parameters)
    on_gpu = parameters[0].device.type == "cuda"
    if config.optim.startswith("paged") and not on_gpu:
        hint = "pages GPU memory, and there is no GPU; write adamw_bnb_8bit"
        raise ConfigError(f"optim: {config.optim} {hint}")
    one_kernel = {"fused": True} if on_gpu and config.optim == "adamw_torch" else {}
    return OPTIMIZERS[config.optim](
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        **one_kernel,
    )


def warmup(config: Config, num_steps: int) -> int:
    """Warm-up in steps; a `warmup_steps` below 1 is a share of the run, rounded up."""
    steps = config.warmup_steps
    return math.ceil(steps * num_steps) if steps < 1 else int(steps)


def learning_rate(step: int, config: Config, num_steps: int) -> float:
    """The learning rate of update `step` (0-based) of `num_steps`, on any number of processes.

    Source: transformers 5.23, optimization.py, get_{constant,linear,cosine}_schedule_with_warmup.
    With warm-up step 0 has rate 0 and step `warmup` the peak; the last step is one short of 0."""
    ramp = warmup(config, num_steps)
    if step < ramp:
        return config.learning_rate * step / ramp
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = (step - ramp) / max(1, num_steps - ramp)
    linear, cosine = 1 - progress, 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (linear if config.lr_scheduler_type == "linear" else cosine)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The state of each adapter tensor, as `<tensor>.exp_avg` (bitsandbytes: `.state1`).

    Empty before the first update."""
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if not key.startswith("qmap")  # bitsandbytes' table of the values of 8 bits: a constant
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises: CheckpointError by name if one is missing or mismatched."""
    (group,) = optimizer.param_groups
    rate, group["lr"] = group["lr"], 0.0
    # An update by nothing: the optimizer makes its state as it wants it.
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    group["lr"] = rate
    made = {
        name: (tensor.shape, tensor.dtype)
        for name, tensor in optimizer_tensors(optimizer, parameters).items()
    }
    saved_shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    mismatched = sorted(
        name for name in {*made, *saved_shapes} if made.get(name) != saved_shapes.get(name)
    )
    if mismatched:
        raise CheckpointError(
            f"optimizer.safetensors: missing, unexpected or of another shape: {mismatched[:3]}"
        )
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for key in [key for key in state if f"{name}.{key}" in tensors]:
            saved = tensors[f"{name}.{key}"]
            state[key] = state[key].copy_(saved) if isinstance(state[key], Tensor) else saved.item()
