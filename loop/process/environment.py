"""What a run's bits depend on beside its identity: versions, code, processes, threads, device."""

import ast
import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

PACKAGES = (
    "torch", "accelerate", "transformers", "peft", "datasets", "tokenizers", "safetensors",
    "numpy", "bitsandbytes",
)  # fmt: skip
_LOOP = Path(__file__).parents[1]


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What the bits of a run depend on beside its identity."""
    device: list[Any] = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name(accelerator.device)
        device = [name, torch.version.cuda, torch.backends.cudnn.version()]
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "versions": {**versions, "python": platform.python_version(), "torch": torch.__version__},
        "source_sha256": source_sha256(),
        "num_processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": " ".join(str(word) for word in device),
    }


@functools.cache
def source_sha256() -> str:
    """Of every file of this package that training imports: path and content, in order of paths.

    The model card's code changes nothing that was trained and is not in it; the collator's is."""
    reached, waiting = set[Path](), [_LOOP / "train.py"]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached |= {path, path.with_name("__init__.py")}
        for node in ast.walk(ast.parse(path.read_bytes())):
            module = str(node.module) if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("loop."):
                waiting.append(_LOOP.parent.joinpath(*module.split(".")).with_suffix(".py"))
    source = hashlib.sha256()
    for path in sorted(reached):
        source.update(path.relative_to(_LOOP).as_posix().encode() + b"\0" + path.read_bytes())
    return source.hexdigest()


def source_commit() -> str | None:
    """The commit of the checkout that runs, with a + where it was changed; None without one."""
    describe = ["describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    git = ["git", "-C", str(_LOOP), *describe]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
