"""What is installed from a wheel is the whole package, and trains."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of this checkout holds, and nothing else of it."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "loop", source / "loop", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_a_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    expected = {
        path.relative_to(ROOT)
        for path in (ROOT / "loop").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    files = {
        path.relative_to(installed) for path in (installed / "loop").rglob("*") if path.is_file()
    }
    assert files == expected


def test_an_installed_wheel_trains_the_demo(installed: Path, tmp_path: Path) -> None:
    """On the demo's model, rows and recipe, all of which come out of the wheel."""
    words = [sys.executable, "-m", "loop.train", "--config", "demo", "--max_steps", "1"]
    words += ["--output_dir", "run"]
    place = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(words, cwd=tmp_path, env=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (session,) = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert session["source_commit"] is None  # no checkout: the code was the wheel's
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
