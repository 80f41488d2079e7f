"""The embedded default: a base that was really pretrained, quotes that it learns from, and a README
that is true."""

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import DEMO_MODEL, QUOTES
from tests.processes import run
from tests.test_train import ledger

pytestmark = pytest.mark.runs
ROOT = Path(__file__).parents[2]


def demo(folder: Path, *more: str) -> list[float]:
    run(["--config", "demo", "--output_dir", str(folder), *more], folder.with_suffix(".log"))
    return [line["eval_loss"] for line in ledger(folder) if "eval_loss" in line]


def python_block(document: str, words: str) -> str:
    """The one block of Python in a document that has these words."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (block,) = [block for block in blocks if words in block]
    return block


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    folder = tmp_path_factory.mktemp("demo")
    return {seed: demo(folder / str(seed), "--seed", str(seed)) for seed in (1, 2, 3)}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_held_out_loss_falls_by_more_than_four_tenths_of_a_nat(
    seed: int, trained: dict[int, list[float]]
) -> None:
    assert trained[seed][-1] < trained[seed][0] - 0.4


def test_pretrained_base_ends_far_below_a_random_one(
    trained: dict[int, list[float]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("random-base")
    model = AutoModelForCausalLM.from_config(
        AutoModelForCausalLM.from_pretrained(DEMO_MODEL).config
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    random_base = demo(tmp_path / "run", "--model_name_or_path", str(folder), "--seed", "1")
    assert random_base[0] == pytest.approx(math.log(3072), abs=0.2)
    assert trained[1][-1] < random_base[-1] - 0.5


def test_quotes_have_the_schema_of_english_quotes() -> None:
    rows = [json.loads(line) for line in QUOTES.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 400
    assert len({row["quote"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["quote", "author", "tags"]
        assert isinstance(row["quote"], str)
        assert isinstance(row["author"], str)
        assert row["tags"]
        assert all(isinstance(tag, str) for tag in row["tags"])


def test_base_is_a_small_bloom_in_safetensors() -> None:
    with safe_open(DEMO_MODEL / "model.safetensors", "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert 1_000_000 <= parameters <= 3_000_000
    assert json.loads((DEMO_MODEL / "config.json").read_text())["model_type"] == "bloom"
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) < 6_000_000
    assert not [path for path in DEMO_MODEL.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_tokenizer_keeps_pad_eos_and_bos_apart_and_any_text_whole() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3
    text = "“A quote’s café — 漢字, עברית, 🙂…”\n\tand a tab"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what the README's reader runs: PEFT's own
def test_readme_shows_this_programs_losses_and_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    losses = demo(tmp_path / "runs" / "demo")
    shown = [float(loss) for loss in re.findall(r"held-out loss (\d+\.\d{4})", readme)]
    assert shown == pytest.approx([losses[0], losses[-1]], abs=2e-3)
    (tmp_path / "loop").symlink_to(ROOT / "loop")
    monkeypatch.chdir(tmp_path)
    exec(python_block("README.md", "PeftModel"), {})
    assert capsys.readouterr().out.startswith("“A good tool")


def test_ten_lines_of_python_train_and_give_the_same_again(tmp_path: Path) -> None:
    code = python_block("loop/recipes/README.md", "import train")
    (tmp_path / "loop").symlink_to(ROOT / "loop")
    words = [sys.executable, "-W", "error::ResourceWarning", "-c", code]
    said = []
    for _ in range(2):
        done = subprocess.run(
            words, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=True
        )
        said.append(done.stdout.strip().splitlines()[-1])
    base, adapter, sha256 = said[0].split()
    assert float(base) == pytest.approx(6.2732, abs=2e-3)
    assert float(adapter) < 5
    assert (
        hashlib.sha256(
            (tmp_path / "runs/python/adapter/adapter_model.safetensors").read_bytes()
        ).hexdigest()
        == sha256
    )
    assert said[1] == said[0]
    assert "# python\n" in (tmp_path / "runs" / "python" / "config.yaml").read_text()


def test_importing_the_package_loads_and_changes_nothing() -> None:
    code = (
        "import os, signal, sys; before = dict(os.environ), signal.getsignal(signal.SIGINT), {*sys.modules};"
        "import loop; assert {*sys.modules} - before[2] == {'loop'};"
        "assert (dict(os.environ), signal.getsignal(signal.SIGINT)) == before[:2]"
    )
    fresh: dict[str, str] = {}  # not what the import of this very test has left
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=fresh, timeout=60, check=True)


def test_snippet_of_the_audit_map_gives_the_rows_of_a_process() -> None:
    code = python_block("loop/README.md", "import cut, draw")
    training = np.setdiff1d(np.arange(2508), np.random.RandomState(1).permutation(2508)[:125])
    names: dict[str, Any] = {
        "lengths": np.random.RandomState(0).randint(10, 500, 2383),
        "rows": training,
    }
    exec(code, names)
    whole = training[np.random.RandomState([42, 0]).permutation(2383)[37 * 32 : 38 * 32]]
    for part in ("process_1_of_2", "process_1_of_4"):
        rows = np.concatenate(names[part])
        assert 0 < len(rows) < 32
        assert set(rows) < set(whole)
