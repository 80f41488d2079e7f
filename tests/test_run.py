import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.constants import HF_HUB_CACHE

from tests.conftest import flags
from tests.processes import run, start

Settings = Callable[..., dict[str, Any]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def downloaded(bloom: Path) -> str:
    """A Hub id whose branch `main` was downloaded before, as the Hub's client lays it out on disk."""
    folder = Path(HF_HUB_CACHE) / "models--somebody--bloom"
    shutil.copytree(bloom, folder / "snapshots" / COMMIT, dirs_exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return "somebody/bloom"


def test_a_base_that_was_downloaded_trains_offline_and_its_commit_is_recorded(
    downloaded: str, settings: Settings, tmp_path: Path
) -> None:
    used = settings(model_name_or_path=downloaded, max_steps=1)
    launched = run(flags(used), tmp_path / "log")
    folder = Path(used["output_dir"])
    base = json.loads((folder / "run.json").read_text())["base"]
    assert (base["name"], base["commit"]) == ("somebody/bloom", COMMIT)
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("somebody/bloom", COMMIT)
    said = (
        f"not pinned: model_revision main is commit {COMMIT} today; write model_revision: {COMMIT} to repeat this run"
    )
    assert said in launched.text().splitlines()


def test_a_pinned_base_needs_no_notice(downloaded: str, settings: Settings, tmp_path: Path) -> None:
    used = settings(model_name_or_path=downloaded, model_revision=COMMIT, max_steps=1)
    assert "not pinned" not in run(flags(used), tmp_path / "log").text()


def test_a_base_of_a_folder_needs_no_notice(settings: Settings, tmp_path: Path) -> None:
    assert "not pinned" not in run(flags(settings(max_steps=1)), tmp_path / "log").text()


def test_a_base_in_float16_without_a_loss_scale_is_refused_before_anything_is_loaded(
    settings: Settings, tmp_path: Path
) -> None:
    launched = start(flags(settings(dtype="float16", model_name_or_path="nobody/nothing")), tmp_path / "log")
    assert launched.wait() == [2], launched.text()
    words = "error: dtype: float16 needs mixed_precision: fp16, as in launch_configs/one_gpu_fp16.yaml\n"
    assert launched.text() == words


def test_held_out_rows_that_are_also_trained_on_are_reported(settings: Settings, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i % 10} of ten"}) + "\n" for i in range(40)))
    launched = run(flags(settings(dataset_name=str(rows), eval_fraction=0.25, max_steps=1)), tmp_path / "log")
    assert "10 held-out rows also in train" in launched.text().splitlines()[0]
