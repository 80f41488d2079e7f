"""The errors of real allocations that no machine can make, and the peak of a process that grew."""

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from loop.errors import EnvironmentFault
from loop.process.command import run_command
from loop.process.memory import in_memory, is_out_of_memory, peak_memory
from tests.processes import SERVER

CPU = torch.device("cpu")
PETABYTE = 10**15


def attention_over_a_million_tokens() -> torch.Tensor:
    return torch.ones(10**6, 1) @ torch.ones(1, 10**6) + torch.zeros(1000, 1, 1)


TOO_LARGE: dict[str, Callable[[], object]] = {
    "a tensor": lambda: torch.empty(PETABYTE, dtype=torch.uint8),
    "a copy": lambda: torch.zeros(1, dtype=torch.uint8).expand(PETABYTE).clone(),
    "a product": attention_over_a_million_tokens,
    "an array": lambda: np.zeros(PETABYTE, dtype=np.uint8),
    "bytes": lambda: bytearray(PETABYTE),
}
FAULTY: dict[str, Callable[[], object]] = {
    "shapes": lambda: torch.ones(2) @ torch.ones(3),
    "dtypes": lambda: torch.ones(2) @ torch.ones(2).double(),
    "an index": lambda: torch.ones(2)[5],
    "a gradient": lambda: torch.ones(1).backward(),
    "a negative size": lambda: torch.empty(-1),
    "a file": lambda: Path("/nonexistent/file").read_bytes(),
}


def raised(command: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        command()
    return caught.value


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_raised_for_a_petabyte_means_too_little_memory(name: str) -> None:
    assert is_out_of_memory(raised(TOO_LARGE[name]))


def test_what_torch_raises_for_the_memory_of_a_gpu_means_too_little_memory() -> None:
    assert is_out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    )


NCCL = (
    "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
)
OTHER_WORDS: dict[str, Exception] = {
    "a late error of CUDA": torch.AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
    ),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "NCCL": torch.distributed.DistBackendError(
        f"{NCCL}\nLast error:\nCuda failure 2 'out of memory'"
    ),
}
"""What CUDA's libraries raise for too little memory; none can be made to without a GPU."""


@pytest.mark.parametrize("name", OTHER_WORDS)
def test_memory_that_ends_in_other_words_is_5_and_one_line(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def command() -> None:
        raise OTHER_WORDS[name]

    assert run_command(command) == 5
    assert re.fullmatch(r"error: out of memory after a peak of .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.distributed.DistBackendError(f"{NCCL}\nLast error:\nCuda failure 700"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        ValueError("out of memory"),  # by no library of ours
    ],
    ids=lambda error: str(error)[:40],
)
def test_no_other_error_of_a_gpu_means_too_little_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("name", [*TOO_LARGE, *OTHER_WORDS])
def test_what_does_not_fit_is_said_with_what_to_do(name: str) -> None:
    hint = pytest.raises(EnvironmentFault, match=r"^out of memory: the base does not fit; buy one$")
    with hint, in_memory("the base", "buy one"):
        if name in OTHER_WORDS:
            raise OTHER_WORDS[name]
        TOO_LARGE[name]()


def test_an_error_that_is_not_about_memory_goes_through_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="size"), in_memory("the base", "buy one"):
        FAULTY["shapes"]()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_is_raised_for_a_petabyte_on_a_gpu_means_too_little_memory() -> None:
    assert is_out_of_memory(raised(lambda: torch.empty(PETABYTE, dtype=torch.uint8, device="cuda")))


@pytest.mark.parametrize("name", FAULTY)
def test_no_other_error_means_too_little_memory(name: str) -> None:
    assert not is_out_of_memory(raised(FAULTY[name]))


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_real_allocation_that_fails_ends_a_command_with_5_and_one_line_with_the_peak_and_the_knobs(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run_command(lambda: print(TOO_LARGE[name]())) == 5
    said = capsys.readouterr().err
    found = re.fullmatch(r"error: out of memory after a peak of (\d+\.\d) GiB; lower (.*)\n", said)
    assert found, said
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert float(found[1]) == pytest.approx(peak_memory(device) / 2**30, abs=0.06)
    assert all(
        knob in found[2]
        for knob in ("micro_batch_tokens", "max_length", "gradient_checkpointing", "load_in_4bit")
    )


def test_the_peak_is_what_the_system_says_of_this_process() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells the peak in a file")
    (high,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert peak_memory(CPU) == pytest.approx(int(high) * 1024, rel=0.02)
    assert peak_memory(CPU) >= psutil.Process().memory_info().rss * 0.98


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="elsewhere the system's own count is used, which may be inherited",
)
def test_the_peak_is_none_that_was_inherited_from_a_larger_parent() -> None:
    grown = ctypes.create_string_buffer(2**30)
    ctypes.memset(grown, 1, 2**30)
    code = (
        "import torch; from loop.process.memory import peak_memory;"
        " print(peak_memory(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < 2**30


def _grow_and_shrink(report: str) -> None:
    """Write down the peak before, with and after 256 MiB that were written to."""
    peaks = [peak_memory(CPU)]
    grown = ctypes.create_string_buffer(2**28)
    ctypes.memset(grown, 1, 2**28)
    peaks.append(peak_memory(CPU))
    del grown
    peaks.append(peak_memory(CPU))
    Path(report).write_text(" ".join(map(str, peaks)))


def test_the_peak_grows_by_what_is_used_and_stays_when_that_is_given_back(tmp_path: Path) -> None:
    process = SERVER.Process(target=_grow_and_shrink, args=(str(tmp_path / "peaks"),))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    before, during, after = map(int, (tmp_path / "peaks").read_text().split())
    assert during - before == pytest.approx(2**28, rel=0.05)
    assert after == pytest.approx(during, rel=0.01)  # the kernel counts in batches
    assert before > 50e6  # torch alone
