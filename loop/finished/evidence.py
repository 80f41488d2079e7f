"""What a run has proven about an adapter: its files, read once and held against each other."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.config.command_line import parse_command_line
from loop.config.knobs import Config
from loop.errors import CheckpointError, ConfigError
from loop.finished.named_model import check_sha256, find_run
from loop.state.checkpoint import list_checkpoints, read_checkpoint
from loop.state.files import canonical_json, differences, read_regular_file, sha256
from loop.state.ledger import LedgerPosition, verify_ledger
from loop.state.run_json import parse_run_json

_LIMIT = 1 << 40
"""Bytes; larger than any file of a run, so that only what a file is can refuse it."""


@dataclass(frozen=True)
class Evidence:
    """One state of one run, as bytes.

    What is published is made of these bytes and of nothing read later."""

    folder: Path
    step: int
    config: Config
    set_by: dict[str, str]  # who set each knob: default, file, flag or found
    run: dict[str, Any]  # run.json
    run_json: bytes
    ledger: bytes  # up to `step`
    entries: list[dict[str, Any]]
    head: str  # of the ledger
    adapter: dict[str, bytes]  # adapter_config.json and adapter_model.safetensors

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """(updates made, held-out nats per target token), oldest first; the first is the base's."""
        return [
            (entry["step"], entry["eval_loss"]) for entry in self.entries if "eval_loss" in entry
        ]


def read_evidence(requested: Path) -> Evidence:
    """Read a finished run, or the checkpoint that is named.

    Raises: ConfigError if it is neither, CheckpointError if its files do not belong together."""
    folder = find_run(requested)
    if folder is None:
        raise ConfigError(
            f"{requested}: found no run there; expected RUN or RUN/checkpoints/step-N"
        )
    run_json = read_regular_file(folder / "run.json", _LIMIT)
    run = parse_run_json(run_json, folder / "run.json")
    identity, start = run["identity"], run["identity_sha256"]
    if sha256(canonical_json(identity)) != start:
        raise CheckpointError(
            f"{folder / 'run.json'}: its identity does not have the sha256 that it states"
        )
    if requested.resolve().parent == folder.resolve() / "checkpoints":
        checkpoint = read_checkpoint(requested)
        if checkpoint.identity != identity:
            raise CheckpointError(f"{requested}: belongs to another run than {folder / 'run.json'}")
        step, position, adapter = checkpoint.step, checkpoint.ledger, checkpoint.adapter_files()
    else:
        step, position, adapter = _finished(folder, run)
    text = read_regular_file(folder / "config.yaml", _LIMIT).decode(errors="replace")
    config = parse_command_line(["--config", str(folder / "config.yaml")]).config
    stated = {name: identity[name] for name in config.knobs("identity") if name in identity}
    # What these stood for is in the identity.
    if config.lora_target_modules in (None, ("all-linear",)):
        stated["lora_target_modules"] = config.knobs("identity")["lora_target_modules"]
    changed = differences(stated, config.knobs("identity"))
    if changed:
        raise CheckpointError(
            f"{folder / 'config.yaml'}: changed since the run: {'; '.join(changed)}"
        )
    set_by = dict(re.findall(r"^(\w+): .*  # (\w+)$", text, flags=re.MULTILINE))
    ledger = read_regular_file(folder / "ledger.jsonl", _LIMIT)[: position.bytes]
    entries = verify_ledger(ledger, folder / "ledger.jsonl", start, position)
    steps = sum("rows" in entry for entry in entries)
    if steps != step:
        raise CheckpointError(f"{folder / 'ledger.jsonl'}: has {steps} steps, {step} are stated")
    return Evidence(
        folder, step, config, set_by, run, run_json, ledger, entries, position.head, adapter
    )


def _finished(folder: Path, run: dict[str, Any]) -> tuple[int, LedgerPosition, dict[str, bytes]]:
    """Steps, the ledger's end, and the finished adapter, if it has the sha256 of `run.json`."""
    result = run.get("result")
    if result is None:
        there = list_checkpoints(folder / "checkpoints")
        hint = f"name a checkpoint: {there[-1]}" if there else "it has no checkpoint either"
        raise ConfigError(f"{folder}: not finished; train it to its end, or {hint}")
    names = ("adapter_config.json", "adapter_model.safetensors")
    adapter = {name: read_regular_file(folder / "adapter" / name, _LIMIT) for name in names}
    weights = "adapter_model.safetensors"
    check_sha256(folder / "adapter" / weights, adapter[weights], result["adapter_sha256"])
    content = read_regular_file(folder / "ledger.jsonl", _LIMIT)
    end = LedgerPosition(content.count(b"\n"), len(content), result["ledger_head"])
    return result["steps"], end, adapter
