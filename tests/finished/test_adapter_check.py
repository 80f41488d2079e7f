"""An adapter held against its run, file by file: the one that was trained passes, one changed in
anything does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from loop.config.knobs import Config
from loop.errors import CheckpointError
from loop.finished.adapter_check import check_adapter
from loop.model.base import load_base
from loop.model.lora import adapter_config_json, adapter_parameters, add_adapter, census
from tests.conftest import flags
from tests.processes import run

pytestmark = pytest.mark.runs
Files = dict[str, bytes]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.transformer.h.0.self_attention.query_key_value"
A, B = LAYER + ".lora_A.weight", LAYER + ".lora_B.weight"  # [4, 32] and [96, 4]
BLOOM_LINEAR = ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]


@pytest.fixture(scope="module")
def trained(bloom: Path, ragged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps. Nothing here writes to it."""
    folder = tmp_path_factory.mktemp("trained")
    knobs: dict[str, Any] = {
        "model_name_or_path": bloom, "dataset_name": ragged, "output_dir": folder / "run", "max_length": 128,
        "micro_batch_tokens": 256, "global_batch_size": 8, "max_steps": 2, "learning_rate": 0.03, "lora_r": 4,
        "lora_target_modules": "all-linear",
    }  # fmt: skip
    run(flags(knobs), folder / "log")
    return folder / "run"


