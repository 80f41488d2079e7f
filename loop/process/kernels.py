"""The switches of torch that decide which kernels run: set while a run trains, then put back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def kernels(full_determinism: bool) -> Iterator[None]:
    """They are the whole process's, and a notebook's other work is not to notice.

    cuDNN's attention is off: it plans a kernel anew for each shape, and ragged rows make hundreds
    (bloom-7b1's shape on an H200: 4,151 target tokens/s with it, 12,928 without).
    `full_determinism` is what torch's "Reproducibility" asks for on CUDA, but that new tensors are
    not filled: nothing here reads what was not written, and filling doubles the launches."""
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    filling: Any = torch.utils.deterministic  # a module with a property, which mypy does not see
    filled = filling.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cuda.enable_cudnn_sdp(False)
    if full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        filling.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
        torch.use_deterministic_algorithms(deterministic)
        filling.fill_uninitialized_memory = filled
        torch.backends.cudnn.benchmark = benchmark
