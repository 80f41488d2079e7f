import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loop.state.checkpoint import Checkpoint
from loop.state.ledger import LedgerPosition
from loop.state.resume import inexact
from tests.conftest import flags
from tests.processes import start
from tests.state.test_checkpoint import rebuild_manifest

pytestmark = pytest.mark.runs
Again = Callable[..., tuple[int | None, str]]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def outcome(folder: Path) -> tuple[bytes, bytes, bytes]:
    """What two equal runs have equal: the ledger and the finished adapter."""
    return (
        (folder / "ledger.jsonl").read_bytes(),
        (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        (folder / "adapter" / "adapter_config.json").read_bytes(),
    )


def sessions(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "run.json").read_bytes())["sessions"]
    return found


@pytest.fixture(scope="module")
def knobs(bloom: Path, ragged: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": bloom, "dataset_name": ragged, "max_length": 128, "micro_batch_tokens": 256,
        "global_batch_size": 8, "max_steps": 6, "learning_rate": 0.01, "lora_r": 4, "lora_target_modules": "all-linear",
        "eval_fraction": 0.1, "eval_steps": 3, "save_steps": 2, "save_total_limit": 5,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(knobs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`straight`: six steps in one go, with checkpoints after 2, 4 and 6. `half`: the same command
    ended after 4."""
    folder = tmp_path_factory.mktemp("runs")
    both = [start(flags({**knobs, "output_dir": folder / "straight"}), folder / "straight.log")]
    both += [
        start(
            flags({**knobs, "output_dir": folder / "half", "stop_after_steps": 4}),
            folder / "half.log",
        )
    ]
    assert [launched.wait() for launched in both] == [[0], [0]], "".join(
        launched.text() for launched in both
    )
    return folder


@pytest.fixture
def straight(runs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(runs / "straight", tmp_path / "straight")


@pytest.fixture
def half(runs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(runs / "half", tmp_path / "half")


@pytest.fixture
def again(knobs: dict[str, Any], tmp_path: Path) -> Again:
    """The same command on a run's folder, with what a test wants different: exit code and
    output."""

    def of(
        folder: Path,
        num_processes: int = 1,
        environment: dict[str, str] | None = None,
        **changed: Any,
    ) -> tuple[int | None, str]:
        argv = flags({**knobs, "output_dir": folder, **changed})
        log = tmp_path / f"log-{len(list(tmp_path.glob('log-*')))}"
        launched = start(argv, log, num_processes, environment)
        codes = set(launched.wait())
        assert len(codes) == 1, launched.text()
        return codes.pop(), launched.text()

    return of


# The same command again


def test_the_same_command_on_a_finished_run_says_so_and_changes_no_byte(
    straight: Path, again: Again
) -> None:
    before = tree(straight)
    code, text = again(straight)
    assert (code, tree(straight)) == (0, before)
    assert "This run is finished: nothing was changed." in text
    assert "Traceback" not in text


def test_the_same_command_goes_on_and_ends_as_the_run_in_one_go(
    half: Path, runs: Path, again: Again
) -> None:
    code, text = again(half)
    assert code == 0, text
    assert "not bit-exact" not in text
    assert outcome(half) == outcome(runs / "straight")
    assert [session["first_step"] for session in sessions(half)] == [0, 4]


def test_a_run_resumed_at_every_step_ends_as_the_run_in_one_go(
    tmp_path: Path, runs: Path, again: Again
) -> None:
    for _ in range(6):
        code, text = again(tmp_path / "run", stop_after_steps=1)
        assert code == 0, text
    assert outcome(tmp_path / "run") == outcome(runs / "straight")
    assert [session["first_step"] for session in sessions(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    assert again(tmp_path / "run", stop_after_steps=1)[1].count("This run is finished") == 1


def test_a_run_that_ended_before_its_first_checkpoint_starts_over(
    half: Path, runs: Path, again: Again
) -> None:
    shutil.rmtree(half / "checkpoints")
    code, text = again(half)
    assert code == 0, text
    assert outcome(half) == outcome(runs / "straight")


# Another run


@pytest.mark.parametrize(
    ("knob", "value", "said"),
    [
        ("learning_rate", 0.02, "learning_rate was 0.01, is 0.02"),
        ("seed", 7, "seed was 42, is 7"),
        ("lora_r", 8, "lora_r was 4, is 8"),
        ("lora_alpha", 16, "lora_alpha was 32, is 16"),
        ("lora_dropout", 0.1, "lora_dropout was 0.0, is 0.1"),
        ("lora_target_modules", "query_key_value", "is ['query_key_value']"),
        ("use_rslora", True, "use_rslora was False, is True"),
        ("global_batch_size", 4, "global_batch_size was 8, is 4"),
        ("max_length", 64, "max_length was 128, is 64"),
        ("truncation", "drop", "truncation was 'truncate', is 'drop'"),
        ("max_steps", 7, "max_steps was 6, is 7"),
        ("num_train_epochs", 2, "num_train_epochs was 3.0, is 2.0"),
        ("eval_fraction", 0.2, "eval_fraction was 0.1, is 0.2"),
        ("eval_steps", 2, "eval_steps was 3, is 2"),
        ("lr_scheduler_type", "cosine", "lr_scheduler_type was 'linear', is 'cosine'"),
        ("warmup_steps", 2, "warmup_steps was 0.0, is 2.0"),
        ("weight_decay", 0.1, "weight_decay was 0.0, is 0.1"),
        ("max_grad_norm", 0.5, "max_grad_norm was 1.0, is 0.5"),
        ("dtype", "bfloat16", "base_dtypes was ['float32'], is ['bfloat16']"),
    ],
)  # fmt: skip
def test_another_value_of_what_makes_the_run_is_refused_with_both_values_and_the_ways_out(
    half: Path, again: Again, knob: str, value: Any, said: str
) -> None:
    before = tree(half)
    code, text = again(half, **{knob: value})
    assert (code, tree(half)) == (4, before), text
    assert said in text
    assert "another output_dir" in text
    assert "passed over" not in text
    assert "Traceback" not in text


def test_another_precision_of_the_launch_config_is_refused(half: Path, again: Again) -> None:
    before = tree(half)
    code, text = again(
        half, environment={"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    )
    assert (code, tree(half)) == (4, before), text
    assert "mixed_precision was 'no', is 'bf16'" in text


def test_one_changed_character_of_the_dataset_is_refused(
    half: Path, again: Again, ragged: Path, tmp_path: Path
) -> None:
    changed = tmp_path / ragged.name
    rows = ragged.read_text(encoding="utf-8")
    changed.write_text(rows.replace("the", "thé", 1), encoding="utf-8")
    before = tree(half)
    code, text = again(half, dataset_name=changed)
    assert (code, tree(half)) == (4, before), text
    was = json.loads((half / "run.json").read_bytes())["identity"]["data_fingerprint"]
    assert f"data_fingerprint was '{was}', is '" in text


def test_another_base_of_the_same_shape_is_refused(
    half: Path, again: Again, other_bloom: Path
) -> None:
    before = tree(half)
    code, text = again(half, model_name_or_path=other_bloom)
    assert (code, tree(half)) == (4, before), text
    was = json.loads((half / "run.json").read_bytes())["identity"]["base_checksum"]
    assert f"base_checksum was '{was}', is '" in text


def test_every_differing_value_is_told_at_once(half: Path, again: Again) -> None:
    code, text = again(half, seed=7, lora_r=8, learning_rate=0.02)
    assert code == 4
    assert all(
        said in text for said in ("seed was 42", "lora_r was 4", "learning_rate was 0.01")
    ), text


def test_a_newer_checkpoint_of_another_run_is_refused_and_not_passed_over(
    half: Path, again: Again, tmp_path: Path
) -> None:
    assert again(tmp_path / "other", seed=7, stop_after_steps=4)[0] == 0
    shutil.rmtree(half / "checkpoints" / "step-000004")
    shutil.copytree(
        tmp_path / "other" / "checkpoints" / "step-000004", half / "checkpoints" / "step-000004"
    )
    before = tree(half)
    code, text = again(half)
    assert (code, tree(half)) == (4, before), text
    assert "seed was 7, is 42" in text
    assert "step-000004 is of another run" in text


def test_a_finished_run_is_no_answer_to_another_config(straight: Path, again: Again) -> None:
    before = tree(straight)
    code, text = again(straight, learning_rate=0.02)
    assert (code, tree(straight)) == (4, before), text
    assert "learning_rate was 0.01, is 0.02" in text


# The same run in other words


def test_moved_and_renamed_files_with_equal_bytes_go_on_without_a_word(
    half: Path, runs: Path, again: Again, bloom: Path, ragged: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(bloom, tmp_path / "elsewhere" / "renamed")
    rows = shutil.copyfile(ragged, tmp_path / "elsewhere" / "rows.jsonl")
    code, text = again(half, model_name_or_path=base, dataset_name=rows)
    assert code == 0, text
    assert "bit-exact" not in text
    assert sessions(half)[-1]["not_bit_exact"] == []
    assert outcome(half) == outcome(runs / "straight")


@pytest.mark.parametrize(
    "changed",
    [
        {"save_steps": 1},
        {"logging_steps": 1},
        {"save_total_limit": 2},
        {"stop_after_steps": 2},
        {"sample_prompt": "I"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_changes_no_number_goes_on_without_a_word(
    half: Path, runs: Path, again: Again, changed: dict[str, Any]
) -> None:
    code, text = again(half, **changed)
    assert code == 0, text
    assert "bit-exact" not in text
    assert sessions(half)[-1]["not_bit_exact"] == []
    assert outcome(half) == outcome(runs / "straight")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"micro_batch_tokens": 512}, "micro_batch_tokens was 256, is 512"),
        ({"num_processes": 2}, "num_processes was 1, is 2"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing was False, is True"),
    ],
)
def test_what_moves_only_the_last_bits_goes_on_says_so_and_is_recorded(
    half: Path, runs: Path, again: Again, changed: dict[str, Any], said: str
) -> None:
    code, text = again(half, **changed)
    assert code == 0, text
    assert f"not bit-exact from step 4: {said}\n" in text
    assert [session["not_bit_exact"] for session in sessions(half)] == [[], [said]]
    ours, straight = (
        [json.loads(line) for line in outcome(run)[0].splitlines()]
        for run in (half, runs / "straight")
    )
    assert [line.get("rows") for line in ours] == [line.get("rows") for line in straight]
    for line, expected in zip(ours, straight):
        assert line.get("loss", 0) == pytest.approx(expected.get("loss", 0), rel=1e-4)


def test_another_version_of_a_library_goes_on_and_says_so(half: Path, again: Again) -> None:
    path = half / "checkpoints" / "step-000004" / "state.json"
    state = json.loads(path.read_bytes())
    version = state["environment"]["versions"]["peft"]
    state["environment"]["versions"]["peft"] = "0.0.1"
    path.write_text(json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=False))
    rebuild_manifest(path.parent)
    code, text = again(half)
    assert code == 0, text
    assert f"not bit-exact from step 4: versions.peft was '0.0.1', is '{version}'\n" in text


# Spoilt checkpoints


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["optimizer.safetensors", "manifest.json", "state.json"])
def test_a_torn_newest_checkpoint_is_passed_over_with_the_reason(
    half: Path, runs: Path, again: Again, name: str
) -> None:
    tear(half / "checkpoints" / "step-000004" / name)
    code, text = again(half)
    assert code == 0, text
    assert "passed over step-000004: " in text
    assert f"step-000004/{name}: " in text
    assert [session["first_step"] for session in sessions(half)] == [0, 2]
    assert outcome(half) == outcome(runs / "straight")


def test_a_finished_run_whose_last_checkpoint_is_torn_trains_its_last_steps_again(
    straight: Path, runs: Path, again: Again
) -> None:
    tear(straight / "checkpoints" / "step-000006" / "state.json")
    code, text = again(straight)
    assert code == 0, text
    assert "passed over step-000006: " in text
    assert outcome(straight) == outcome(runs / "straight")
    assert again(straight)[1].count("This run is finished") == 1


def test_a_run_of_which_every_checkpoint_is_torn_is_not_restarted(half: Path, again: Again) -> None:
    for step in ("step-000002", "step-000004"):
        tear(half / "checkpoints" / step / "adapter_model.safetensors")
    before = tree(half)
    code, text = again(half)
    assert (code, tree(half)) == (4, before), text
    assert "passed over step-000002: " in text
    assert "passed over step-000004: " in text
    assert text.endswith("no checkpoint is whole; restore one, or give another output_dir\n")


def test_an_adapter_without_a_checkpoint_is_not_trained_over(straight: Path, again: Again) -> None:
    shutil.rmtree(straight / "checkpoints")
    before = tree(straight)
    code, text = again(straight)
    assert (code, tree(straight)) == (4, before), text
    assert "holds a run already" in text


# The ledger


def edit_line(run: Path, number: int) -> None:
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].replace(b'loss":', b'loss":1')
    (run / "ledger.jsonl").write_bytes(b"".join(lines))


def test_an_edited_line_of_the_ledger_is_refused_with_its_number(half: Path, again: Again) -> None:
    edit_line(half, 2)
    before = tree(half)
    code, text = again(half)
    assert (code, tree(half)) == (4, before), text
    assert "ledger.jsonl: line 2 does not follow from the line before it" in text


def test_a_line_edited_behind_the_older_checkpoint_costs_only_the_newer(
    half: Path, runs: Path, again: Again
) -> None:
    edit_line(half, 5)  # the untouched base, step 0, step 1, then step 2 and the evaluation after 3
    code, text = again(half)
    assert code == 0, text
    assert "passed over step-000004: " in text
    assert "ledger.jsonl: line 5 does not follow" in text
    assert outcome(half) == outcome(runs / "straight")


def test_a_finished_run_with_an_edited_ledger_is_refused(straight: Path, again: Again) -> None:
    edit_line(straight, 1)
    before = tree(straight)
    code, text = again(straight)
    assert (code, tree(straight)) == (4, before), text


def test_a_lost_ledger_is_not_begun_anew(half: Path, again: Again) -> None:
    (half / "ledger.jsonl").unlink()
    code, text = again(half)
    assert (code, (half / "ledger.jsonl").exists()) == (4, False), text
    assert "0 whole lines, the checkpoint was written after" in text


# A checkpoint by its name


@pytest.mark.parametrize("asked", ["step-000002", "{run}/checkpoints/step-000002"])
def test_going_back_to_a_named_checkpoint_ends_with_the_same_bytes(
    straight: Path, runs: Path, again: Again, asked: str
) -> None:
    code, text = again(straight, resume_from_checkpoint=asked.format(run=straight))
    assert code == 0, text
    assert [session["first_step"] for session in sessions(straight)] == [0, 2]
    assert tree(straight / "checkpoints") == tree(runs / "straight" / "checkpoints")
    assert outcome(straight) == outcome(runs / "straight")


@pytest.mark.parametrize("asked", ["step-000003", "best", "step-000002.bak"])
def test_an_unknown_name_is_refused_with_those_there_are(
    half: Path, again: Again, asked: str
) -> None:
    before = tree(half)
    code, text = again(half, resume_from_checkpoint=asked)
    assert (code, tree(half)) == (4, before), text
    assert f"resume_from_checkpoint: {asked} is not in " in text
    assert "which holds step-000002, step-000004; write auto, none or a checkpoint\n" in text


def test_a_named_checkpoint_that_is_torn_is_refused_and_no_other_taken(
    half: Path, again: Again
) -> None:
    tear(half / "checkpoints" / "step-000004" / "state.json")
    before = tree(half)
    code, text = again(half, resume_from_checkpoint="step-000004")
    assert (code, tree(half)) == (4, before), text
    assert "step-000004/state.json: " in text


def test_none_is_refused_where_a_run_lies_and_starts_one_elsewhere(
    half: Path, runs: Path, again: Again, tmp_path: Path
) -> None:
    before = tree(half)
    code, text = again(half, resume_from_checkpoint="none")
    assert (code, tree(half)) == (4, before), text
    assert "holds a run already; give another output_dir" in text
    code, text = again(tmp_path / "new", resume_from_checkpoint="none")
    assert code == 0, text
    assert outcome(tmp_path / "new") == outcome(runs / "straight")


@pytest.mark.parametrize(
    ("device", "full_determinism", "exact"),
    [("cuda", False, False), ("cuda", True, True), ("cpu", False, True)],
)
def test_a_resume_on_a_gpu_is_announced_as_not_bit_exact_unless_full_determinism_makes_it_so(
    device: str, full_determinism: bool, exact: bool
) -> None:
    place = {"device": device}
    checkpoint = Checkpoint(1, {}, LedgerPosition(0, 0, ""), b"", {}, {}, place)
    said = ["a GPU's attention adds in no fixed order without full_determinism"]
    assert inexact(checkpoint, place, device, full_determinism) == ([] if exact else said)
