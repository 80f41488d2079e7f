"""The volatile half of what a run leaves: its metrics, its console, and the run manifest with its sessions."""

import hashlib
import io
import json
import math
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from loop.errors import CheckpointError
from loop.files import replace_file
from loop.ledger import Ledger, LedgerPosition
from loop.memory import peak_memory
from loop.steps import Step

PACKAGES = (
    "torch", "accelerate", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "bitsandbytes"
)  # fmt: skip


class Record:
    """Writes down each step: ledger, metrics, progress. Only the main process makes one."""

    def __init__(
        self, folder: Path, start: LedgerPosition, first_step: int, num_steps: int, logging_steps: int
    ) -> None:
        """Cut ledger and metrics back to `first_step`; a line of metrics that a kill has torn goes too."""
        self.ledger = Ledger(folder / "ledger.jsonl", start)
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        kept = [line + "\n" for line in lines if 0 <= _step_of(line) < first_step]
        replace_file(path, "".join(kept).encode())
        self._metrics = path.open("a", encoding="utf-8")
        self._logging_steps = 0 if sys.stderr.isatty() else logging_steps
        console = io.StringIO() if self._logging_steps else sys.stderr  # without a terminal, lines instead of a bar
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, file=console)
        self._last = time.monotonic()

    def step(self, step: Step, loss: float, grad_norm: float, rate: float, device: torch.device) -> None:
        """One finished step: a ledger line, a metrics line, and the bar."""
        known = step._asdict()
        del known["micro_batches"]
        known["micro_batches"] = known.pop("num_micro_batches")
        self.ledger.append({**known, "loss": loss, "grad_norm": grad_norm, "learning_rate": rate})
        seconds, self._last = time.monotonic() - self._last, time.monotonic()
        speed = step.target_tokens / seconds
        volatile = {"seconds": seconds, "target_tokens_per_second": speed, "peak_memory_bytes": peak_memory(device)}
        self._metrics.write(json.dumps({"step": step.step, **volatile}) + "\n")
        self._metrics.flush()
        self._bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}, {speed:,.0f} target tok/s", refresh=False)
        self._bar.update()
        if self._logging_steps and (step.step + 1) % self._logging_steps == 0:
            print(self._bar, flush=True)

    def evaluation(self, updates: int, eval_loss: float, target_tokens: int) -> None:
        """The held-out loss after `updates` updates; 0 is the untouched base."""
        self.ledger.append({"step": updates, "eval_loss": eval_loss, "eval_target_tokens": target_tokens})
        found = f"loss {eval_loss:.4f} nats a target token, perplexity {perplexity(eval_loss):,.1f}"
        tqdm.write(f"held out after {updates} steps: {found} ({target_tokens:,} targets)")
        self.pause()

    def pause(self) -> None:
        """Leave what was done since the last step (an evaluation, a checkpoint) out of the next step's seconds."""
        self._last = time.monotonic()

    def close(self) -> None:
        self._bar.close()
        self._metrics.close()
        self.ledger.close()


def perplexity(nats_per_token: float) -> float:
    """exp of the loss; infinite where that overflows."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What the bits of a run depend on beside its identity."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source.update(path.name.encode() + b"\0" + path.read_bytes())
    cuda = accelerator.device.type == "cuda"
    kernels = (
        [torch.version.cuda, torch.backends.cudnn.version()] if cuda else [torch.backends.cpu.get_cpu_capability()]
    )
    device = torch.cuda.get_device_name(accelerator.device) if cuda else platform.machine()
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "versions": {**versions, "python": platform.python_version(), "torch": torch.__version__},
        "source_sha256": source.hexdigest(),
        "num_processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": " ".join(str(word) for word in (device, *kernels)),
    }


def open_session(
    path: Path, manifest: dict[str, Any], environment: dict[str, Any], first_step: int, changes: list[str]
) -> None:
    """Write `run.json` with one more session; `changes` are what makes its resume not bit-exact."""
    before = read_run(path)
    kept = before if before.get("identity_sha256") == manifest["identity_sha256"] else {}
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    session = {"started": started, "first_step": first_step, "source_commit": _source_commit()}
    sessions = [*kept.get("sessions", []), {**environment, **session, "not_bit_exact": changes}]
    write_run(path, {**kept, "format_version": 1, **manifest, "sessions": sessions})


def read_run(path: Path) -> dict[str, Any]:
    """`run.json`, or an empty one. Raises: CheckpointError."""
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not the JSON that was written; give another output_dir") from error


def write_run(path: Path, run: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(run, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def _step_of(line: str) -> int:
    """The step of a line of metrics; -1 for a torn one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def _source_commit() -> str | None:
    """The commit of the checkout that runs, with a + where it was changed; None where there is no checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
