"""Each finished step written down: its ledger line, its metrics line, and the console."""

import io
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from loop.data.steps import Step
from loop.process.memory import peak_memory
from loop.state.files import replace_file
from loop.state.ledger import Ledger, LedgerPosition, perplexity


class Record:
    """Writes down each step: ledger, metrics, progress. Only the main process makes one."""

    def __init__(
        self,
        folder: Path,
        start: LedgerPosition,
        first_step: int,
        num_steps: int,
        logging_steps: int,
    ) -> None:
        """Cut ledger and metrics back to `first_step`; a metrics line torn by a kill goes too."""
        self.ledger = Ledger(folder / "ledger.jsonl", start)
        path = folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        kept = [line + "\n" for line in text.splitlines() if 0 <= _step_of(line) < first_step]
        replace_file(path, "".join(kept).encode())
        self._metrics = path.open("a", encoding="utf-8")
        self._logging_steps = 0 if sys.stderr.isatty() else logging_steps
        # Without a terminal, lines instead of a bar.
        console = io.StringIO() if self._logging_steps else sys.stderr
        self._bar = tqdm(
            total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, file=console
        )
        self._last = time.monotonic()

    def step(
        self, step: Step, loss: float, grad_norm: float, rate: float, device: torch.device
    ) -> None:
        """One finished step: a ledger line, a metrics line, and the bar."""
        known = step._asdict()
        del known["micro_batches"]
        known["micro_batches"] = known.pop("num_micro_batches")
        self.ledger.append({**known, "loss": loss, "grad_norm": grad_norm, "learning_rate": rate})
        seconds, self._last = time.monotonic() - self._last, time.monotonic()
        speed = step.target_tokens / seconds
        volatile = {
            "seconds": seconds,
            "target_tokens_per_second": speed,
            "peak_memory_bytes": peak_memory(device),
        }
        self._metrics.write(json.dumps({"step": step.step, **volatile}) + "\n")
        self._metrics.flush()
        self._bar.set_postfix_str(
            f"loss {loss:.4f}, lr {rate:.2e}, {speed:,.0f} target tok/s", refresh=False
        )
        self._bar.update()
        if self._logging_steps and (step.step + 1) % self._logging_steps == 0:
            print(self._bar, flush=True)

    def evaluation(self, updates: int, eval_loss: float, target_tokens: int) -> None:
        """The held-out loss after `updates` updates; 0 is the untouched base."""
        self.ledger.append(
            {"step": updates, "eval_loss": eval_loss, "eval_target_tokens": target_tokens}
        )
        loss = f"loss {eval_loss:.4f} nats a target token"
        measured = f"{loss}, perplexity {perplexity(eval_loss):,.1f}"
        tqdm.write(f"held out after {updates} steps: {measured} ({target_tokens:,} targets)")
        self.pause()

    def pause(self) -> None:
        """Leave what followed the last step (an evaluation, a save) out of the next's seconds."""
        self._last = time.monotonic()

    def close(self) -> None:
        self._bar.close()
        self._metrics.close()
        self.ledger.close()


def _step_of(line: str) -> int:
    """The step of a line of metrics; -1 for a torn one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1
