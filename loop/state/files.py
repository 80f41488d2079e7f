"""Bytes on disk: written so that they survive the machine, read so that they cannot surprise."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loop.errors import CheckpointError, EnvironmentFault

_LEFTOVERS = [
    f".{kind}-{name}"
    for kind in ("tmp", "trash")
    for name in ("step-*", "adapter", "*.json*", "*.yaml")
]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one JSON spelling of a value: sorted keys, no spaces, UTF-8, no NaN.

    Equal values are equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def read_canonical_json(content: bytes, name: Path) -> dict[str, Any]:
    """Raises: CheckpointError unless it is an object, exactly as `canonical_json` writes it."""
    try:
        value = json.loads(content)
        if isinstance(value, dict) and canonical_json(value) == content:
            return value
    except (ValueError, RecursionError):
        pass
    raise CheckpointError(f"{name}: not the JSON that was written")


def read_regular_file(path: Path, limit: int) -> bytes:
    """A plain file of at most `limit` bytes; a link, pipe or device is refused and never blocks.

    Raises: CheckpointError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; expected a regular file") from error
    status = os.fstat(handle)
    try:
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise CheckpointError(
                f"{path}: found a link or a special file, expected a regular file"
            )
        if status.st_size > limit:
            raise CheckpointError(f"{path}: {status.st_size} bytes, expected {limit}")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(handle)


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder: a rename is not durable before."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one move: a reader sees the old file or the new one.

    Equal bytes are left alone."""
    if path.is_file() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)
    write_synced(temporary, content)
    temporary.rename(path)
    sync_folder(path.parent)


def commit_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Make `folder` appear whole, with exactly these files, written in this order, or not at all.

    Raises: EnvironmentFault if the disk refuses: half a folder is removed, an older one stays."""
    temporary, trash = (folder.with_name(f".{kind}-{folder.name}") for kind in ("tmp", "trash"))
    try:
        for leftover in (temporary, trash):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        for name, content in files.items():
            write_synced(temporary / name, content)
        sync_folder(temporary)
        if folder.exists():
            folder.rename(trash)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        if trash.exists() and not folder.exists():
            trash.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise EnvironmentFault(
            f"{folder}: not written: {error.strerror}; what was saved before is intact"
        ) from error
    shutil.rmtree(trash, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Rename first, so that a kill in the middle leaves nothing that looks whole."""
    trash = folder.with_name(f".trash-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def lock_folder(folder: Path) -> Iterator[str | None]:
    """Hold a folder against every other process; the kernel lets go of it when this one dies.

    The lock is on `folder/.lock`, which names its holder, so that the second start can say who is
    first. Yields a notice where the last holder died holding it. Raises: EnvironmentFault at once
    if it is held, or cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise EnvironmentFault(
            f"output_dir: {folder}: {error.strerror}; expected a writable folder"
        ) from error
    with file:
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read(200) or "another run"
            raise EnvironmentFault(
                f"output_dir: {folder} is written to by {holder}; wait for it or stop it"
            ) from error
        except OSError as error:
            raise EnvironmentFault(
                f"output_dir: {folder} cannot be locked: {error.strerror}; use another"
            ) from error
        holder = file.read(200)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield f"{holder} ended without letting go of {folder}: taken over" if holder else None
        finally:
            file.truncate(0)


def prepare_folder(folder: Path) -> None:
    """Create a folder, sweep it, and prove early that it takes a write, a flush and a rename.

    Raises: EnvironmentFault."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        leftovers = [path for kind in _LEFTOVERS for path in folder.glob(kind)]
        for path in leftovers:  # of a process that was killed
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (folder / ".probe").unlink(missing_ok=True)
        replace_file(folder / ".probe", b"probe")
        (folder / ".probe").unlink()
    except OSError as error:
        raise EnvironmentFault(
            f"output_dir: {folder}: {error.strerror}; expected a writable folder"
        ) from error


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each key whose values differ, with both; nested keys are joined by a dot."""
    lines: list[str] = []
    for key in sorted({*was, *now}):
        old, new = was.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{key}.{line}" for line in differences(old, new)]
        elif old != new:
            lines.append(f"{key} was {old!r:.80}, is {new!r:.80}")
    return lines
