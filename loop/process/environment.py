"""What the bits of a run depend on beside its identity: versions, code, processes, threads,
device."""

import ast
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
    cuda = accelerator.device.type == "cuda"
    kernels = (
        [torch.version.cuda, torch.backends.cudnn.version()]
        if cuda
        else [torch.backends.cpu.get_cpu_capability()]
    )
    device = torch.cuda.get_device_name(accelerator.device) if cuda else platform.machine()
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "versions": {**versions, "python": platform.python_version(), "torch": torch.__version__},
        "source_sha256": source_sha256(),
        "num_processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": " ".join(str(word) for word in (device, *kernels)),
    }


def source_sha256() -> str:
    """Of every file of this package that training imports: their paths and contents, in the order
    of the paths.

    A word in the model card's code changes nothing that was trained, so it is not in it; one in the
    collator is."""
    package, reached, waiting = _LOOP, set[Path](), [_LOOP / "train.py"]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            nodes = (
                node
                for node in ast.walk(ast.parse(path.read_bytes()))
                if isinstance(node, ast.ImportFrom)
            )
            names = [
                str(node.module).split(".")
                for node in nodes
                if str(node.module).startswith("loop.")
            ]
            waiting += [package.joinpath(*name[1:]).with_suffix(".py") for name in names]
    source = hashlib.sha256()
    for path in sorted(reached):
        source.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return source.hexdigest()


def source_commit() -> str | None:
    """The commit of the checkout that runs, with a + where it was changed; None where there is no
    checkout."""
    git = [
        "git",
        "-C",
        str(_LOOP),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
