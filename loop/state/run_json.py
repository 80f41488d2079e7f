"""`run.json`: its schema, and the only functions that read and write it."""

import json
import time
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from loop.errors import CheckpointError
from loop.state.files import replace_file


class Base(TypedDict):
    name: str
    commit: str | None  # null for a folder
    tokenizer_sha256: str


class Counts(TypedDict):
    rows: int
    train_rows: int
    train_target_tokens: int
    heldout_rows: int
    heldout_target_tokens: int
    dropped_without_target: int
    dropped_too_long: int
    truncated: int
    duplicate_train_rows: int
    heldout_rows_also_in_train: int


class Data(TypedDict):
    name: str
    commit: str | None
    counts: Counts
    templates: list[str]


class Census(TypedDict):
    trained_parameters: int
    all_parameters: int
    base_dtypes: list[str]
    tensors: dict[str, tuple[list[int], str]]


class Identity(TypedDict):
    """What is used of it; its sha256 covers the whole."""

    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: list[str]
    use_rslora: bool
    use_dora: bool
    mixed_precision: str
    data_fingerprint: str
    base_checksum: str
    base_config_sha256: str


class Session(TypedDict):
    first_step: int
    num_processes: int
    threads: int
    device: str
    versions: dict[str, str]
    source_sha256: str
    source_commit: str | None
    not_bit_exact: list[str]


class Result(TypedDict):
    steps: int
    adapter_sha256: str
    ledger_head: str


class RunJson(TypedDict):
    identity: Identity
    identity_sha256: str
    base: Base
    data: Data
    census: Census
    num_steps: int
    sessions: list[Session]
    samples: NotRequired[dict[str, str]]
    result: NotRequired[Result]


_SCHEMA = TypeAdapter(RunJson)


def parse_run_json(content: bytes, name: Path) -> dict[str, Any]:
    """`run.json` as it was written, also what is not used here.

    Raises: CheckpointError that names what it lacks, or the first value that is of another kind."""
    try:
        _SCHEMA.validate_json(content, strict=True)
    except ValidationError as error:
        details = error.errors()
        keys = [".".join(str(part) for part in detail["loc"]) for detail in details]
        lacking = sorted(key for key, detail in zip(keys, details) if detail["type"] == "missing")
        if lacking:
            reason = f"has no {', '.join(lacking)}; an older version of the loop wrote it"
        else:
            reason = f"{keys[0] or 'the file'}: {details[0]['msg']}; it was changed since"
        raise CheckpointError(f"{name}: {reason}") from error
    return dict(json.loads(content))


def open_session(
    path: Path,
    facts: dict[str, Any],
    environment: dict[str, Any],
    first_step: int,
    changes: list[str],
) -> None:
    """Write `run.json` with one more session.

    `environment` is where it runs; `changes` are what makes its resume not bit-exact."""
    before = read_run_json(path)
    kept = before if before.get("identity_sha256") == facts["identity_sha256"] else {}
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    session = {"started": started, "first_step": first_step}
    sessions = [*kept.get("sessions", []), {**environment, **session, "not_bit_exact": changes}]
    write_run_json(path, {**kept, "format_version": 1, **facts, "sessions": sessions})


def read_run_json(path: Path) -> dict[str, Any]:
    """`run.json`, or an empty one. Raises: CheckpointError."""
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not the JSON that was written; give another output_dir"
        ) from error


def write_run_json(path: Path, run: dict[str, Any]) -> None:
    text = json.dumps(run, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    replace_file(path, text.encode())
