"""Base and adapter as one plain model, compared with what plain PEFT makes of them."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loop.merge import main
from loop.process.command import run_command
from tests.conftest import flags, published_settings
from tests.processes import run

pytestmark = pytest.mark.runs
TOKENS = torch.tensor([[5, 17, 100, 3, 250]])
Merge = Callable[..., tuple[int, str, str]]


@pytest.fixture
def merge(capfd: pytest.CaptureFixture[str]) -> Merge:
    """Exit code, stdout and stderr of the command."""

    def of(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_command(lambda: main([str(word) for word in words]))
        return code, *capfd.readouterr()

    return of


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TOKENS).logits
        return found


@pytest.mark.parametrize("which", ["", "checkpoints/step-000003"])
def test_merged_model_is_what_peft_computes_and_needs_no_peft(
    which: str, finished: Path, bloom: Path, merge: Merge, tmp_path: Path
) -> None:
    code, out, err = merge(finished / which, "--output", tmp_path / "merged")
    assert code == 0, err
    adapter = finished / (which or "adapter")
    plain = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bloom), adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (merged - plain).abs().max() < 1e-4
    assert (
        merged - logits(AutoModelForCausalLM.from_pretrained(bloom))
    ).abs().max() > 1e-2  # the adapter is in it
    printed = float(out.split("by at most ")[1].split(",")[0])
    assert 0 < printed < 1e-4
    assert "the likeliest token is the same at 32 of 32 places" in out
    text = "A good tool"
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")(text)["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(bloom)(text)["input_ids"]


def test_what_is_written_is_safetensors_in_the_dtype_asked_for_and_names_no_folder(
    finished: Path, merge: Merge, tmp_path: Path
) -> None:
    assert merge(finished, "--output", tmp_path / "merged", "--dtype", "bfloat16")[0] == 0
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files == expected
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any("lora" in name for name in tensors)
    for name in files - {"model.safetensors", "tokenizer.json"}:
        assert str(tmp_path.parent.parent) not in (tmp_path / "merged" / name).read_text()


def test_large_model_is_written_in_shards(
    finished: Path, bloom: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loop.merge.SHARD", "60KB")
    assert merge(finished, "--output", tmp_path / "merged")[0] == 0
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load_file(bloom / "model.safetensors"))


def test_adapter_of_a_quantized_run_is_merged_into_the_unquantized_base(
    bloom: Path, ragged: Path, merge: Merge, tmp_path: Path
) -> None:
    used = published_settings(bloom, ragged, tmp_path / "run", load_in_4bit=True, max_steps=2)
    run(flags(used), tmp_path / "log")
    assert merge(tmp_path / "run", "--output", tmp_path / "merged")[0] == 0
    merged, base = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(bloom / "model.safetensors"),
    )
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert moved == {
        f"transformer.h.{layer}.self_attention.query_key_value.weight" for layer in (0, 1)
    }


def test_base_s_own_generation_config_comes_along(
    finished: Path, merge: Merge, tmp_path: Path, bloom: Path
) -> None:
    merge(finished, "--output", tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    own = json.loads((bloom / "generation_config.json").read_text())
    assert written["eos_token_id"] == own["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["{finished}", "--output", "{finished}"], 2, "is there already; give a new folder"),
        (["{bloom}", "--output", "{new}"], 2, "found a model and no run; expected RUN"),
        (["{new}/no/run", "--output", "{new}"], 2, "found no such folder"),
        (["{finished}"], 2, "the following arguments are required: --output"),
        (["{finished}", "--output", "{new}", "--dtype", "int8"], 2, "invalid choice: 'int8'"),
        (["{finished}", "--output", "/proc/merged"], 5, "nothing was written"),
    ],
)
def test_first_mistakes_leave_nothing_behind(
    words: list[str],
    code: int,
    says: str,
    finished: Path,
    bloom: Path,
    merge: Merge,
    tmp_path: Path,
) -> None:
    places = {"finished": finished, "bloom": bloom, "new": tmp_path / "new"}
    found, _, err = merge(*(word.format(**places) for word in words))
    assert (found, list(tmp_path.iterdir())) == (code, [])
    assert says in err.rstrip().splitlines()[-1]


def test_full_disk_leaves_nothing_behind(finished: Path, merge: Merge, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        code, _, err = merge(finished, "--output", tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, list(tmp_path.iterdir())) == (5, [])
    assert err.rstrip().endswith("nothing was written")


def test_file_modes_follow_the_umask(finished: Path, merge: Merge, tmp_path: Path) -> None:
    merge(finished, "--output", tmp_path / "merged")
    assert len({path.stat().st_mode for path in (tmp_path / "merged").iterdir()}) == 1


def test_changed_adapter_is_not_merged(finished: Path, merge: Merge, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, _, err = merge(tmp_path / "run", "--output", tmp_path / "merged")
    assert (code, (tmp_path / "merged").exists()) == (4, False)
    assert "run.json states sha256" in err
