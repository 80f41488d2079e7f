"""How much memory was used, and whether an error means that there was too little."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loop.errors import EnvironmentFault

_STATUS = Path("/proc/self/status")
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA's own, also behind NCCL's "unhandled cuda error"
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, else of this whole process.

    Not getrusage's on Linux: that starts at the peak of the launcher, which it inherits through
    fork and exec."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in _STATUS.read_text().splitlines() if _STATUS.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, but bytes on macOS
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak(device: torch.device) -> None:
    """Begin anew on a GPU, so that the steps' peak is not the rehearsal's; a CPU process cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator, cuBLAS, cuDNN, NCCL and late CUDA errors raise plain RuntimeErrors."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OUT_OF_MEMORY)


@contextmanager
def in_memory(what: str, hint: str) -> Iterator[None]:
    """Raises: EnvironmentFault that says what does not fit, and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentFault(f"out of memory: {what} does not fit; {hint}") from error
