"""How a command starts and ends: the accelerator it was launched with, and its exit code and last words."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator, GradScalerKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, DynamoBackend, parse_flag_from_env
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from loop.config import Config
from loop.errors import ConfigError, LoopError, Stopped
from loop.memory import is_out_of_memory, peak_memory

_PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=2))
"""Longer than a slow disk or the tokenising of a large dataset, which the others wait for."""
_NO_SCALER = GradScalerKwargs(enabled=False)
"""accelerate's scaler skips steps whose gradient overflows; `loss_scale.py` repeats them."""
_PEER_ENDED = "another process ended; its own message says why"


def launched_processes() -> int:
    """How many processes the launcher started, known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator of the launch config, refused where it would silently do something else than asked.

    Raises: ConfigError."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16", "fp16"):
        raise ConfigError(f"mixed_precision: found {asked} in the launch config, expected no, bf16 or fp16")
    if asked != "no" and config.dtype == "float64":
        raise ConfigError(f"dtype: float64 with mixed_precision {asked} in the launch config; autocast would lower it")
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") and asked != "fp16"  # accelerate would take float32 there
    if asked != "no" and not torch.cuda.is_available() and not on_cpu:
        raise ConfigError(f"mixed_precision: {asked} is for a GPU and torch sees none; use launch_configs/cpu.yaml")
    if asked == "bf16" and not on_cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
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
        found = f"{kind.value} with {processes} of {launched_processes()} processes joined"
        raise ConfigError(f"launch config: found {found}; expected one like those in launch_configs/")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ConfigError("dynamo_backend: not supported, it would change the bits and names of what is saved")
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError("gradient_accumulation_steps: the launch config must leave it at 1; set global_batch_size")
    return accelerator


def run_command(command: Callable[[], None], debug: bool = False) -> int:
    """Run a command to its exit code. The last line on stderr is one sentence; a bug also shows its traceback."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # since `loop/__init__.py`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = _last_words(error)
        if debug or (code == 1 and message != _PEER_ENDED):
            traceback.print_exception(error)
        elif isinstance(error, (LoopError, Stopped)) or message == _PEER_ENDED:
            error.__traceback__ = error.__cause__ = None  # expected: the launcher shall quote the sentence only
        if launched_processes() > 1:
            get_error_handler().record_exception(error)  # the launcher has the last word, and quotes this
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, (LoopError, Stopped)):
            print(f"error: {message}", file=sys.stderr, flush=True)
        return code


def _last_words(error: BaseException) -> tuple[str, int]:
    """One sentence and the exit code."""
    if isinstance(error, (LoopError, Stopped)):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was saved before is intact", 130
    if is_out_of_memory(error):
        peak = peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu")) / 2**30
        ways = "micro_batch_tokens (auto finds it) or max_length, or set gradient_checkpointing or load_in_4bit: true"
        return f"out of memory after a peak of {peak:.1f} GiB; lower {ways}", 5
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'output_dir'}: {error.strerror}; what was saved before is intact", 5
    if isinstance(error, torch.distributed.DistError) or "by peer" in str(error):
        return _PEER_ENDED, 1
    return f"a bug of this program: {type(error).__name__}: {error}", 1
