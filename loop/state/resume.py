"""From which checkpoint a run goes on, and who wins where the config has changed since."""

from pathlib import Path
from typing import Any

from loop.errors import CheckpointError
from loop.state.checkpoint import Checkpoint, list_checkpoints, read_checkpoint
from loop.state.files import canonical_json, differences, sha256
from loop.state.ledger import read_ledger


class ForeignCheckpoint(CheckpointError):
    """A whole checkpoint of a run with another identity: refused, never passed over."""


def find_checkpoint(
    folder: Path, requested: str, identity: dict[str, Any]
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from (None: start at step 0), and why newer ones were passed over.

    `auto` takes the newest that verifies with its ledger; a path or name takes exactly that one.
    Raises: CheckpointError; nothing has been changed."""
    present = list_checkpoints(folder / "checkpoints")
    if requested not in ("auto", "none"):
        named = Path(requested).resolve()
        chosen = [path for path in present if requested == path.name or named == path.resolve()]
        if not chosen:
            there = ", ".join(path.name for path in present) or "none"
            hint = f"which holds {there}; write auto, none or a checkpoint"
            raise CheckpointError(f"resume_from_checkpoint: {requested} is not in {folder}, {hint}")
        newer = ", ".join(path.name for path in present[present.index(chosen[0]) + 1 :])
        notice = f"going back to {chosen[0].name}: {newer} no longer count, the ledger is cut back"
        return _read(chosen[0], folder, identity), [notice] if newer else []
    if (requested == "none" and present) or (not present and (folder / "adapter").exists()):
        raise CheckpointError(
            f"{folder}: holds a run already; give another output_dir, or remove it yourself"
        )
    passed_over: list[str] = []
    for path in reversed(present):
        try:
            return _read(path, folder, identity), passed_over
        except ForeignCheckpoint:
            raise
        except CheckpointError as error:
            passed_over.append(f"passed over {path.name}: {error}")
    if present:
        hint = "restore one, or give another output_dir"
        passed_over.append(f"{folder}: no checkpoint is whole; {hint}")
        raise CheckpointError("\n".join(passed_over))
    return None, []


def inexact(
    checkpoint: Checkpoint, environment: dict[str, Any], device: str, full_determinism: bool
) -> list[str]:
    """What makes going on from a checkpoint not bit-exact; nothing if it is.

    `environment` is what the bits depend on now. Rows, dropout and learning rate are functions of
    the step, so nothing else can differ."""
    lines = differences(checkpoint.environment, environment)
    if device == "cuda" and not full_determinism:
        lines.append("a GPU's attention adds in no fixed order without full_determinism")
    return lines


def _read(path: Path, folder: Path, identity: dict[str, Any]) -> Checkpoint:
    checkpoint = read_checkpoint(path)
    changed = differences(checkpoint.identity, identity)
    if changed:
        hint = "to go on, give the values it was started with; for another run, another output_dir"
        raise ForeignCheckpoint("\n".join([*changed, f"{path} is of another run: {hint}"]))
    read_ledger(folder / "ledger.jsonl", sha256(canonical_json(identity)), checkpoint.ledger)
    return checkpoint
