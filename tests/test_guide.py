"""loop/GUIDE.md is true: its sums, code and tables; its names and links are in
test_documents.py."""

import hashlib
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loop import generate, guide_table
from loop.config.command_line import find_recipe, parse_command_line
from loop.config.knobs import FIELDS
from loop.data.examples import load_data
from loop.data.order import cut, draw
from loop.data.tokenizer import load_tokenizer
from tests.conftest import DEMO_MODEL
from tests.processes import run
from tests.test_train import ledger

ROOT = Path(__file__).parent.parent
LOOP = ROOT / "loop"
GUIDE = (LOOP / "GUIDE.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
PROSE, _, TABLE = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL).partition("<!-- keys: ")
WORDS = " ".join(PROSE.split())  # a sum may stand on two lines
SUMS = re.findall(
    r"(\(?\d[\d,.()]*(?: [x+/-] [\d(][\d,.()]*)+) = ([\d,.]*\d)(?: ([kMG]B|%))?", WORDS
)
UNITS = {"": 1, "%": 1e-2, "kB": 1e3, "MB": 1e6, "GB": 1e9}
(LINE,) = re.findall(r"```json\n(.*)\n```", GUIDE)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_guide_names_a_function_in_every_part_of_the_loop() -> None:
    named = {file for file, _ in re.findall(r"`([\w/]+\.py)::(\w+)`", PROSE)}
    files = (
        "data/examples data/collate data/order model/loss model/base update/optim train run/heldout"
        " run/finish"
    )
    files += " state/checkpoint state/resume state/ledger"
    assert {f"{name}.py" for name in files.split()} <= named


def test_every_recipe_and_command_exists() -> None:
    assert "`from loop.train import train`" in WORDS
    for recipe in re.findall(r"`(bloom-7b1[\w-]*-[\w-]+)`", GUIDE):
        assert find_recipe(recipe).is_file()
    for command in re.findall(r"python -m loop\.(\w+)", GUIDE):
        assert {*LOOP.glob(f"{command}.py"), *LOOP.glob(f"{command}/__main__.py")}, command


