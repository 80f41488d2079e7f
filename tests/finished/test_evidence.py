"""What a run has proven, read back from real runs; and each file changed by itself, which has to be
noticed."""

import json
import os
import re
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from loop.errors import CheckpointError, ConfigError
from loop.finished.evidence import read_evidence
from tests.conftest import flags
from tests.processes import run

pytestmark = pytest.mark.runs
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(bloom: Path, ragged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`done`, a run of 6 steps with checkpoints after 3 and 6; and `half`, one with another seed,
    stopped after 4."""
    folder = tmp_path_factory.mktemp("trained")
    knobs: dict[str, Any] = {
        "model_name_or_path": bloom, "dataset_name": ragged, "max_length": 128, "micro_batch_tokens": 256,
        "global_batch_size": 8, "max_steps": 6, "learning_rate": 0.03, "lora_r": 4, "eval_fraction": 0.2,
    }  # fmt: skip
    done = {
        "output_dir": folder / "done",
        "save_steps": 3,
        "eval_steps": 3,
        "lora_target_modules": "all-linear",
    }
    half = {"output_dir": folder / "half", "save_steps": 2, "stop_after_steps": 4, "seed": 7}
    modules = {"lora_target_modules": "query_key_value,dense"}
    run(flags({**knobs, **done}), folder / "log")
    run(flags({**knobs, **half, **modules}), folder / "log")
    return folder


@pytest.fixture
def done(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained / "done", tmp_path / "done")


@pytest.fixture
def half(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained / "half", tmp_path / "half")


def run_json_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_bytes()))


def adapter_in(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ADAPTER}


def change_run_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    run_json = run_json_of(folder)
    change(run_json)
    (folder / "run.json").write_text(json.dumps(run_json))


def change_line(path: Path, pattern: str, line: str) -> None:
    """Put `line` in the place of the one line that begins with `pattern`."""
    text, count = re.subn(rf"^{pattern}.*$", line, path.read_text(), flags=re.MULTILINE)
    assert count == 1
    path.write_text(text)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def refused(asked: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as error:
        read_evidence(asked)
    return str(error.value)


# What is read


def test_a_finished_run_is_read_with_everything_that_it_wrote(done: Path) -> None:
    evidence, run_json = read_evidence(done), run_json_of(done)
    assert evidence.folder == done
    assert evidence.step == 6
    assert evidence.head == run_json["result"]["ledger_head"]
    assert (evidence.run, evidence.run_json) == (run_json, (done / "run.json").read_bytes())
    assert evidence.adapter == adapter_in(done / "adapter")
    assert (
        sha256(evidence.adapter["adapter_model.safetensors"]).hexdigest()
        == run_json["result"]["adapter_sha256"]
    )
    assert evidence.ledger == (done / "ledger.jsonl").read_bytes()
    # 6 steps, and the held-out loss before the first, after the third and after the last
    assert [(entry["step"], "eval_loss" in entry) for entry in evidence.entries] == [
        (0, True), (0, False), (1, False), (2, False), (3, True), (3, False), (4, False), (5, False), (6, True),
    ]  # fmt: skip
    assert evidence.entries[-1]["hash"] == evidence.head


def test_the_evaluations_are_those_of_the_ledger_and_the_first_is_the_bases(done: Path) -> None:
    evaluations, result = read_evidence(done).evaluations, run_json_of(done)["result"]
    assert [updates for updates, _ in evaluations] == [0, 3, 6]
    assert (evaluations[0][1], evaluations[-1][1]) == (
        result["base_eval_loss"],
        result["eval_loss"],
    )
    assert evaluations[-1][1] < evaluations[0][1]


def test_the_config_is_the_runs_with_who_set_each_knob(done: Path) -> None:
    evidence = read_evidence(done)
    assert (evidence.config.lora_r, evidence.config.lora_alpha) == (4, 32)
    assert evidence.config.lora_target_modules == ("all-linear",)
    assert len(evidence.set_by) == len((done / "config.yaml").read_text().splitlines())
    names = ("lora_r", "lora_alpha", "dtype")
    assert [evidence.set_by[name] for name in names] == ["flag", "default", "found"]


@pytest.mark.parametrize("asked", ["adapter", "checkpoints/.."])
def test_a_run_is_found_by_its_adapter_too(done: Path, asked: str) -> None:
    assert read_evidence(done / asked).adapter == adapter_in(done / "adapter")


def test_a_checkpoint_is_read_by_name_with_the_ledger_up_to_its_step(done: Path) -> None:
    asked = done / "checkpoints" / "step-000003"
    evidence, manifest = read_evidence(asked), json.loads((asked / "manifest.json").read_bytes())
    assert evidence.folder == done
    assert evidence.step == 3
    assert evidence.adapter == adapter_in(asked)
    assert evidence.adapter != adapter_in(done / "adapter")
    assert (len(evidence.entries), evidence.head) == (
        manifest["ledger"]["lines"],
        manifest["ledger"]["head"],
    )
    assert [updates for updates, _ in evidence.evaluations] == [0, 3]
    lines = (done / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert evidence.ledger == b"".join(
        lines[:5]
    )  # the base's loss, three steps, the loss after them


def test_a_checkpoint_of_an_unfinished_run_is_read_by_name(half: Path) -> None:
    evidence = read_evidence(half / "checkpoints" / "step-000002")
    assert evidence.step == 2
    assert [updates for updates, _ in evidence.evaluations] == [0]
    assert [entry["step"] for entry in evidence.entries] == [0, 0, 1]
    assert evidence.adapter == adapter_in(half / "checkpoints" / "step-000002")


def test_what_is_read_is_the_same_from_the_runs_own_folder(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done)
    assert read_evidence(Path()).adapter == adapter_in(done / "adapter")
    assert read_evidence(Path("checkpoints/step-000003")).step == 3


def test_what_a_checkpoint_has_proven_holds_whatever_became_of_the_finished_adapter(
    done: Path,
) -> None:
    flip_a_byte(done / "adapter" / "adapter_model.safetensors")
    with (done / "ledger.jsonl").open("ab") as ledger:
        ledger.write(b'{"torn')
    assert read_evidence(done / "checkpoints" / "step-000003").step == 3


# What is no finished run


def test_an_unfinished_run_is_refused_with_its_newest_checkpoint_as_the_way_out(half: Path) -> None:
    said = refused(half, ConfigError)
    newest = half / "checkpoints" / "step-000004"
    assert said == f"{half}: not finished; train it to its end, or name a checkpoint: {newest}"
    assert read_evidence(newest).step == 4


def test_an_unfinished_run_without_checkpoints_is_refused(half: Path) -> None:
    shutil.rmtree(half / "checkpoints")
    said = refused(half, ConfigError)
    assert said == f"{half}: not finished; train it to its end, or it has no checkpoint either"


@pytest.mark.parametrize(
    "asked", [".", "checkpoints", "nowhere", "done/checkpoints", "done/checkpoints/step-3/adapter"]
)
def test_what_is_no_run_is_refused(done: Path, asked: str) -> None:
    folder = done.parent / asked
    said = refused(folder, ConfigError)
    assert said == f"{folder}: found no run there; expected RUN or RUN/checkpoints/step-N"


def test_a_checkpoint_that_is_not_there_is_refused_by_its_name(done: Path) -> None:
    asked = done / "checkpoints" / "step-000005"
    assert refused(asked) == f"{asked}: found no folder, expected a checkpoint"


# What does not belong together


@pytest.mark.parametrize("asked", ["", "checkpoints/step-000003"])
def test_a_changed_byte_of_the_adapter_is_refused_by_the_files_name(done: Path, asked: str) -> None:
    weights = (done / asked if asked else done / "adapter") / "adapter_model.safetensors"
    flip_a_byte(weights)
    assert refused(done / asked).startswith(f"{weights}: ")


def test_the_adapter_of_another_checkpoint_is_refused_with_both_sha256(done: Path) -> None:
    stated = run_json_of(done)["result"]["adapter_sha256"]
    content = (done / "checkpoints" / "step-000003" / "adapter_model.safetensors").read_bytes()
    weights = done / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(content)
    way = "its training command restores it"
    expected = f"found {sha256(content).hexdigest()}, run.json states sha256 {stated}; {way}"
    assert refused(done) == f"{weights}: {expected}"


@pytest.mark.parametrize("asked", ["", "checkpoints/step-000003"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_changed_line_of_the_ledger_is_refused_by_its_number(
    done: Path, asked: str, number: int
) -> None:
    lines = (done / "ledger.jsonl").read_text().splitlines(keepends=True)
    lines[number - 1] = re.sub(r'loss":(\d)', r'loss":1\1', lines[number - 1])
    (done / "ledger.jsonl").write_text("".join(lines))
    said = refused(done / asked)
    assert said == f"{done / 'ledger.jsonl'}: line {number} does not follow from the line before it"


@pytest.mark.parametrize("change", ["cut", "longer", "empty", "of another run"])
def test_a_ledger_that_does_not_end_where_the_run_did_is_refused(
    done: Path, half: Path, change: str
) -> None:
    ledger = done / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    other = (half / "ledger.jsonl").read_bytes()
    changed = {
        "cut": lines[:-1],
        "longer": [*lines, lines[-1]],
        "empty": [],
        "of another run": [other],
    }
    ledger.write_bytes(b"".join(changed[change]))
    assert refused(done).startswith(f"{ledger}: ")


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 43), ("learning_rate", 0.3), ("base_checksum", "00" * 32)]
)
def test_a_changed_identity_is_refused(done: Path, key: str, value: object) -> None:
    change_run_json(done, lambda run_json: run_json["identity"].update({key: value}))
    assert (
        refused(done)
        == f"{done / 'run.json'}: its identity does not have the sha256 that it states"
    )


def test_an_identity_changed_together_with_its_sha256_is_refused_by_the_ledger(done: Path) -> None:
    """A key that config.yaml does not hold, so that only the chain's beginning can tell."""
    identity = {**run_json_of(done)["identity"], "base_checksum": "00" * 32}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()
    stated = {"identity": identity, "identity_sha256": sha256(canonical).hexdigest()}
    change_run_json(done, lambda run_json: run_json.update(stated))
    assert (
        refused(done) == f"{done / 'ledger.jsonl'}: line 1 does not follow from the line before it"
    )


@pytest.mark.parametrize(
    ("knob", "value", "change"),
    [
        ("learning_rate", "0.01", "learning_rate was 0.03, is 0.01"),
        ("lora_r", "8", "lora_r was 4, is 8"),
        ("seed", "43", "seed was 42, is 43"),
        ("text_template", "'{text}!'", "text_template was None, is '{text}!'"),
        (
            "lora_target_modules",
            "[query_key_value]",
            (
                "lora_target_modules was ['dense', 'dense_4h_to_h', 'dense_h_to_4h',"
                " 'query_key_value'], is ['query_key_value']"
            ),
        ),
    ],
)
def test_a_knob_changed_in_the_config_is_refused_with_both_values(
    done: Path, knob: str, value: str, change: str
) -> None:
    change_line(done / "config.yaml", f"{knob}: ", f"{knob}: {value}")
    assert refused(done) == f"{done / 'config.yaml'}: changed since the run: {change}"


def test_target_modules_given_by_name_are_the_runs_in_any_order(half: Path) -> None:
    asked = half / "checkpoints" / "step-000004"
    change_line(
        half / "config.yaml",
        "lora_target_modules: ",
        "lora_target_modules: [query_key_value, dense]",
    )
    assert read_evidence(asked).config.lora_target_modules == ("dense", "query_key_value")
    change_line(
        half / "config.yaml", "lora_target_modules: ", "lora_target_modules: [query_key_value]"
    )
    assert (
        "lora_target_modules was ['dense', 'query_key_value'], is ['query_key_value']"
        in refused(asked)
    )


def test_a_knob_that_changes_no_number_may_differ(done: Path) -> None:
    change_line(done / "config.yaml", "save_steps: ", "save_steps: 99")
    change_line(done / "config.yaml", "output_dir: ", "output_dir: elsewhere")
    assert read_evidence(done).step == 6


@pytest.mark.parametrize(
    ("part", "keys", "said"),
    [
        ("base", ["tokenizer_sha256"], "base.tokenizer_sha256"),
        ("base", ["tokenizer_sha256", "commit"], "base.commit, base.tokenizer_sha256"),
        ("data", ["templates"], "data.templates"),
    ],
)
def test_a_run_of_an_older_version_is_refused_with_what_it_lacks(
    done: Path, part: str, keys: list[str], said: str
) -> None:
    for key in keys:
        change_run_json(done, lambda run_json, key=key: run_json[part].pop(key))
    assert (
        refused(done)
        == f"{done / 'run.json'}: has no {said}; an older version of the loop wrote it"
    )


@pytest.mark.parametrize("content", ["", "[1]", '{"identity":'])
def test_a_run_json_that_is_none_is_refused_by_its_name(done: Path, content: str) -> None:
    (done / "run.json").write_text(content)
    assert refused(done).startswith(f"{done / 'run.json'}: the file: ")


def test_a_checkpoint_of_another_run_is_refused(done: Path, half: Path) -> None:
    asked = done / "checkpoints" / "step-000002"
    shutil.copytree(half / "checkpoints" / "step-000002", asked)
    assert refused(asked) == f"{asked}: belongs to another run than {done / 'run.json'}"


# What is no plain file


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symlink", "hard link"])
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "ledger.jsonl"])
@pytest.mark.parametrize("asked", ["", "checkpoints/step-000003"])
def test_a_file_of_a_run_that_is_a_link_is_refused_by_its_name(
    done: Path, tmp_path: Path, asked: str, name: str, link: Callable[[Path, Path], None]
) -> None:
    (done / name).rename(tmp_path / "elsewhere")
    link(tmp_path / "elsewhere", done / name)
    assert re.fullmatch(rf"{done / name}: .*expected a regular file", refused(done / asked))


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symlink", "hard link"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_the_adapter_that_is_a_link_is_refused_by_its_name(
    done: Path, tmp_path: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    path = done / "adapter" / name
    path.rename(tmp_path / "elsewhere")
    link(tmp_path / "elsewhere", path)
    assert re.fullmatch(rf"{path}: .*expected a regular file", refused(done))


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "ledger.jsonl",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ],
)
def test_a_file_that_is_not_there_is_refused_by_its_name(done: Path, name: str) -> None:
    (done / name).unlink()
    assert refused(done) == f"{done / name}: No such file or directory; expected a regular file"


def test_a_name_that_links_to_a_checkpoint_is_refused(done: Path, half: Path) -> None:
    latest, other = done / "checkpoints" / "latest", done / "checkpoints" / "step-000002"
    latest.symlink_to("step-000003")
    other.symlink_to(half / "checkpoints" / "step-000002")
    for asked in (latest, other):
        assert refused(asked) == f"{asked}: found no folder, expected a checkpoint"


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symlink", "hard link"])
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
)
def test_a_file_of_a_checkpoint_that_is_a_link_is_refused_by_its_name(
    done: Path, tmp_path: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    asked = done / "checkpoints" / "step-000003"
    (asked / name).rename(tmp_path / "elsewhere")
    link(tmp_path / "elsewhere", asked / name)
    assert re.fullmatch(rf"{asked / name}: .*expected a regular file", refused(asked))
