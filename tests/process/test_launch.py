import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from loop.config.knobs import Config
from loop.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentFault,
    HubError,
    LoopError,
    NonFiniteError,
)
from loop.process.command import run_command
from loop.process.launch import _check_gpus, make_accelerator
from tests.conftest import flags
from tests.processes import start

LAUNCH_CONFIGS = Path(__file__).parents[2] / "launch_configs"
LAUNCH_FILES = sorted(LAUNCH_CONFIGS.glob("*.yaml"))
Settings = Callable[..., dict[str, Any]]


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


# Launch configs


def test_there_are_launch_configs() -> None:
    assert {"cpu.yaml", "cpu_2.yaml", "one_gpu.yaml", "multi_gpu.yaml"} <= {
        path.name for path in LAUNCH_FILES
    }


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_a_launch_config_is_read_by_accelerates_own_loader(path: Path) -> None:
    loaded = load_config_from_file(str(path))
    written = yaml.safe_load(path.read_text())
    assert loaded.num_processes == written["num_processes"]
    assert loaded.mixed_precision == written["mixed_precision"]
    assert loaded.mixed_precision in ("no", "bf16", "fp16")
    assert written["num_machines"] == 1


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_a_launch_config_begins_with_its_exact_command(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    (command,) = [line for line in header if "accelerate launch" in line]
    assert f" --config_file launch_configs/{path.name} -m loop.train --config " in command
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_no_knob_of_the_run_stands_in_a_launch_config(path: Path) -> None:
    assert not yaml.safe_load(path.read_text()).keys() & Config.__dataclass_fields__.keys()


# Launch configs that would silently do something else


@pytest.mark.parametrize("precision", ["fp8", "float32"])
def test_a_precision_that_is_not_kept_is_refused_with_both_values(
    settings: Settings, tmp_path: Path, precision: str
) -> None:
    launched = start(
        flags(settings()), tmp_path / "log", environment={"ACCELERATE_MIXED_PRECISION": precision}
    )
    assert launched.wait() == [2], launched.text()
    said = (
        f"error: mixed_precision: found {precision} in the launch config, expected no, bf16 or"
        " fp16\n"
    )
    assert launched.text().endswith(said)
    assert "Traceback" not in launched.text()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "knobs", "named"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"},
            {"dtype": "float64"},
            "dtype: float64 with mixed_precision bf16",
        ),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, {}, "gradient_accumulation_steps: "),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "dynamo_backend: "),
        ({"WORLD_SIZE": "2"}, {}, "launch config: "),  # no address where the two would meet
    ],
    ids=["precision", "accumulation", "dynamo", "processes"],
)
def test_a_launch_config_that_would_do_something_else_than_asked_is_refused(
    settings: Settings,
    tmp_path: Path,
    environment: dict[str, str],
    knobs: dict[str, Any],
    named: str,
) -> None:
    launched = start(flags(settings(**knobs)), tmp_path / "log", environment=environment)
    assert launched.wait() == [2], launched.text()
    assert launched.text().splitlines()[-1].startswith(f"error: {named}")
    assert not (tmp_path / "run").exists()


def test_bf16_of_the_launch_config_is_in_the_run_and_its_adapter_stays_float32(
    settings: Settings, tmp_path: Path
) -> None:
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    launched = start(flags(settings(max_steps=1)), tmp_path / "log", environment=bf16)
    assert launched.wait() == [0], launched.text()
    assert "precision bf16" in launched.text()
    assert "dtype: float32 under bf16: a second copy of every weight" in launched.text()
    manifest = yaml.safe_load((tmp_path / "run" / "run.json").read_text())
    assert manifest["identity"]["mixed_precision"] == "bf16"
    assert {dtype for _, dtype in manifest["census"]["tensors"].values()} == {"float32"}


def test_a_refused_precision_is_refused_before_an_accelerator_is_made(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ConfigError, match="found fp8"):
        make_accelerator(config())


# Cards, as `torch.cuda` tells of them


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two of compute capability 8.0 on a machine where torch has kernels from 7.5 on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Card")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90", "sm_75", "compute_120"])
    return monkeypatch


