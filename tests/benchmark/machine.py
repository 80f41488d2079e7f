"""What this machine is, how fast it multiplies, and how much memory a process on it used."""

import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MATRIX = """
import statistics, time, torch
a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
a @ b
seconds = []
for _ in range(15):
    start = time.perf_counter()
    a @ b
    seconds.append(time.perf_counter() - start)
print(2 * 2048**3 / statistics.median(seconds))
"""
"""Floating-point operations a second of a large product in float32: what this machine can do at its
best."""
PACKAGES = ("torch", "transformers", "peft", "trl")
_STATUS = Path("/proc/self/status")


def matrix_rate(threads: int) -> float:
    """The rate of MATRIX, in a process of its own."""
    places = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-c", MATRIX]
    return float(
        subprocess.run(words, capture_output=True, text=True, check=True, env=places).stdout
    )


def description(threads: int) -> str:
    """Processor, threads used of those there are, and the versions that matter, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES if find_spec(name))
    return f"{processor}, {threads} of {os.cpu_count()} threads, {versions}"


def in_a_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, as JSON keeps it, in a process of its own; None where that failed.

    A fork, because it need not import again, which takes longer than most measurements. For a
    caller that has not computed yet: torch's threads would be missing in the fork."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(2, 1)  # what the libraries print is not the result
            os.write(writing, json.dumps(function(*arguments)).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)  # nothing of the parent's is to be tidied up here
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def memory() -> int:
    """Bytes that this process has now, pages of mapped files included. Linux only, as are those
    below."""
    return _status("VmRSS")


def own_memory() -> int:
    """Bytes that this process has now without those of mapped files, which the kernel may take
    back."""
    return _status("RssAnon")


def forget_peak() -> None:
    """Let `loop.memory.peak_memory` start from what there is now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024
