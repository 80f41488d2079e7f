"""The ledger: what every step was, in lines chained by hash and equal where the run is equal."""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop.errors import CheckpointError


@dataclass(frozen=True)
class LedgerPosition:
    """A point between two lines: checkpoints name one, and a resume cuts the ledger back to it."""

    lines: int
    bytes: int
    head: str  # `hash` of the last line; the identity's sha256 if there is none


class Ledger:
    """`ledger.jsonl`: one line a step or evaluation, each carrying the hash of the one before.

    A line's `hash` is the sha256 of its bytes up to `,"hash":` with a closing brace in its place.
    Nothing volatile is in it, so two equal runs are equal bytes and one hash names a run."""

    def __init__(self, path: Path, start: LedgerPosition) -> None:
        """Open for appending at `start`; what stands behind it is cut off."""
        self.position = start
        self._file = path.open("ab")
        self._file.truncate(start.bytes)

    def append(self, entry: dict[str, Any]) -> None:
        """Chain one line and hand it to the operating system; only `sync` waits for the disk."""
        line, head = chained_line(entry, self.position.head)
        self._file.write(line)
        self._file.flush()
        lines, size = self.position.lines + 1, self.position.bytes + len(line)
        self.position = LedgerPosition(lines, size, head)

    def sync(self) -> LedgerPosition:
        """Wait until the disk has every line; a checkpoint names only such lines."""
        os.fsync(self._file.fileno())
        return self.position

    def close(self) -> None:
        self._file.close()


def chained_line(entry: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """The bytes of a ledger line after `previous`, and its hash."""
    body = json.dumps({**entry, "prev": previous}, separators=(",", ":"), allow_nan=False).encode()
    head = hashlib.sha256(body).hexdigest()
    return body[:-1] + f',"hash":"{head}"}}\n'.encode(), head


def read_ledger(path: Path, start: str, end: LedgerPosition) -> list[dict[str, Any]]:
    """The entries of a file up to `end`, if their chain leads there. Raises: CheckpointError."""
    content = path.read_bytes()[: end.bytes] if path.is_file() else b""
    return verify_ledger(content, path, start, end)


def verify_ledger(
    content: bytes, path: Path, start: str, end: LedgerPosition
) -> list[dict[str, Any]]:
    """The entries of `content`, if its chain leads from `start`, the identity's sha256, to `end`.

    Raises: CheckpointError that names the first line that does not follow."""
    entries, head = [], start
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            entry = json.loads(line)
            bare = {k: v for k, v in entry.items() if k not in ("prev", "hash")}
            expected, following = chained_line(bare, head)
        except (ValueError, AttributeError, RecursionError):
            expected, following = b"", ""
        if line != expected:
            raise CheckpointError(f"{path}: line {number} does not follow from the line before it")
        entries.append(entry)
        head = following
    if LedgerPosition(len(entries), len(content), head) != end:
        raise CheckpointError(
            f"{path}: {len(entries)} whole lines, the checkpoint was written after {end.lines}"
        )
    return entries


def perplexity(nats_per_token: float) -> float:
    """exp of the loss; infinite where that overflows."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf
