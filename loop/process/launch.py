"""The accelerator that the launcher asked for, refused where it would silently be another."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, GradScalerKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, DynamoBackend, parse_flag_from_env

from loop.config.knobs import Config
from loop.errors import ConfigError
from loop.process.command import launched_processes

_PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))
"""Longer than a slow disk or the tokenising of a large dataset, which the others wait for."""
_NO_SCALER = GradScalerKwargs(enabled=False)
"""accelerate's scaler skips steps whose gradient overflows; `loss_scale.py` repeats them."""


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator of the launch config, refused where it would silently do something else than it says.

    Raises: ConfigError."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f"mixed_precision: found {precision} in the launch config, expected no, bf16 or fp16")
    if precision != "no" and config.dtype == "float64":
        raise ConfigError(
            f"dtype: float64 with mixed_precision {precision} in the launch config; autocast would lower it"
        )
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") and precision != "fp16"  # accelerate would take float32 there
    if precision != "no" and not torch.cuda.is_available() and not on_cpu:
        raise ConfigError(f"mixed_precision: {precision} is for a GPU and torch sees none; use launch_configs/cpu.yaml")
    if precision == "bf16" and not on_cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("mixed_precision: this GPU has no bf16; use launch_configs/one_gpu_fp16.yaml")
    if config.full_determinism:  # what torch's "Reproducibility" asks for on CUDA; not yet run on a GPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        # Without a GPU cpu=True: only then does accelerate join several processes, over gloo.
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[_PATIENCE, _NO_SCALER])
    except ValueError as error:  # accelerate's own: bf16 where the device has none
        raise ConfigError(f"launch config: {str(error).splitlines()[0]}") from error
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    supported = kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if not supported or processes != launched_processes():
        joined = f"{kind.value} with {processes} of {launched_processes()} processes joined"
        raise ConfigError(f"launch config: found {joined}; expected one like those in launch_configs/")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ConfigError("dynamo_backend: not supported, it would change the bits and names of what is saved")
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError("gradient_accumulation_steps: the launch config must leave it at 1; set global_batch_size")
    return accelerator
