"""The accelerator that the launcher asked for, refused where it would silently be another."""

import os
import re
from datetime import timedelta

import torch
from accelerate import Accelerator, GradScalerKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, DynamoBackend, parse_flag_from_env

from loop.config.knobs import Config
from loop.errors import ConfigError
from loop.process.command import launched_processes

_PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))
"""Longer than a slow disk or the tokenizing of a large dataset, which the others wait for."""
_NO_SCALER = GradScalerKwargs(enabled=False)
"""accelerate's scaler skips steps whose gradient overflows; `loss_scale.py` repeats them."""


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator of the launch config; refused where it would silently be another.

    Raises: ConfigError."""
    _check_precision(config)
    _check_gpus()
    on_cpu = not torch.cuda.is_available()  # cpu=True: else accelerate joins no several processes
    try:
        accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[_PATIENCE, _NO_SCALER])
    except ValueError as error:  # accelerate's own: bf16 where the device has none
        raise ConfigError(f"launch config: {str(error).splitlines()[0]}") from error
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    supported = kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if not supported or processes != launched_processes():
        joined = f"{kind.value} with {processes} of {launched_processes()} processes joined"
        hint = "expected one like those in launch_configs/"
        raise ConfigError(f"launch config: found {joined}; {hint}")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        reason = "it would change the bits and names of what is saved"
        raise ConfigError(f"dynamo_backend: not supported, {reason}")
    if accelerator.gradient_accumulation_steps != 1:
        hint = "the launch config must leave it at 1; set global_batch_size"
        raise ConfigError(f"gradient_accumulation_steps: {hint}")
    return accelerator


def _check_precision(config: Config) -> None:
    """Raises: ConfigError for a mixed_precision that this machine, or `dtype`, would not keep."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        hint = "in the launch config, expected no, bf16 or fp16"
        raise ConfigError(f"mixed_precision: found {precision} {hint}")
    if precision != "no" and config.dtype == "float64":
        both = f"float64 with mixed_precision {precision} in the launch config"
        raise ConfigError(f"dtype: {both}; autocast would lower it")
    # accelerate would take float32 for fp16 on a CPU
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") and precision != "fp16"
    if precision != "no" and not torch.cuda.is_available() and not on_cpu:
        hint = f"is for a GPU and torch sees none; use launch_configs/cpu.yaml{_why_no_gpu()}"
        raise ConfigError(f"mixed_precision: {precision} {hint}")
    if on_cpu or precision != "bf16":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        hint = "this GPU has no bf16; use launch_configs/one_gpu_fp16.yaml"
        raise ConfigError(f"mixed_precision: {hint}")


def _check_gpus() -> None:
    """Raises: ConfigError for more processes than GPUs, or a GPU too old for this torch."""
    if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        hint = f"--num_processes {gpus} uses what is there"
        raise ConfigError(f"num_processes: {processes} on a machine with {gpus} GPU; {hint}")
    own = torch.cuda.get_device_capability()
    oldest = min((_capability(name) for name in torch.cuda.get_arch_list()), default=own)
    if own < oldest:
        both = f"has compute capability {own[0]}.{own[1]}, this torch needs {oldest[0]}.{oldest[1]}"
        hint = "install a torch built for an older CUDA"
        raise ConfigError(f"GPU: {torch.cuda.get_device_name()} {both}; {hint}")


def _capability(name: str) -> tuple[int, int]:
    """(7, 5) of sm_75, (12, 0) of compute_120."""
    digits = re.sub(r"\D", "", name)
    return int(digits[:-1]), int(digits[-1])


def _why_no_gpu() -> str:
    """What CUDA says of it, such as a driver that is too old; nothing where torch has no CUDA."""
    if torch.version.cuda is None:
        return " (this torch is built for the CPU)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" ({str(error).strip().splitlines()[0].rstrip('.')})"
    return ""