@pytest.fixture
def files(trained: Path) -> Files:
    return {name: (trained / "adapter" / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def run_json(trained: Path) -> dict[str, Any]:
    return dict(json.loads((trained / "run.json").read_bytes()))


def with_tensors(files: Files, **changed: Tensor | None) -> Files:
    """The files with other tensors; None takes one out."""
    tensors = {**load(files[WEIGHTS]), **changed}
    return {
        **files,
        WEIGHTS: save({name: tensor for name, tensor in tensors.items() if tensor is not None}),
    }


def with_config(files: Files, **changed: Any) -> Files:
    return {**files, CONFIG: json.dumps({**json.loads(files[CONFIG]), **changed}).encode()}


def refused(files: Files, run: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        check_adapter(files, run)
    assert error.value.exit_code == 4
    return str(error.value)


def with_value(shape: tuple[int, ...], value: float) -> Tensor:
    """Ones, the last of which is `value`."""
    tensor = torch.ones(shape)
    tensor[-1, -1] = value
    return tensor


# The one that was trained


def test_what_a_run_has_trained_passes(files: Files, run_json: dict[str, Any]) -> None:
    check_adapter(files, run_json)
    assert len(load(files[WEIGHTS])) == 16  # two layers, four modules, A and B


@pytest.mark.parametrize("empty", [None, False, {}, []])
def test_a_key_of_another_peft_may_be_there_if_it_is_empty(
    files: Files, run_json: dict[str, Any], empty: Any
) -> None:
    check_adapter(with_config(files, a_key_of_2030=empty, peft_version="9.9.9"), run_json)


def test_one_lora_b_that_has_moved_is_enough(files: Files, run_json: dict[str, Any]) -> None:
    zeroed = {
        name: torch.zeros_like(tensor)
        for name, tensor in load(files[WEIGHTS]).items()
        if "lora_B" in name
    }
    check_adapter(with_tensors(files, **{**zeroed, B: with_value((96, 4), 1e-30)}), run_json)


@pytest.mark.parametrize(
    ("knobs", "tensors"),
    [
        ({"use_dora": True, "lora_target_modules": None}, 6),  # two layers of A, B and magnitudes
        ({"use_rslora": True}, 16),
        ({"lora_alpha": 7, "lora_dropout": 0.1, "lora_r": 2}, 16),
        ({"dtype": "float64"}, 16),
    ],
    ids=["DoRA", "rsLoRA", "other numbers", "double base"],
)
@pytest.mark.parametrize("commit", [None, "ab" * 20], ids=["folder", "Hub"])
def test_every_kind_of_adapter_passes_beside_its_own_run_and_beside_no_other(
    config: Callable[..., Config],
    files: Files,
    run_json: dict[str, Any],
    knobs: dict[str, Any],
    tensors: int,
    commit: str | None,
) -> None:
    theirs = made(config(**knobs), commit)
    assert len(load(theirs[0][WEIGHTS])) == tensors
    check_adapter(*theirs)
    assert refused(theirs[0], run_json)
    assert refused(files, theirs[1])


def made(config: Config, commit: str | None) -> tuple[Files, dict[str, Any]]:
    """Files and `run.json`, as far as it is read, of an adapter that is not trained but moved."""
    model = add_adapter(load_base(config, torch.device("cpu")), config)
    tensors = {
        name: parameter.detach() + 0.5 for name, parameter in adapter_parameters(model).items()
    }
    name = "anna/bloom" if commit else config.model_name_or_path
    named = Config(
        model_name_or_path=name, model_revision=commit, dataset_name="none", output_dir="none"
    )
    counted = census(model)
    run = {
        "identity": {**config.knobs("identity"), "lora_target_modules": counted["target_modules"]},
        "base": {"name": "anna/bloom" if commit else "bloom0", "commit": commit},
        "census": counted,
    }
    return {CONFIG: adapter_config_json(model, named), WEIGHTS: save(tensors)}, run


# Its tensors


@pytest.mark.parametrize(
    "kept", [0, 7, 100, -1], ids=["nothing", "half a length", "half a header", "all but a byte"]
)
def test_a_truncated_file_is_refused(files: Files, run_json: dict[str, Any], kept: int) -> None:
    said = refused({**files, WEIGHTS: files[WEIGHTS][:kept]}, run_json)
    assert said.startswith("adapter_model.safetensors: not safetensors: ")


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + bytes(100), b"version https://git-lfs.github.com/spec/v1\n" * 3]
)
def test_a_file_that_is_something_else_is_refused(
    files: Files, run_json: dict[str, Any], content: bytes
) -> None:
    said = refused({**files, WEIGHTS: content}, run_json)
    assert said.startswith("adapter_model.safetensors: not safetensors: ")


def test_a_dtype_that_torch_does_not_have_is_refused(
    files: Files, run_json: dict[str, Any]
) -> None:
    header = json.dumps({A: {"dtype": "F4", "shape": [4, 32], "data_offsets": [0, 64]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(64)
    assert (
        refused({**files, WEIGHTS: content}, run_json)
        == "adapter_model.safetensors: not safetensors: 'F4'"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "shape"), [(A, (4, 32)), (B, (96, 4))])
def test_a_value_that_is_not_finite_is_refused_by_the_tensors_name(
    files: Files, run_json: dict[str, Any], name: str, shape: tuple[int, ...], value: float
) -> None:
    said = refused(with_tensors(files, **{name: with_value(shape, value)}), run_json)
    assert said == f"adapter_model.safetensors: {name} holds NaN or infinity"


@pytest.mark.parametrize(("name", "shape"), [(A, [4, 32]), (B, [96, 4])])
def test_a_missing_tensor_is_refused_by_its_name(
    files: Files, run_json: dict[str, Any], name: str, shape: list[int]
) -> None:
    said = refused(with_tensors(files, **{name: None}), run_json)
    assert (
        said
        == f"adapter_model.safetensors: {name}: found nothing, run.json states [{shape}, 'float32']"
    )


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.weight",
        "base_model.model.transformer.word_embeddings.weight",
        "transformer.word_embeddings.weight",
        LAYER + ".weight",
        LAYER + ".base_layer.weight",
        LAYER + ".bias",
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.lm_head.lora_A.weight",  # of a module that is no target
        "base_model.model.transformer.word_embeddings.lora_embedding_A",
        A.removesuffix(".weight") + ".default.weight",
        A.removeprefix("base_model."),
        A + ".quant_state",
        "",
    ],
)
def test_a_tensor_that_is_no_part_of_an_adapter_is_refused_by_its_name(
    files: Files, run_json: dict[str, Any], name: str
) -> None:
    said = refused(with_tensors(files, **{name: torch.ones(4, 32)}), run_json)
    assert (
        said == f"adapter_model.safetensors: {name} is no tensor of this adapter; a base's weight?"
    )


def test_a_tensor_of_a_layer_that_the_base_does_not_have_is_refused(
    files: Files, run_json: dict[str, Any]
) -> None:
    name = A.replace(".h.0.", ".h.2.")
    said = refused(with_tensors(files, **{name: torch.ones(4, 32)}), run_json)
    assert (
        said
        == f"adapter_model.safetensors: {name}: found [[4, 32], 'float32'], run.json states nothing"
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [(A, [8, 32]), (A, [32, 4]), (A, [32]), (A, []), (B, [96, 8]), (B, [4, 96]), (B, [96])],
)
def test_another_rank_is_refused_by_the_tensors_name(
    files: Files, run_json: dict[str, Any], name: str, shape: list[int]
) -> None:
    said = refused(with_tensors(files, **{name: torch.ones(shape)}), run_json)
    assert said == f"adapter_model.safetensors: {name} is {shape}, r is 4"


@pytest.mark.parametrize(
    ("name", "shape", "stated"),
    [(A, [4, 33], "[4, 32]"), (A, [4, 32, 1], "[4, 32]"), (B, [32, 4], "[96, 4]")],
)
def test_another_width_is_refused_by_the_tensors_name(
    files: Files, run_json: dict[str, Any], name: str, shape: list[int], stated: str
) -> None:
    said = refused(with_tensors(files, **{name: torch.ones(shape)}), run_json)
    expected = f"{name}: found [{shape}, 'float32'], run.json states [{stated}, 'float32']"
    assert said == f"adapter_model.safetensors: {expected}"


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float64", "int32", "bool", "float8_e4m3fn", "float8_e5m2"]
)
def test_another_dtype_is_refused_by_the_tensors_name(
    files: Files, run_json: dict[str, Any], dtype: str
) -> None:
    said = refused(
        with_tensors(files, **{B: torch.ones(96, 4).to(getattr(torch, dtype))}), run_json
    )
    expected = f"{B}: found [[96, 4], '{dtype}'], run.json states [[96, 4], 'float32']"
    assert said == f"adapter_model.safetensors: {expected}"


