"""What a resume compares: the hash of the code that trains, and of no other."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import loop

PACKAGE = Path(loop.__file__).parent


def source_sha256(folder: Path) -> str:
    code = "from loop.process.environment import source_sha256; print(source_sha256())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("data/collate.py", True),
        ("train.py", True),
        ("process/memory.py", True),
        ("__init__.py", True),
        ("data/__init__.py", True),
        ("publish/card.py", False),
        ("generate.py", False),
        ("finished/evidence.py", False),
    ],
)
def test_a_comment_in_what_trains_changes_the_hash_and_one_in_a_command_does_not(
    tmp_path: Path, file: str, counts: bool
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "loop", ignore=shutil.ignore_patterns("model.safetensors"))
    before = source_sha256(tmp_path)
    with (tmp_path / "loop" / file).open("a") as edited:
        edited.write("# why\n")
    assert (source_sha256(tmp_path) != before) is counts
