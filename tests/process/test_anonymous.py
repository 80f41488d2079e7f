"""What training changes of the Hub's client is changed only while it trains."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from loop.process.anonymous import anonymous
from tests.loopback_hub import HUB_URL, Hub, serving

SWITCHES = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_TELEMETRY")
NOTEBOOK = """
import sys
from huggingface_hub import HfApi  # first, as in many a notebook
from loop.config.knobs import Config
from loop.train import train

HfApi().whoami()
train(Config(model_name_or_path="owner/base", dataset_name="owner/rows", max_length=128, micro_batch_tokens=256,
             global_batch_size=8, max_steps=1, lora_r=4, output_dir=sys.argv[1]))
HfApi().whoami()
"""


@pytest.mark.parametrize("before", [True, False])
def test_both_switches_are_on_within_and_as_they_were_behind_also_after_an_error(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SWITCHES:
        monkeypatch.setattr(constants, name, before)
    within: list[bool] = []

    @anonymous()
    def fail() -> None:
        within.extend(getattr(constants, name) for name in SWITCHES)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert within == [True, True]
    assert [getattr(constants, name) for name in SWITCHES] == [before, before]


def test_training_in_a_notebook_sends_no_token_and_leaves_the_users_own_calls_theirs(
    bloom: Path, ragged: Path, tmp_path: Path
) -> None:
    token = "hf_" + "writer" * 6
    hub = Hub()
    hub.users[token] = {"name": "anna", "role": "write"}
    hub.put_model("owner/base", bloom)
    hub.put_dataset("owner/rows", {"train.jsonl": ragged.read_bytes()})
    removed = {"HF_HUB_OFFLINE", *SWITCHES}
    place: dict[str, Any] = {
        name: value for name, value in os.environ.items() if name not in removed
    }
    place |= {"HF_TOKEN": token, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": HUB_URL}
    with serving(hub):
        words = [sys.executable, "-c", NOTEBOOK, str(tmp_path / "run")]
        done = subprocess.run(words, env=place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    with_token = [path for _, path, token in hub.requests if token is not None]
    assert with_token == ["/api/whoami-v2", "/api/whoami-v2"]
    assert hub.requests[-1][1] == "/api/whoami-v2"
    assert any("owner/base" in path for _, path, _ in hub.requests)