def test_an_adapter_whose_b_is_zero_everywhere_is_refused(
    files: Files, run_json: dict[str, Any]
) -> None:
    zeroed = {
        name: torch.zeros_like(tensor)
        for name, tensor in load(files[WEIGHTS]).items()
        if "lora_B" in name
    }
    said = refused(with_tensors(files, **zeroed), run_json)
    assert said == "adapter_model.safetensors: lora_B is zero everywhere: nothing was trained"


# Its config


@pytest.mark.parametrize(
    ("key", "found", "expected"),
    [
        ("r", 8, "4"),
        ("r", "4", "4"),
        ("lora_alpha", 64, "32"),
        ("lora_dropout", 0.1, "0.0"),
        ("target_modules", ["query_key_value"], str(BLOOM_LINEAR)),
        ("target_modules", "all-linear", str(BLOOM_LINEAR)),
        ("use_rslora", True, "False"),
        ("use_dora", True, "False"),
        ("modules_to_save", ["lm_head"], "None"),
        ("bias", "all", "'none'"),
        ("base_model_name_or_path", "/home/anna/bloom", "None"),
        ("base_model_name_or_path", "bigscience/bloom-560m", "None"),
        ("revision", "main", "None"),
        ("inference_mode", False, "True"),
        ("task_type", "SEQ_CLS", "'CAUSAL_LM'"),
        ("peft_type", "IA3", "<PeftType.LORA: 'LORA'>"),
        ("init_lora_weights", "pissa", "True"),
        ("rank_pattern", {"query_key_value": 8}, "{}"),
        ("alpha_pattern", {"query_key_value": 8}, "{}"),
        ("layers_to_transform", [0], "None"),
        ("fan_in_fan_out", True, "False"),
        ("trainable_token_indices", [1], "None"),
        ("auto_mapping", {"parent_library": "evil"}, "None"),
        ("a_key_of_2030", "on", "None"),
        ("a_key_of_2030", 1, "None"),
        ("a_key_of_2030", "", "None"),
    ],
)
def test_a_config_that_does_not_follow_from_the_run_is_refused_by_the_key(
    files: Files, run_json: dict[str, Any], key: str, found: Any, expected: str
) -> None:
    said = refused(with_config(files, **{key: found}), run_json)
    assert said == f"adapter_config.json: {key} is {found!r}, the run's is {expected}"


@pytest.mark.parametrize(
    "key", ["r", "lora_alpha", "target_modules", "inference_mode", "peft_type", "task_type"]
)
def test_a_config_without_a_key_is_refused_by_it(
    files: Files, run_json: dict[str, Any], key: str
) -> None:
    kept = {name: value for name, value in json.loads(files[CONFIG]).items() if name != key}
    said = refused({**files, CONFIG: json.dumps(kept).encode()}, run_json)
    assert said.startswith(f"adapter_config.json: {key} is None, the run's is ")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"r: 4", b"\xff\xfe", b'"text"', b"4", b"null", b"[" * 100_000],
    ids=[
        "empty",
        "torn",
        "YAML",
        "no UTF-8",
        "a text",
        "a number",
        "null",
        "deeper than Python goes",
    ],
)
def test_a_config_that_is_no_json_object_is_refused(
    files: Files, run_json: dict[str, Any], content: bytes
) -> None:
    assert refused({**files, CONFIG: content}, run_json).startswith(
        ("adapter_config.json: not JSON: ", "adapter_config.json: found a ")
    )
