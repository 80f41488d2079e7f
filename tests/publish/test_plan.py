"""The plan, without any Hub: what is sent, what stays, and what speaks against it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loop.finished.evidence import Evidence, read_evidence
from loop.publish.card import Target
from loop.publish.plan import Plan, make_plan

pytestmark = pytest.mark.runs
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TARGET = Target("anna/lora", "owner/base", COMMIT, license="mit")
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.fixture
def evidence(trained: Path) -> Evidence:
    return read_evidence(trained)


def from_hub(evidence: Evidence) -> Evidence:
    """As if base and rows had come from the Hub."""
    adapter_config = json.loads(evidence.adapter["adapter_config.json"])
    named = {**adapter_config, "base_model_name_or_path": "owner/base", "revision": COMMIT}
    run = {**evidence.run, "base": {**evidence.run["base"], "name": "owner/base", "commit": COMMIT}}
    content = (json.dumps(named, indent=2, sort_keys=True) + "\n").encode()
    return replace(evidence, run=run, adapter={**evidence.adapter, "adapter_config.json": content})


def reasons(plan: Plan) -> list[str]:
    return [f"{error.exit_code}: {error}" for error in plan.blocked]


def test_plan_of_a_local_base_sends_the_tokenizer_that_was_used(
    evidence: Evidence, bloom: Path
) -> None:
    plan = make_plan(evidence, TARGET)
    assert reasons(plan) == []
    assert set(plan.files) == ADAPTER | {"tokenizer.json", "tokenizer_config.json"}
    assert plan.files["tokenizer.json"] == (bloom / "tokenizer.json").read_bytes()
    assert b'AutoTokenizer.from_pretrained("anna/lora")' in plan.files["README.md"]


def test_plan_of_a_base_from_the_hub_leaves_the_tokenizer_to_it(evidence: Evidence) -> None:
    plan = make_plan(from_hub(evidence), TARGET)
    assert reasons(plan) == []
    assert set(plan.files) == ADAPTER
    loads = f'AutoTokenizer.from_pretrained("owner/base", revision="{COMMIT}")'
    assert loads in plan.files["README.md"].decode()


def test_config_that_names_its_base_already_is_sent_byte_for_byte(evidence: Evidence) -> None:
    known = from_hub(evidence)
    assert (
        make_plan(known, TARGET).files["adapter_config.json"]
        == known.adapter["adapter_config.json"]
    )


def test_planning_twice_gives_the_same_bytes(evidence: Evidence) -> None:
    assert make_plan(evidence, TARGET) == make_plan(evidence, TARGET)


def test_tokenizer_that_was_changed_since_blocks(
    evidence: Evidence, trained: Path, bloom: Path
) -> None:
    shutil.copytree(bloom, trained.parent / "base")
    settings = trained.parent / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "<pad>"}))
    moved = replace(
        evidence, config=replace(evidence.config, model_name_or_path=str(trained.parent / "base"))
    )
    assert reasons(make_plan(moved, TARGET)) == [
        "2: the tokenizer in base is not the one that the run used; restore it"
    ]


def changed_base(evidence: Evidence, bloom: Path, folder: Path) -> Evidence:
    """As if the run had read its base from `folder`, a copy that may be changed."""
    shutil.copytree(bloom, folder)
    return replace(evidence, config=replace(evidence.config, model_name_or_path=str(folder)))


def test_other_files_of_the_base_s_folder_stay(
    evidence: Evidence, trained: Path, bloom: Path
) -> None:
    moved = changed_base(evidence, bloom, trained.parent / "base")
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "notes.txt"):
        (trained.parent / "base" / name).write_text("mine")
    assert set(make_plan(moved, TARGET).files) == ADAPTER | {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_path_in_the_tokenizer_s_settings_blocks(
    evidence: Evidence, trained: Path, bloom: Path
) -> None:
    moved = changed_base(evidence, bloom, trained.parent / "base")
    settings = trained.parent / "base" / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "made_from": "/home/anna/secret/rows"})
    )
    (reason,) = reasons(make_plan(moved, TARGET))
    assert "tokenizer_config.json:" in reason
    assert "absolute path, /hom****" in reason


@pytest.mark.parametrize("content", ["[]", "null", "{"])
def test_tokenizer_that_cannot_be_read_blocks(
    content: str, evidence: Evidence, trained: Path, bloom: Path
) -> None:
    moved = changed_base(evidence, bloom, trained.parent / "base")
    (trained.parent / "base" / "tokenizer_config.json").write_text(content)
    (reason,) = reasons(make_plan(moved, TARGET))
    assert reason.startswith("2: ")


def test_base_folder_that_is_gone_blocks(evidence: Evidence, trained: Path) -> None:
    moved = replace(
        evidence, config=replace(evidence.config, model_name_or_path=str(trained.parent / "gone"))
    )
    assert reasons(make_plan(moved, TARGET)) == [
        "2: the tokenizer: gone, the folder that the run read it from, is not there any more"
    ]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"base": "owner/other"},
            f"2: --base_model: found owner/other, the run was trained on owner/base at {COMMIT}",
        ),
        (
            {"base_commit": "f" * 40},
            f"2: --base_model: found owner/base, the run was trained on owner/base at {COMMIT}",
        ),
        ({"license": None}, "2: no licence is recorded: write --license ID"),
        (
            {"license": "MIT License"},
            "2: --license: found 'MIT License', expected an id such as apache-2.0",
        ),
        ({"language": "english"}, "2: --language: found 'english', expected a code such as en"),
        (
            {"repo_id": "lora"},
            "6: --repo_id: found 'lora', expected OWNER/NAME: the owner is missing",
        ),
    ],
)
def test_flag_that_does_not_fit_the_run_blocks(
    changed: dict[str, Any], says: str, evidence: Evidence
) -> None:
    (reason,) = reasons(make_plan(from_hub(evidence), replace(TARGET, **changed)))
    assert reason.startswith(says)


@pytest.mark.parametrize(
    ("base", "license", "says"),
    [
        ("bigscience/bloom-7b1", None, None),
        ("bigscience/bloomz-560m", "bigscience-bloom-rail-1.0", None),
        (
            "bigscience/bloom-7b1",
            "mit",
            "2: --license: found mit; bigscience/bloom-7b1 is under bigscience-bloom-rail",
        ),
        ("owner/bloom", None, "2: no licence is recorded"),
    ],
)
def test_licence_of_bloom_is_inherited_and_no_other_is_guessed(
    base: str, license: str | None, says: str | None, evidence: Evidence
) -> None:
    found = reasons(make_plan(evidence, replace(TARGET, base=base, license=license)))
    assert len(found) == (0 if says is None else 1)
    assert says is None or found[0].startswith(says)


def test_all_that_blocks_is_said_at_once(evidence: Evidence) -> None:
    found = reasons(
        make_plan(
            evidence, replace(TARGET, base="bloom0", base_commit=None, license=None, repo_id="x")
        )
    )
    assert [reason.split(":")[1].strip()[:14] for reason in found] == [
        "--repo_id",
        "the base is a ",
        "no licence is ",
    ]


def test_names_of_other_files_are_listed_and_links_not_followed(
    evidence: Evidence, trained: Path
) -> None:
    (trained / "elsewhere").symlink_to("/etc")
    (trained / "nötes.txt").write_text("mine")
    left = make_plan(evidence, TARGET).left_out
    assert left == [
        ".lock",
        "checkpoints/ (10 files)",
        "config.yaml",
        "elsewhere (a link)",
        "ledger.jsonl",
        "metrics.jsonl",
        "n\\xf6tes.txt",
        "run.json",
    ]


def test_base_whose_commit_is_not_known_yet_leaves_two_hashes_open(evidence: Evidence) -> None:
    lines = make_plan(evidence, replace(TARGET, base_commit=None)).lines()
    assert (
        "base      owner/base at main, whose commit is looked up before anything is sent" in lines
    )
    unknown = [line.split()[1] for line in lines if line.endswith("sha256 depends on that commit")]
    assert unknown == ["adapter_config.json:", "README.md:"]