def refusal(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that got no accelerator for a wrong launch config."""
    assert run_command(lambda: print(make_accelerator(config))) == 2
    return capsys.readouterr().err


def test_more_processes_than_gpus_are_refused_with_both_numbers(
    config: Callable[..., Config], two_cards: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_cards.setenv("LOCAL_WORLD_SIZE", "3")
    said = "num_processes: 3 on a machine with 2 GPU; --num_processes 2 uses what is there"
    assert refusal(config(), capsys) == f"error: {said}\n"


@pytest.mark.parametrize(
    ("capability", "kernels", "needed"),
    [
        ((7, 0), ["sm_90", "sm_75", "compute_120"], "7.5"),
        ((9, 0), ["sm_100", "compute_120"], "10.0"),
    ],
)
def test_a_gpu_that_is_older_than_every_kernel_of_this_torch_is_refused(
    config: Callable[..., Config],
    two_cards: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: tuple[int, int],
    kernels: list[str],
    needed: str,
) -> None:
    two_cards.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    two_cards.setattr(torch.cuda, "get_arch_list", lambda: kernels)
    own = "{}.{}".format(*capability)
    said = f"GPU: Card has compute capability {own}, this torch needs {needed}"
    assert refusal(config(), capsys).startswith(f"error: {said}; install a torch")


def test_cards_that_fit_are_not_refused(two_cards: pytest.MonkeyPatch) -> None:
    two_cards.setenv("LOCAL_WORLD_SIZE", "2")
    _check_gpus()
    two_cards.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    _check_gpus()


def test_a_driver_that_is_too_old_is_named_where_the_launch_config_is_for_a_gpu(
    config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    why = "The NVIDIA driver on your system is too old (found version 11040)"

    def init() -> None:
        raise RuntimeError(f"{why}.\nPlease update your GPU driver.")

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    reason = "mixed_precision: bf16 is for a GPU and torch sees none"
    assert refusal(config(), capsys) == f"error: {reason}; use launch_configs/cpu.yaml ({why})\n"


# How a command ends


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("knob: found 1, expected 2"), 2),
        (DataError("rows.jsonl: no rows"), 3),
        (CheckpointError("step-000002: torn"), 4),
        (EnvironmentFault("run: disk full"), 5),
        (HubError("nobody/nothing: not found"), 6),
        (NonFiniteError("step 3: loss nan"), 7),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_ours_is_its_exit_code_and_one_last_line_without_a_traceback(
    capsys: pytest.CaptureFixture[str], error: LoopError, code: int
) -> None:
    assert run_command(raising(error)) == code
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_success_is_0_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_an_interruption_is_130_and_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(KeyboardInterrupt())) == 130
    found = capsys.readouterr().err
    assert found.startswith("error: interrupted; ")
    assert "what was saved before is intact" in found
    assert "Traceback" not in found


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()],
    ids=["of the GPU", "of the machine"],
)
def test_memory_that_ran_out_is_5_and_names_the_knobs(
    capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    assert run_command(raising(error)) == 5
    found = capsys.readouterr().err
    assert found.startswith("error: out of ")
    assert all(
        knob in found for knob in ("micro_batch_tokens", "max_length", "gradient_checkpointing")
    )


@pytest.mark.parametrize(
    "error", [ValueError("unforeseen"), AssertionError("unforeseen"), KeyError("unforeseen")]
)
def test_a_bug_is_1_with_its_traceback_and_still_one_last_line(
    capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    assert run_command(raising(error)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith(f"error: a bug of this program: {type(error).__name__}: ")
    assert "unforeseen" in lines[-1]


def test_debug_shows_the_traceback_of_an_error_of_ours_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(raising(ConfigError("knob: found 1")), debug=True) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: knob: found 1"


def test_of_several_processes_only_the_first_says_what_all_of_them_met(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_command(raising(ConfigError("knob: found 1"))) == 2
    assert capsys.readouterr().err == ""
    assert run_command(raising(ValueError("only here"))) == 1
    assert capsys.readouterr().err.endswith("error: a bug of this program: ValueError: only here\n")


@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="only Linux limits the files of another process"
)
@pytest.mark.parametrize(
    ("limit", "save_steps"),
    [(3_000, 40), (9_000, 40), (20_000, 1)],
    ids=["run.json", "ledger", "moments of a checkpoint"],  # the first file to reach the limit
)
def test_a_disk_that_fills_up_ends_the_run_with_5_and_one_line(
    settings: Settings, tmp_path: Path, limit: int, save_steps: int
) -> None:
    knobs = settings(max_steps=40, save_steps=save_steps)
    before = start(
        flags({**knobs, "output_dir": tmp_path / "before", "stop_after_steps": 1}),
        tmp_path / "before.log",
    )
    assert before.wait() == [0], (
        before.text()
    )  # so that the rows lie tokenized in the library's cache
    launched = start(flags(knobs), tmp_path / "log")
    (process,) = launched.processes
    resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (limit, limit))  # it is still loading
    assert launched.wait() == [5], launched.text()
    last = launched.text().splitlines()[-1]
    assert last.startswith("error: ")
    assert "File too large" in last
    assert "Traceback" not in launched.text()
    assert [path.name for path in (tmp_path / "run").rglob(".tmp-step*")] == []


def test_an_output_dir_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    knobs = settings(
        output_dir=tmp_path / "file" / "run", model_name_or_path="nobody/no-such-model"
    )
    launched = start(flags(knobs), tmp_path / "log")
    assert launched.wait() == [5], launched.text()  # 6 if it had looked for the model first
    assert launched.text().startswith(f"error: output_dir: {tmp_path}{os.sep}file")
    assert len(launched.text().splitlines()) == 1


def test_a_bug_of_ours_in_a_real_run_is_not_hidden(settings: Settings, tmp_path: Path) -> None:
    launched = start(
        flags(settings()), tmp_path / "log", environment={"WORLD_SIZE": "not a number"}
    )
    assert launched.wait() == [1], launched.text()
    assert "Traceback" in launched.text()
