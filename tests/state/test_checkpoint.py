import ast
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from torch import Tensor

import loop
from loop.errors import CheckpointError, NonFiniteError
from loop.state.checkpoint import (
    Checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from loop.state.ledger import LedgerPosition
from tests.conftest import flags
from tests.processes import run, start

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "optimizer.safetensors",
    "state.json",
]  # fmt: skip
LAYERS = "base_model.model.transformer.h.{}.self_attention.query_key_value.lora_A.weight"


def small(step: int = 7) -> Checkpoint:
    """With what an exact copy is easily lost on: negative zero, a denormal, an empty tensor,
    several dtypes."""
    return Checkpoint(
        step=step,
        identity={
            "seed": 42,
            "lora_r": 4,
            "learning_rate": 0.1,
            "lora_target_modules": ["a", "b"],
            "text": "é",
        },
        ledger=LedgerPosition(lines=9, bytes=1234, head="ab" * 32),
        adapter_config=b'{\n  "r": 4\n}\n',
        adapter={
            "b.weight": torch.tensor([[1e-40, -0.0], [3.0, 1 / 3]]),
            "a.weight": torch.empty(0, 4),
        },
        optimizer={
            "b.weight.exp_avg": torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=torch.bfloat16),
            "b.weight.exp_avg_sq": torch.tensor([[1e-12, 0.0], [1.0, 2.0]], dtype=torch.float64),
            "b.weight.step": torch.tensor(7.0),
        },
    )


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """Names, dtypes, shapes and bytes: what `torch.equal` would let differ in a sign of zero or a
    dtype."""
    flat = {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8)
        for name, tensor in tensors.items()
    }
    return {
        name: (tensor.dtype, tensor.shape, flat[name].numpy().tobytes())
        for name, tensor in tensors.items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rebuild_manifest(folder: Path, **changed: Any) -> None:
    """The manifest of the files as they lie there now, by the specification and not by the code
    under test."""

    def spelling(value: Any) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["manifest_sha256"]
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    manifest["identity_sha256"] = hashlib.sha256(
        spelling(json.loads((folder / "state.json").read_bytes())["identity"])
    ).hexdigest()
    manifest |= changed
    manifest["manifest_sha256"] = hashlib.sha256(spelling(manifest)).hexdigest()
    (folder / "manifest.json").write_bytes(spelling(manifest))


@pytest.fixture(scope="module")
def checkpoints(bloom: Path, ragged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a real run, after 2 and after 4 updates."""
    folder = tmp_path_factory.mktemp("checkpoint")
    knobs = {
        "model_name_or_path": bloom,
        "dataset_name": ragged,
        "output_dir": folder / "run",
        "lora_r": 2,
    }
    knobs |= {
        "max_steps": 4,
        "save_steps": 2,
        "max_length": 64,
        "micro_batch_tokens": 256,
        "global_batch_size": 8,
    }
    run(flags(knobs), folder / "log")
    return folder / "run" / "checkpoints"


@pytest.fixture
def real(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the newest, to be spoilt."""
    return shutil.copytree(checkpoints / "step-000004", tmp_path / "step-000004")


@pytest.fixture(scope="module")
def spoilt(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One more copy, to be spoilt and mended many times."""
    return shutil.copytree(
        checkpoints / "step-000004", tmp_path_factory.mktemp("spoilt") / "step-000004"
    )


# What is written


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    written = small()
    read = read_checkpoint(write_checkpoint(tmp_path, written))
    assert (read.step, read.identity, read.ledger) == (7, written.identity, written.ledger)
    assert read.adapter_config == b'{\n  "r": 4\n}\n'
    assert bits(read.adapter) == bits(written.adapter)
    assert bits(read.optimizer) == bits(written.optimizer)
    assert read.optimizer["b.weight.step"].item() == 7.0


def test_a_checkpoint_of_a_run_holds_the_adapter_and_its_moments_after_that_many_updates(
    real: Path,
) -> None:
    checkpoint = read_checkpoint(real)
    names = [LAYERS.format(0), LAYERS.format(0).replace("lora_A", "lora_B")]
    names += [name.replace("h.0", "h.1") for name in names]
    assert sorted(checkpoint.adapter) == sorted(names)
    assert sorted(checkpoint.optimizer) == sorted(
        f"{n}.{m}" for n in names for m in ("exp_avg", "exp_avg_sq", "step")
    )
    assert {checkpoint.optimizer[f"{name}.step"].item() for name in names} == {4.0}
    assert checkpoint.step == 4
    assert checkpoint.ledger.lines == 4


def test_a_checkpoint_is_exactly_these_files(real: Path) -> None:
    assert sorted(path.name for path in real.iterdir()) == FILES
    assert sorted(load_file(real / "adapter_model.safetensors")) == sorted(
        read_checkpoint(real).adapter
    )


def test_equal_states_are_equal_bytes_whatever_the_order_they_were_made_in(tmp_path: Path) -> None:
    once = small()
    again = replace(
        once,
        identity=dict(reversed(once.identity.items())),
        adapter=dict(reversed(once.adapter.items())),
        optimizer=dict(reversed(once.optimizer.items())),
    )
    (tmp_path / "second").mkdir()
    first = contents(write_checkpoint(tmp_path, once))
    assert contents(write_checkpoint(tmp_path / "second", again)) == first
    assert (
        contents(write_checkpoint(tmp_path / "second", again)) == first
    )  # over the one that is there


def test_the_manifest_proves_every_other_file_and_itself(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, small())
    assert folder.name == "step-000007"
    manifest = json.loads((folder / "manifest.json").read_bytes())
    itself = manifest.pop("manifest_sha256")
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    assert itself == hashlib.sha256(body).hexdigest()
    assert sorted(manifest["files"]) == sorted({*FILES} - {"manifest.json"})
    for name, stated in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert stated == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["ledger"] == {"lines": 9, "bytes": 1234, "head": "ab" * 32}
    assert (manifest["format_version"], manifest["step"]) == (1, 7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["adapter", "optimizer"])
def test_a_state_that_is_not_finite_is_refused_before_anything_is_written(
    tmp_path: Path, part: str, value: float
) -> None:
    checkpoint = small()
    name, tensor = next(iter(getattr(checkpoint, part).items()))
    tensor[1, 1] = value
    with pytest.raises(
        NonFiniteError, match=f"step 7: {name} is not finite; this state was not saved"
    ) as refused:
        write_checkpoint(tmp_path / "checkpoints", checkpoint)
    assert refused.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_loss_is_no_number_stops_with_7_names_the_rows_and_keeps_the_last_checkpoint(
    bloom: Path, ragged: Path, tmp_path: Path
) -> None:
    knobs = {
        "model_name_or_path": bloom,
        "dataset_name": ragged,
        "output_dir": tmp_path / "run",
        "max_steps": 4,
    }
    knobs |= {
        "max_length": 64,
        "global_batch_size": 2,
        "save_steps": 1,
        "lora_r": 2,
        "learning_rate": 1e30,
    }
    launched = start(flags(knobs), tmp_path / "log")
    assert launched.wait() == [7], launched.text()
    drawn = (
        np.random.RandomState([42, 0]).permutation(40)[2:4].tolist()
    )  # the documented order, seed 42, step 1
    assert (
        f"error: step 1: loss nan, gradient norm nan, rows {drawn}: the adapter was not touched"
        in launched.text()
    )
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-000001"
    ]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "step-000001").step == 1


# What is refused


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_of_every_file_is_refused_by_name(spoilt: Path, name: str) -> None:
    path = spoilt / name
    whole = path.read_bytes()
    lengths = range(0, len(whole), max(1, len(whole) // 200))
    for length in [*lengths, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=name) as refused:
            read_checkpoint(spoilt)
        assert refused.value.exit_code == 4
    path.write_bytes(whole)
    read_checkpoint(spoilt)


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@settings(derandomize=True, max_examples=60)
def test_any_changed_byte_of_any_file_is_refused_by_name(
    spoilt: Path, name: str, data: st.DataObject
) -> None:
    path = spoilt / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(spoilt)
    finally:
        path.write_bytes(whole)


def _zero_body(path: Path) -> None:
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:header] + bytes(len(content) - header))


def _symlink(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(f"../{path.name}")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOIL: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "one byte longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "symlink to the same bytes": _symlink,
    "second name of the same file": lambda path: (path.parent.parent / "second").hardlink_to(path),
    "FIFO": _fifo,
    "folder": _folder,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spoil", SPOIL)
def test_a_spoilt_file_is_refused_by_name(real: Path, spoil: str, name: str) -> None:
    SPOIL[spoil](real / name)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(real)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_tensors_of_zeros_behind_a_right_header_are_refused(real: Path, name: str) -> None:
    names = set(load_file(real / name))
    _zero_body(real / name)
    assert set(load_file(real / name)) == names  # safetensors itself has no objection
    with pytest.raises(CheckpointError, match=f"{name}: sha256"):
        read_checkpoint(real)


@pytest.mark.parametrize(
    "name", ["extra.json", ".hidden", "adapter_model.bin", "optimizer.pt", "folder/inside"]
)
def test_anything_beside_the_files_of_a_checkpoint_is_refused_by_name(
    real: Path, name: str
) -> None:
    (real / name).parent.mkdir(exist_ok=True)
    (real / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"missing or unexpected: {name.split('/')[0]}$"):
        read_checkpoint(real)


@pytest.mark.parametrize("name", FILES[1:])  # adapter_config.json is equal at every step
def test_a_file_of_another_step_of_the_same_run_is_refused(
    real: Path, checkpoints: Path, name: str
) -> None:
    shutil.copyfile(checkpoints / "step-000002" / name, real / name)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(real)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(real: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: not the manifest of step-000005"):
        read_checkpoint(real.rename(real.with_name("step-000005")))


def test_a_link_to_a_whole_checkpoint_is_refused(real: Path) -> None:
    (real.parent / "elsewhere").mkdir()
    link = real.parent / "elsewhere" / "step-000004"
    link.symlink_to(real)
    with pytest.raises(CheckpointError, match="found no folder, expected a checkpoint"):
        read_checkpoint(link)


def _with_names_swapped(content: bytes) -> bytes:
    tensors = load(content)
    first, second = LAYERS.format(0), LAYERS.format(1)
    tensors[first], tensors[second] = tensors[second], tensors[first]
    return save(tensors, {"format": "pt"})


def test_two_layers_under_each_others_names_are_refused(real: Path) -> None:
    path = real / "adapter_model.safetensors"
    path.write_bytes(_with_names_swapped(path.read_bytes()))
    with pytest.raises(CheckpointError, match="adapter_model"):
        read_checkpoint(real)


def test_a_manifest_rebuilt_over_changed_tensors_is_accepted_because_it_proves_integrity_not_authorship(
    real: Path,
) -> None:
    before = read_checkpoint(real).adapter
    path = real / "adapter_model.safetensors"
    path.write_bytes(_with_names_swapped(path.read_bytes()))
    rebuild_manifest(real)
    after = read_checkpoint(real).adapter
    assert torch.equal(after[LAYERS.format(0)], before[LAYERS.format(1)])
    assert not torch.equal(after[LAYERS.format(0)], before[LAYERS.format(0)])


def test_a_newer_format_is_refused_with_both_numbers(real: Path) -> None:
    rebuild_manifest(real, format_version=2)
    with pytest.raises(CheckpointError, match=r"manifest\.json: format 2, this program reads 1$"):
        read_checkpoint(real)


LEDGER = {"lines": 4, "bytes": 1000, "head": "ab" * 32}
PROVEN = {"bytes": 1, "sha256": "0" * 64}
LISTED = [name for name in FILES if name != "manifest.json"]


@pytest.mark.parametrize(
    "changed",
    [
        {"step": True},
        {"step": -4},
        {"step": 4.0},
        {"step": "4"},
        {"step": None},
        {"step": 10**30},
        {"ledger": {**LEDGER, "lines": True}},
        {"ledger": {**LEDGER, "bytes": -1}},
        {"ledger": {**LEDGER, "bytes": 1.5}},
        {"ledger": {**LEDGER, "more": 1}},
        {"ledger": {"lines": 4}},
        {"ledger": []},
        {"format_version": True},
        {"format_version": 0},
        {"format_version": "1"},
        {"format_version": None},
        {"files": []},
        {"files": None},
        {"files": {}},
        {"files": {name: PROVEN for name in LISTED[1:]}},
        {"files": {name: PROVEN for name in [*LISTED, "more"]}},
        {"files": {name: {**PROVEN, "bytes": True} for name in LISTED}},
        {"files": {name: {**PROVEN, "bytes": -1} for name in LISTED}},
        {"files": {name: {**PROVEN, "bytes": 10**18} for name in LISTED}},
        {"files": {name: {**PROVEN, "bytes": 2**70} for name in LISTED}},
        {"files": {name: {"bytes": 10**6, "sha256": 5} for name in LISTED}},
        {"files": {name: {"bytes": 10**6, "sha256": None} for name in LISTED}},
        {"files": {name: 1 for name in LISTED}},
    ],
    ids=lambda changed: str(changed)[:50],
)  # fmt: skip
def test_a_manifest_outside_the_schema_is_refused_even_with_its_hash_rebuilt(
    real: Path, changed: dict[str, Any]
) -> None:
    rebuild_manifest(real, **changed)
    with pytest.raises(CheckpointError, match=r"\.json: "):
        read_checkpoint(real)


@pytest.mark.parametrize(
    "name",
    [
        "../canary", "../../canary", "/etc/hostname", "a/../../canary", "C:\\canary", "state.json\0", "", ".", "..",
        "STATE.JSON", "state.json/", "./state.json",
    ],
)  # fmt: skip
def test_a_manifest_that_names_any_other_path_is_refused_before_it_is_opened(
    real: Path, name: str
) -> None:
    os.mkfifo(real.parent / "canary")  # opening it for reading would wait for ever
    manifest = json.loads((real / "manifest.json").read_bytes())
    files = {other: proven for other, proven in manifest["files"].items() if other != "state.json"}
    rebuild_manifest(real, files={**files, name: manifest["files"]["state.json"]})
    with pytest.raises(CheckpointError, match="not the manifest of step-000004"):
        read_checkpoint(real)


@pytest.mark.parametrize(
    "state",
    [
        {"step": 3},
        {"step": 4.0},
        {"step": True},
        {"format_version": 2},
        {"identity": []},
        {"identity": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_state_outside_the_schema_is_refused_even_with_its_hash_rebuilt(
    real: Path, state: dict[str, Any]
) -> None:
    path = real / "state.json"
    changed = {**json.loads(path.read_bytes()), **state}
    path.write_bytes(json.dumps(changed, sort_keys=True, separators=(",", ":")).encode())
    rebuild_manifest(real)
    with pytest.raises(CheckpointError, match=r"state\.json: "):
        read_checkpoint(real)


# Nothing is executed


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "optimizer.pt", "training_args.bin", "state.pkl"]
)
def test_a_pickle_beside_a_checkpoint_is_refused_and_never_run(
    real: Path, tmp_path: Path, name: str
) -> None:
    (real / name).write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(real)
    assert not (tmp_path / "canary").exists()
    pickle.loads((real / name).read_bytes())  # the payload is live
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_a_pickle_in_place_of_a_file_is_refused_by_name_and_never_run_even_with_the_manifest_rebuilt(
    real: Path, tmp_path: Path, name: str
) -> None:
    (real / name).write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    rebuild_manifest(real)
    with pytest.raises(CheckpointError, match=f"{name}.*not safetensors"):
        read_checkpoint(real)
    assert not (tmp_path / "canary").exists()


def test_nothing_in_the_package_can_unpickle() -> None:
    sources = sorted(Path(loop.__file__).parent.rglob("*.py"))
    assert len(sources) > 15
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, (ast.Import, ast.ImportFrom))
                else []
            )
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {*names} & {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "joblib",
                "shelve",
                "marshal",
            }, path
            attribute = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert attribute not in (
                "torch.load",
                "torch.save",
                "torch.serialization",
                "numpy.load",
                "np.load",
            ), path


# Which checkpoints there are


def test_checkpoints_are_listed_by_number_and_what_is_not_one_is_ignored(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-000010", "step-000009", "step-999999", "step-100000000000"):
        (tmp_path / name).mkdir()
    for junk in (
        "step-abc",
        "step-",
        "step-9",
        "step-000008.bak",
        "xstep-000007",
        "step--00001",
        "step-0000000000001",
    ):
        (tmp_path / junk).mkdir()
    (tmp_path / ".tmp-step-000011").mkdir()
    (tmp_path / "step-000005").write_bytes(b"a file")
    found = [path.name for path in list_checkpoints(tmp_path)]
    assert found == [
        "step-000009",
        "step-000010",
        "step-999999",
        "step-1000000",
        "step-100000000000",
    ]
    assert list_checkpoints(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("newest", "keep", "left"),
    [
        (4, 2, [3, 4]),
        (4, 3, [2, 3, 4]),
        (4, 4, [1, 2, 3, 4]),
        (4, 9, [1, 2, 3, 4]),
        (
            2,
            2,
            [1, 2, 3, 4],
        ),  # gone back to 2: what is newer than the newest stays until it is written again
        (3, 2, [2, 3, 4]),
    ],
)
def test_pruning_keeps_the_newest_and_never_touches_what_is_newer(
    tmp_path: Path, newest: int, keep: int, left: list[int]
) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, small(step))
    prune_checkpoints(tmp_path, tmp_path / f"step-00000{newest}", keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-00000{step}" for step in left
    ]
    for step in left:
        assert read_checkpoint(tmp_path / f"step-00000{step}").step == step
