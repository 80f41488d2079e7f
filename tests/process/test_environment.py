"""What a resume compares: the hash of the code that trains, and of no other."""

import shutil
from pathlib import Path

import pytest

import loop
from loop.process.environment import source_sha256

PACKAGE = Path(loop.__file__).parent


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, counts: bool
) -> None:
    copy = shutil.copytree(PACKAGE, tmp_path / "loop", ignore=shutil.ignore_patterns("demo"))
    monkeypatch.setattr("loop.process.environment._LOOP", copy)
    of_now = source_sha256.__wrapped__  # not the one that is kept for the process
    before = of_now()
    with (copy / file).open("a") as edited:
        edited.write("# why\n")
    assert (of_now() != before) is counts
