"""How a command starts: `--help` and a typo are answered before torch is imported."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loop.process.command import COMMANDS

ROOT = Path(__file__).parents[2]
WATCHED = """
import sys
from loop.process.command import start
name, sys.argv = sys.argv[1], sys.argv[1:]
try:
    start(name)
except SystemExit as end:
    heavy = {"torch", "numpy", "transformers", "peft", "datasets", "accelerate", "huggingface_hub"}
    print("HEAVY", sorted(heavy & {*sys.modules}))
    sys.exit(end.code)
"""
TYPOS = {
    "train": ["--lerning_rate", "1"],
    "generate": ["runs/x", "--temprature", "1"],
    "publish": ["runs/x", "--repo_id", "anna/lora", "--pubic"],
    "merge": ["runs/x", "--dtype", "float23", "--output", "y"],
}


def watched(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", WATCHED, name, *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_answered_before_anything_heavy_is_imported(name: str) -> None:
    done = watched(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: loop." + name)
    assert done.stdout.rstrip().endswith("HEAVY []")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_typo_is_answered_before_anything_heavy_is_imported(name: str) -> None:
    done = watched(name, *TYPOS[name])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stdout == "HEAVY []\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_by_module_by_console_script_and_by_its_file_says_the_same(name: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = dict(re.findall(r"(\S+) = (\S+)", setup["options.entry_points"]["console_scripts"]))
    module, _, attribute = scripts[f"loop-{name}"].partition(":")
    by_script = f"import sys; from {module} import {attribute} as run; sys.exit(run())"
    file = "loop/publish/__main__.py" if name == "publish" else f"loop/{name}.py"
    ways = (["-m", f"loop.{name}"], ["-c", by_script], [file])
    said = [
        subprocess.run(
            [sys.executable, *way, *TYPOS[name]], cwd=ROOT, capture_output=True, text=True
        )
        for way in ways
    ]
    assert [done.returncode for done in said] == [2, 2, 2]
    assert len({done.stderr for done in said}) == 1


def test_the_package_as_a_command_lists_each_command_with_a_line() -> None:
    done = subprocess.run([sys.executable, "-m", "loop"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for name in ("train", "generate", "publish", "merge"):
        assert f"python -m loop.{name} " in done.stdout
    assert "accelerate launch --config_file launch_configs/cpu_2.yaml" in done.stdout


def test_the_package_starts_a_command_by_its_name_and_names_those_there_are() -> None:
    words = [sys.executable, "-m", "loop"]
    started = subprocess.run(
        [*words, "train", "--lr", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert (started.returncode, started.stderr.splitlines()[0]) == (
        2,
        "error: lr: write learning_rate",
    )
    unknown = subprocess.run([*words, "eval"], cwd=ROOT, capture_output=True, text=True)
    last = "error: no command is named 'eval'; it is one of train, generate, publish, merge\n"
    assert (unknown.returncode, unknown.stderr) == (1, last)


def test_the_first_reading_knows_how_many_processes_the_launcher_started() -> None:
    words = [sys.executable, "-m", "loop.train", "--per_device_train_batch_size=4", "--seed=1"]
    place = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run(words, cwd=ROOT, env=place, capture_output=True, text=True)
    assert "4 x 1 x 2 processes = global_batch_size: 8" in done.stderr
