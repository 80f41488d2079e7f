"""What a user types, through the real `accelerate launch`: the launch configs, kills of the whole
tree, last words."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import flags
from tests.processes import run
from tests.test_train import assert_same_run, step_lines

pytestmark = pytest.mark.runs
ROOT = Path(__file__).parents[2]
Settings = Callable[..., dict[str, Any]]


def launch_words(config: str, argv: list[str]) -> list[str]:
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet"]
    return [
        *launcher,
        "--config_file",
        str(ROOT / "launch_configs" / config),
        "-m",
        "loop.train",
        *argv,
    ]


def user_environment() -> dict[str, str]:
    """Without what the tests set: the launch config decides the number of threads.

    pytest's own variable comes and goes with each test, while other threads ask here."""
    return {
        name: os.environ[name]
        for name in os.environ
        if name not in ("OMP_NUM_THREADS", "PYTEST_CURRENT_TEST")
    }


def launch(
    config: str, argv: list[str], folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    places = {**user_environment(), **(environment or {})}
    return subprocess.run(
        launch_words(config, argv),
        cwd=folder,
        env=places,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("launch_config", "processes", "threads"), [("cpu.yaml", 1, 2), ("cpu_2.yaml", 2, 1)]
)
def test_launch_config_starts_its_processes_and_threads(
    launch_config: str, processes: int, threads: int, settings: Settings, tmp_path: Path
) -> None:
    used = settings(eval_fraction=0.1)
    done = launch(launch_config, flags(used), tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"cpu, {processes} x {threads} threads, precision no" in done.stdout
    assert "warn" not in done.stderr.lower()
    assert "adapter  held-out loss" in done.stdout
    again = launch(launch_config, flags(used), tmp_path)
    assert again.returncode == 0
    assert "This run is finished: nothing was changed." in again.stdout


@pytest.mark.parametrize(("launch_config", "processes"), [("cpu.yaml", 1), ("cpu_2.yaml", 2)])
def test_killed_tree_under_the_launcher_resumes_to_the_same_bytes(
    launch_config: str, processes: int, settings: Settings, tmp_path: Path
) -> None:
    usual = {"max_steps": 300, "save_steps": 20, "lora_dropout": 0.1, "eval_fraction": 0.1}
    straight, killed = (
        settings(**usual, output_dir=str(tmp_path / name)) for name in ("straight", "killed")
    )
    run(flags(straight), tmp_path / "log", processes, {"OMP_NUM_THREADS": "1"})
    ledger = Path(killed["output_dir"]) / "ledger.jsonl"
    environment = {**user_environment(), "OMP_NUM_THREADS": "1"}
    words = launch_words(launch_config, flags(killed))
    words[words.index("-m") : words.index("-m")] = ["--num_cpu_threads_per_process", "1"]
    moments = random.Random(processes)
    for _ in range(2):
        before = ledger.stat().st_size if ledger.exists() else 0
        launcher = subprocess.Popen(
            words,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while launcher.poll() is None and (not ledger.exists() or ledger.stat().st_size <= before):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        tree = [
            *psutil.Process(launcher.pid).children(recursive=True),
            psutil.Process(launcher.pid),
        ]
        assert len(tree) == (2 if processes == 1 else 3)
        for process in tree:
            process.kill()
        launcher.wait()
        psutil.wait_procs(tree, timeout=20)
        assert not (Path(killed["output_dir"]) / "adapter").exists(), (
            "the run ended before it was killed"
        )
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(Path(killed["output_dir"]), Path(straight["output_dir"]))


@pytest.mark.parametrize("launch_config", ["cpu.yaml", "cpu_2.yaml"])
def test_last_words_of_a_refusal_are_one_sentence(
    launch_config: str, settings: Settings, tmp_path: Path
) -> None:
    done = launch(launch_config, [*flags(settings()), "--lora_target_modules", "q_proj"], tmp_path)
    assert done.returncode == 1  # the launcher's, whatever the program's own
    said = "lora_target_modules: q_proj is not in this model; it has dense, dense_4h_to_h"
    assert said in " ".join(done.stderr[-700:].split())
    if launch_config == "cpu.yaml":
        assert done.stderr.strip().splitlines()[-1].startswith(f"error: {said}")
        assert "Traceback" not in done.stderr


def test_recipe_given_to_the_launcher_is_refused_before_anything_starts(tmp_path: Path) -> None:
    words = launch_words("cpu.yaml", ["--config", "demo"])
    words[words.index("--config_file") + 1] = str(ROOT / "loop" / "recipes" / "demo.yaml")
    done = subprocess.run(
        words, cwd=tmp_path, env=user_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    # These are accelerate's own words: no line of ours runs before them.
    assert (
        "`distributed_type` must be specified in the config file"
        in done.stderr.strip().splitlines()[-1]
    )
    assert not list(tmp_path.iterdir())


def test_launch_flag_given_to_the_program_is_answered(tmp_path: Path) -> None:
    done = launch(
        "cpu.yaml", ["--config", "demo", "--config_file", "launch_configs/cpu.yaml"], tmp_path
    )
    assert (
        "it goes before -m: accelerate launch --config_file FILE"
        in done.stderr.strip().splitlines()[-1]
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("launch_config", ["one_gpu.yaml", "multi_gpu.yaml"])
def test_gpu_launch_config_without_a_gpu_is_refused(
    launch_config: str, settings: Settings, tmp_path: Path
) -> None:
    done = launch(launch_config, flags(settings()), tmp_path)
    assert done.returncode == 1
    assert "mixed_precision: bf16 is for a GPU and torch sees none" in done.stderr
    assert not Path(settings()["output_dir"]).exists()


def test_program_runs_without_a_launcher_as_one_process(settings: Settings, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "loop.train", *flags(settings(max_steps=2))]
    done = subprocess.run(
        words, cwd=tmp_path, env=user_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(step_lines(settings()["output_dir"])) == 2


def test_mistyped_flag_exits_with_two_and_writes_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "loop.train", "--config", "demo", "--learning_rte", "1"]
    done = subprocess.run(
        words, cwd=tmp_path, env=user_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1]
        == "error: learning_rte: unknown; did you mean learning_rate?"
    )
    assert not list(tmp_path.iterdir())
