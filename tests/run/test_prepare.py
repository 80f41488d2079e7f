import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config, MistralConfig

from loop.config.knobs import Config
from loop.errors import EnvironmentFault
from loop.process.launch import make_accelerator
from loop.run.prepare import Run, prepare_run
from tests.conftest import VOCABULARY, flags
from tests.processes import run, start

pytestmark = pytest.mark.runs
Settings = Callable[..., dict[str, Any]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def downloaded(bloom: Path) -> str:
    """A Hub id whose branch `main` was downloaded before, as the Hub's client lays it out on
    disk."""
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
        f"not pinned: model_revision main is commit {COMMIT} today; write model_revision: {COMMIT}"
        " to repeat this run"
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
    launched = start(
        flags(settings(dtype="float16", model_name_or_path="nobody/nothing")), tmp_path / "log"
    )
    assert launched.wait() == [2], launched.text()
    words = (
        "error: dtype: float16 needs mixed_precision: fp16, as in"
        " launch_configs/one_gpu_fp16.yaml\n"
    )
    assert launched.text() == words


def test_held_out_rows_that_are_also_trained_on_are_reported(
    settings: Settings, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i % 10} of ten"}) + "\n" for i in range(40)))
    launched = run(
        flags(settings(dataset_name=str(rows), eval_fraction=0.25, max_steps=1)), tmp_path / "log"
    )
    assert "10 held-out rows also in train" in launched.text().splitlines()[0]


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The identity, and the lines of the ledger."""
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return json.loads((folder / "run.json").read_text())["identity"], lines


def test_padding_and_the_fused_loss_can_be_switched_off_and_the_training_is_the_same(
    settings: Settings, tmp_path: Path
) -> None:
    ways: dict[str, dict[str, Any]] = {
        "fast": {},
        "padded": {"padding_free": "false"},
        "chunks": {"fused_loss": "false"},
        "plain": {"padding_free": "false", "fused_loss": "false"},
    }
    found, said = {}, {}
    for name, changed in ways.items():
        used = settings(
            output_dir=str(tmp_path / name), eval_fraction=0.2, learning_rate=1e-3, **changed
        )
        said[name] = run(flags(used), tmp_path / f"{name}.log").text()
        found[name] = results(tmp_path / name)
    expected = found["plain"][1]
    for name, (identity, lines) in found.items():
        assert identity["padding_free"] is ("padding_free" not in ways[name])
        assert ("; padded rows, as asked" in said[name]) is not identity["padding_free"]
        assert ("; rows end to end, no padding; hidden states within" in said[name]) is identity[
            "padding_free"
        ]
        for line, reference in zip(lines, expected, strict=True):
            if "loss" in line:
                assert line["rows"] == reference["rows"]
                assert line["loss"] == pytest.approx(reference["loss"], abs=2e-5)
                assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3)
                assert (line["padded_tokens"] == line["tokens"]) is identity["padding_free"]
            else:
                assert line["eval_loss"] == pytest.approx(reference["eval_loss"], abs=2e-5)
    other = settings(
        output_dir=str(tmp_path / "fast"),
        eval_fraction=0.2,
        learning_rate=1e-3,
        padding_free="false",
    )
    refused = start(flags(other), tmp_path / "again.log")
    assert refused.wait() == [4], refused.text()
    assert "padding_free" in refused.text()


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
PADDED: dict[str, tuple[Callable[[], Any], str]] = {
    "a window narrower than a row": (
        lambda: MistralConfig(**SMALL, sliding_window=8),
        r"there is no other layout for this model and rows of this length",
    ),
    "a convolution over rows": (
        lambda: Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
        r"without padding its hidden states are \de[-+]\d\d off its own",
    ),
}


@pytest.mark.parametrize("why", PADDED)
def test_a_base_that_cannot_do_without_padding_is_trained_padded_and_the_run_says_so(
    settings: Settings, tokenizer_folder: Path, tmp_path: Path, why: str
) -> None:
    config, words = PADDED[why]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config())
    for parameter in base.parameters():
        parameter.data.mul_(3)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "base")
    used = settings(model_name_or_path=str(tmp_path / "base"), max_steps=2)
    launched = run(flags(used), tmp_path / "log")
    identity, lines = results(Path(used["output_dir"]))
    assert identity["padding_free"] is False
    assert lines[0]["padded_tokens"] > lines[0]["tokens"]
    assert re.search(f"; padded rows: {words}", launched.text()), launched.text()


# What a GPU asks of a run


@pytest.mark.parametrize("bits", [16, 4])
def test_memory_that_ends_while_loading_says_that_the_base_does_not_fit(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    def load_base(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("loop.run.prepare.load_base", load_base)
    used = config(load_in_4bit=bits == 4)
    with pytest.raises(EnvironmentFault, match=f"^out of memory: the base in {bits} bits does not"):
        prepare_run(used, make_accelerator(used))


def leave_casts_to_autocast(run: Run) -> Run:
    return _with_casts(run, [False])


def leave_casts_to_peft(run: Run) -> Run:
    return _with_casts(run, [True])


def _with_casts(run: Run, expected: list[bool]) -> Run:
    layers = [module for module in run.model.modules() if isinstance(module, LoraLayer)]
    assert sorted({layer.cast_input_dtype_enabled for layer in layers}) == expected
    return run


@pytest.mark.parametrize(
    ("precision", "check"), [("bf16", leave_casts_to_autocast), ("no", leave_casts_to_peft)]
)
def test_inputs_of_lora_are_left_to_autocast_where_there_is_one(
    settings: Settings, tmp_path: Path, precision: str, check: Callable[[Run], Run]
) -> None:
    cpu = {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_USE_CPU": "true"}
    launched = start(flags(settings(max_steps=1)), tmp_path / "log", environment=cpu, alter=check)
    assert launched.wait() == [0], launched.text()
    assert ("a second copy of every weight" in launched.text()) == (precision == "bf16")
