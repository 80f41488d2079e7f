"""How much memory was used, and whether an error means that there was too little."""

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


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


def is_out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator and cuBLAS raise plain RuntimeErrors."""
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    is_plain = any(word in str(error) for word in words)
    return is_plain or isinstance(error, (MemoryError, torch.OutOfMemoryError))