def test_every_knob_in_the_guide_is_one() -> None:
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)(?:: \w+)?`", PROSE))
    assert len(named & {*FIELDS}) >= 8
    assert named - {*FIELDS, *json.loads(LINE)} == {"query_key_value"}  # a module of BLOOM


@pytest.mark.parametrize(("left", "right", "unit"), SUMS)
def test_a_sum_in_the_guide_is_right(left: str, right: str, unit: str) -> None:
    left = (
        left.removeprefix("(") if left.count("(") > left.count(")") else left
    )  # opened before the sum
    value = eval(left.replace(",", "").replace("x", "*")) / UNITS[unit]
    decimals = len(right.partition(".")[2])
    assert f"{value:,.{decimals}f}" == right


def test_the_guide_does_its_arithmetic() -> None:
    assert len(SUMS) >= 30
    assert (
        WORDS.count(" = ") == len(SUMS) + 9
    )  # two formulas, four values that are given, and the three below
    for shown, value in re.findall(r"exp\((\d\.\d+)\) = (\d+\.\d)", WORDS):
        assert f"{math.exp(float(shown)):.1f}" == value
    assert WORDS.count("exp(") == 2
    assert f"{math.log(3072):.2f}" == "8.03"
    assert "ln(3,072) = 8.03" in WORDS
    assert "p = 1/3,072 costs 8.03" in WORDS


def test_parameters_of_the_guide_are_those_of_the_demo() -> None:
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    linear = {
        tuple(p.shape) for name, p in base.named_parameters() if "h.0." in name and p.ndim == 2
    }
    numbers = 4 * sum(rows + columns for rows, columns in linear)
    assert base.num_parameters() == number("2,370,048")
    rows = re.findall(r"^\| r=(\d+), (.+?) \| ([\d,]+) \| 1e-2 \|", PROSE, flags=re.MULTILINE)
    assert len(rows) == 5
    for r, modules, trained in rows:
        expected = 4 * (192 + 3 * 192) if modules.startswith("`query_key_value`") else numbers
        assert number(trained) == int(r) * expected
    assert 2_370_048 + 16 * numbers == number("2,566,656")


def test_measured_losses_are_those_of_the_readmes() -> None:
    readme, of_demo = (
        (folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, LOOP / "demo")
    )
    start = "| seed | pretrained base |"
    (ours,), (theirs,) = (
        [part.split("\n\n")[0] for part in text.split(start)[1:]] for text in (GUIDE, of_demo)
    )
    assert ours == theirs
    for shown in ("6.2732", "4.0771", "3.3330", "2b4d526b3b89", "not one byte has changed"):
        assert shown in WORDS
        assert shown in readme


def test_targets_of_the_micro_batches_are_those_of_the_demo() -> None:
    config = parse_command_line(["--config", "demo"]).config
    data = load_data(config, load_tokenizer(config))

    def targets(step: int, padding_free: bool) -> list[int]:
        _, drawn = draw(step, len(data.train), 60 * 32, 32, config.seed)
        pieces = cut(data.train.lengths[drawn], 1024, 1, padding_free)
        return [int(data.train.num_targets[drawn][piece].sum()) for piece in pieces]

    assert targets(0, True) == [780, 728]
    assert targets(35, False) == [773, 631, 240]
    assert "780 + 728" in WORDS
    assert "Without `padding_free` step 35 is cut into parts of 773, 631 and 240" in WORDS


def test_the_ledger_line_of_the_guide_is_chained_as_it_says() -> None:
    entry = json.loads(LINE)
    body = LINE[: LINE.index(',"hash":')] + "}"
    assert hashlib.sha256(body.encode()).hexdigest() == entry["hash"]
    rows = dict(
        re.findall(
            r"^\| (`\w+`(?:, `\w+`)?) \| (\S[^|]*) \|", PROSE.split("## 7.")[1], flags=re.MULTILINE
        )
    )
    named = {
        name: value
        for keys, values in rows.items()
        for name, value in zip(keys.split(", "), values.split(", "))
    }
    assert [name.strip("`") for name in named] == list(entry)
    assert named.pop("`rows`") == f"{len(entry['rows'])} numbers"
    for name, value in named.items():
        actual = entry[name.strip("`")]
        if isinstance(actual, str):
            assert actual.startswith(value.removesuffix("..."))
        else:
            assert float(value) == pytest.approx(actual, abs=5e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with loop/ and, after one step of the demo, runs/demo, its checkpoint in the
    adapter's place."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "loop").symlink_to(LOOP)
    demo = folder / "runs" / "demo"
    run(["--config", "demo", "--output_dir", str(demo), "--stop_after_steps", "1"], folder / "log")
    (demo / "adapter").symlink_to(demo / "checkpoints" / "step-000001")
    return folder


@pytest.mark.runs
def test_step_0_of_the_demo_is_the_line_in_the_guide(folder: Path) -> None:
    before, entry = ledger(folder / "runs" / "demo")
    shown = json.loads(LINE)
    assert before["eval_loss"] == pytest.approx(6.2732, abs=2e-3)
    for name in ("loss", "grad_norm"):  # their last digits are the processor's
        assert entry.pop(name) == pytest.approx(shown.pop(name), rel=1e-3)
    for name in ("prev", "hash"):  # of the version that printed them
        assert len(entry.pop(name)) == len(shown.pop(name)) == 64
    assert entry == shown


@pytest.mark.runs
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what the guide's reader runs: PEFT's own
def test_the_code_of_the_guide_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in CODE[:-1]:
        exec(block, names)
    inputs = names["tokenizer"]("“A good tool", return_tensors="pt")
    with torch.no_grad():
        adapted = names["model"](**inputs).logits
        plain = AutoModelForCausalLM.from_pretrained("loop/demo/model", dtype="float32")(
            **inputs
        ).logits
        exec(CODE[-1], names)
        merged = AutoModelForCausalLM.from_pretrained("runs/demo/merged")(**inputs).logits
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    with_peft, with_pipeline = capsys.readouterr().out.splitlines()
    assert with_peft.startswith("“A good tool")
    assert with_peft == with_pipeline


@pytest.mark.runs
def test_the_command_of_the_guide_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (command,) = re.findall(r"`python -m loop\.generate ([^`]+)`", GUIDE)
    generate.main(shlex.split(command))
    assert capsys.readouterr().out.startswith("“A good tool")


def test_the_table_of_keys_is_what_the_command_prints() -> None:
    command, _, rest = TABLE.partition(" -->\n")
    assert command == "python -m loop.guide_table"
    shown = rest.partition("\n<!-- end of keys -->")[0]
    assert shown == guide_table.table(), (
        "put the output of python -m loop.guide_table between the two comments of GUIDE.md"
    )


def test_the_table_of_keys_has_every_answer_and_no_unknown_key() -> None:
    keys = re.findall(r"`(\w+)`", TABLE.partition("-->")[2])
    assert len(keys) == len(set(keys))
    assert {*FIELDS} & {*guide_table.TRL} <= {*keys}
    assert "unknown" not in TABLE
