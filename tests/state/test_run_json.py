"""run.json, as far as a publication needs it: whole, or refused by the name of what it lacks."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from loop.errors import CheckpointError
from loop.state.run_json import parse_run_json

NAME = Path("RUN/run.json")
WHOLE: dict[str, Any] = {
    "identity": {
        "lora_r": 4, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": ["dense"], "use_rslora": False,
        "use_dora": False, "mixed_precision": "no", "data_fingerprint": "a", "base_checksum": "b",
        "base_config_sha256": "c", "seed": 42,
    },
    "identity_sha256": "d",
    "base": {"name": "base", "commit": None, "tokenizer_sha256": "e"},
    "data": {
        "name": "rows.jsonl", "commit": None, "templates": ["{text}"],
        "counts": dict.fromkeys(
            ["rows", "train_rows", "train_target_tokens", "heldout_rows", "heldout_target_tokens", "truncated",
             "dropped_without_target", "dropped_too_long", "duplicate_train_rows", "heldout_rows_also_in_train"], 1
        ),
    },
    "census": {
        "trained_parameters": 8, "all_parameters": 16, "base_dtypes": ["float32"],
        "tensors": {"x.lora_A.weight": [[4, 2], "float32"]},
    },
    "num_steps": 6,
    "sessions": [
        {"first_step": 0, "num_processes": 1, "threads": 1, "device": "x86_64", "versions": {"torch": "2.13.0"},
         "source_sha256": "f", "source_commit": None, "not_bit_exact": [], "started": "now"},
    ],
    "samples": {"base": "x"},
    "result": {"steps": 6, "adapter_sha256": "g", "ledger_head": "h", "eval_loss": 1.5},
}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested value, but in what is only passed on."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else []
    )
    return [place for key, part in inside for place in [(*path, key), *places(part, (*path, key))]]


def parsed(manifest: Any) -> dict[str, Any]:
    return parse_run_json(json.dumps(manifest).encode(), NAME)


def test_whole_manifest_comes_back_with_all_its_keys() -> None:
    assert parsed(WHOLE) == WHOLE
    unfinished = {key: value for key, value in WHOLE.items() if key not in ("samples", "result")}
    assert parsed(unfinished) == unfinished


PASSED_ON = {("identity", "seed"), ("sessions", 0, "started"), ("result", "eval_loss")}
USED = [place for place in places(WHOLE) if place not in PASSED_ON]


@pytest.mark.parametrize("place", USED, ids=lambda place: ".".join(map(str, place)))
def test_value_of_another_kind_is_refused_by_its_name(place: tuple[Any, ...]) -> None:
    manifest = copy.deepcopy(WHOLE)
    *way, last = place
    parent = manifest
    for key in way:
        parent = parent[key]
    parent[last] = {"of": ["another", 1.5, "kind"]}
    with pytest.raises(CheckpointError, match=r"^RUN/run\.json: "):
        parsed(manifest)


@pytest.mark.parametrize(
    "place", [place for place in USED if isinstance(place[-1], str) and len(place) < 3]
)
def test_what_is_missing_is_named(place: tuple[Any, ...]) -> None:
    if place in (("samples",), ("result",), ("samples", "base")):
        return
    manifest = copy.deepcopy(WHOLE)
    *way, last = place
    parent = manifest
    for key in way:
        parent = parent[key]
    del parent[last]
    with pytest.raises(
        CheckpointError, match=f"has no {'.'.join(place)}; an older version of the loop wrote it"
    ):
        parsed(manifest)


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"null", b'{"identity":', b"[" * 100_000, b'"\\ud800"', b"\xff"]
)
def test_what_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^RUN/run\.json: the file: "):
        parse_run_json(content, NAME)
