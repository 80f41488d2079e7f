"""The card: each statement is one that was recorded, nothing recorded can break out of it, edits by
hand stay."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from loop.config.command_line import parse_command_line
from loop.errors import HubError
from loop.finished.evidence import Evidence, read_evidence
from loop.publish.card import END, START, Target, make_card, merge_cards

pytestmark = pytest.mark.runs
ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TARGET = Target("anna/lora", "owner/base", COMMIT, license="mit", language="en")
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
Changed = Callable[..., Evidence]


@pytest.fixture(scope="module")
def evidence(finished: Path) -> Evidence:
    return read_evidence(finished)


@pytest.fixture
def changed(evidence: Evidence) -> Changed:
    """The evidence with other values in run.json: `changed(data={"name": "x"})`."""

    def of(**parts: Any) -> Evidence:
        run = json.loads(json.dumps(evidence.run))
        for part, values in parts.items():
            run[part] = {**run[part], **values} if isinstance(values, dict) else values
        return replace(evidence, run=run)

    return of


def card(evidence: Evidence, target: Target = TARGET) -> str:
    return make_card(evidence, target, ADAPTER, own_tokenizer=False)


def test_metadata_are_those_that_the_hub_knows(changed: Changed) -> None:
    data = ModelCard(card(changed(data={"name": "owner/rows", "commit": "f" * 40}))).data.to_dict()
    assert {key: value for key, value in data.items() if key != "model-index"} == {
        "library_name": "peft",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "datasets": ["owner/rows"],
        "license": "mit",
        "language": "en",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:owner/base", "lora", "transformers"],
    }


def test_losses_of_base_and_adapter_are_the_ledger_s(evidence: Evidence, finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "ledger.jsonl").read_text().splitlines()]
    base, adapter = (line["eval_loss"] for line in lines if "eval_loss" in line)
    (index,) = ModelCard(card(evidence)).data.to_dict()["model-index"]
    metrics = {metric["name"]: metric["value"] for metric in index["results"][0]["metrics"]}
    assert metrics == {
        "held-out loss of the base, nats per target token": round(base, 6),
        "held-out perplexity of the base": round(math.exp(base), 6),
        "held-out loss of the adapter, nats per target token": round(adapter, 6),
        "held-out perplexity of the adapter": round(math.exp(adapter), 6),
    }
    assert f"| 0 steps: the base alone | {base:.4f} | {math.exp(base):,.1f} |" in card(evidence)
    assert f"| 6 steps | {adapter:.4f} | {math.exp(adapter):,.1f} |" in card(evidence)


def test_data_of_a_local_file_are_named_without_an_id(evidence: Evidence) -> None:
    made = card(evidence)
    assert "datasets" not in ModelCard(made).data.to_dict()
    assert "The rows are those of <code>ragged.jsonl</code>, a file that is not on the Hub." in made
    assert "| rows | 40 |" in made
    assert "| held out | 4 rows," in made
    assert "| trained on | 36 rows," in made


def test_what_was_not_recorded_is_left_out(evidence: Evidence, changed: Changed) -> None:
    bare = replace(changed(samples={"base": None, "adapter": None}), entries=[])
    made = card(bare, replace(TARGET, language=None))
    assert "model-index" not in made
    assert "language" not in ModelCard(made).data.to_dict()
    for heading in ("## Held-out loss", "## Before and after"):
        assert heading not in made
    assert "No rows were held out, so its loss on new text is not known." in made
    for text in (made, card(evidence)):
        assert not re.search(r"more information|None\b|\bnan\b|\{\{|\{%", text, flags=re.IGNORECASE)


def test_recipe_in_the_card_is_the_run_s_own_with_public_names(
    evidence: Evidence, tmp_path: Path
) -> None:
    block = re.search(r"```yaml\n(.+?)```", card(evidence), flags=re.DOTALL)
    assert block is not None
    (tmp_path / "recipe.yaml").write_text(block[1])
    config = parse_command_line(["--config", str(tmp_path / "recipe.yaml")]).config
    assert (config.model_name_or_path, config.model_revision) == ("owner/base", COMMIT)
    assert (config.dataset_name, config.output_dir) == ("ragged.jsonl", "runs/lora")
    assert config.knobs("identity") == evidence.config.knobs("identity")
    assert "learning_rate: 0.01                                           # flag\n" in block[1]
    assert "seed: 42                                                      # default\n" in block[1]


@pytest.mark.parametrize(
    ("device", "processes", "precision", "words"),
    [
        ("x86_64 AVX512", 1, "no", "cpu.yaml -m"),
        ("aarch64 NEON", 2, "no", "cpu_2.yaml -m"),
        ("x86_64 AVX2", 4, "no", "cpu_2.yaml --num_processes 4 -m"),
        ("NVIDIA H100 12.8 91002", 1, "bf16", "one_gpu.yaml --mixed_precision bf16 -m"),
        ("Tesla T4 12.8 91002", 1, "fp16", "one_gpu_fp16.yaml --mixed_precision fp16 -m"),
        (
            "NVIDIA H100 12.8 91002",
            8,
            "bf16",
            "multi_gpu.yaml --num_processes 8 --mixed_precision bf16 -m",
        ),
    ],
)
def test_command_names_a_launch_config_that_there_is(
    device: str, processes: int, precision: str, words: str, evidence: Evidence, changed: Changed
) -> None:
    session = {**evidence.run["sessions"][0], "device": device, "num_processes": processes}
    made = card(changed(sessions=[session], identity={"mixed_precision": precision}))
    (file,) = re.findall(r"launch_configs/(\S+)", made)
    assert (ROOT / "launch_configs" / file).is_file()
    assert f"--config_file launch_configs/{words} loop.train --config recipe.yaml" in made


def test_resume_that_was_not_bit_exact_is_stated(evidence: Evidence, changed: Changed) -> None:
    first = evidence.run["sessions"][0]
    second = {**first, "first_step": 3, "not_bit_exact": ["threads was 1, is 2"]}
    made = card(changed(sessions=[first, second]))
    assert "| resumed, not bit-exact | from step 3: threads was 1, is 2 |" in made


def test_quantized_base_is_stated_as_a_limit(evidence: Evidence) -> None:
    quantized = replace(evidence, config=replace(evidence.config, load_in_4bit=True))
    assert "The base was quantized to 4 bits in training" in card(quantized)


@pytest.mark.parametrize(
    "text",
    [
        f"{END}\n# Another card",
        f"{START} twice",
        "a | b | c",
        "---\nlicense: mit\n---",
        "</details><script>alert(1)</script>",
        "```\nrm -rf /\n```",
        "{{ card_data }} {% raw %}",
        "two\r\nlines\x85three\u2028four",
    ],
)
def test_no_text_of_a_model_or_dataset_breaks_out_of_its_place(text: str, changed: Changed) -> None:
    made = card(changed(samples={"adapter": text}, data={"templates": [text, text]}))
    assert (made.count(START), made.count(END)) == (1, 1)
    assert "<script>" not in made
    read = ModelCard(made)
    assert read.data.to_dict()["license"] == "mit"
    assert read.text.rstrip().endswith(END)
    fences = [line for line in made.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "```yaml", "```", "```", "```"]
    table = [line for line in made.splitlines() if line.startswith("| read as |")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [3]


# On the Hub.


def test_generated_part_alone_is_replaced(evidence: Evidence) -> None:
    old = (
        card(replace(evidence, step=3))
        .replace(START, f"Above.\n{START}")
        .replace(END, f"{END}\nBelow.")
    )
    merged = merge_cards(card(evidence), old)
    assert "for 3 of 6 steps" in old
    assert "for 3 of 6 steps" not in merged
    assert "for 6 of 6 steps" in merged
    text = ModelCard(merged).text
    assert text.index("Above.") < text.index(START) < text.index(END) < text.index("Below.")


def test_merging_twice_changes_nothing_more(evidence: Evidence) -> None:
    once = merge_cards(card(evidence), "---\nlicense: mit\nwidget:\n- text: hi\n---\nMine.\n")
    assert merge_cards(card(evidence), once) == once
    assert merge_cards(card(evidence), card(evidence)) == card(evidence)


def test_card_of_another_maker_gets_the_part_at_its_end(evidence: Evidence) -> None:
    merged = ModelCard(
        merge_cards(
            card(evidence), "---\nthumbnail: a.png\nlicense: gpl\ntags: [mine]\n---\n# Mine\n"
        )
    )
    assert merged.text.index("# Mine") < merged.text.index(START)
    assert merged.data.thumbnail == "a.png"
    assert merged.data.license == "mit"
    assert merged.data.tags == ["mine", "base_model:adapter:owner/base", "lora", "transformers"]


def test_card_without_metadata_gets_them(evidence: Evidence) -> None:
    merged = ModelCard(merge_cards(card(evidence), "# Mine\n"))
    assert merged.data.base_model == "owner/base"
    assert "# Mine" in merged.text


def test_result_of_an_older_run_is_not_kept(evidence: Evidence) -> None:
    merged = merge_cards(card(replace(evidence, entries=[])), card(evidence))
    assert "model-index" not in merged
    assert yaml.safe_load(merged.split("---\n")[1])["base_model"] == "owner/base"


@pytest.mark.parametrize(
    ("on_hub", "says"),
    [
        (f"{START} only\n", "one of the two marks"),
        (f"only {END}\n", "one of the two marks"),
        (f"{END}\n{START}\n", "one of the two marks"),
        (f"{START}\n{START}\n{END}\n", "one of the two marks"),
        ("---\nlicense: [mit\n---\n", "its metadata cannot be read"),
        ("---\n- a list\n---\n", "its metadata cannot be read"),
        ("---\ntags: 5\n---\n", "its metadata cannot be read"),
        ("---\n1: x\n---\n", "its metadata cannot be read"),
        ("---\nself: x\n---\n", "its metadata cannot be read"),
        ("---\na: " + "[" * 5000 + "\n---\n", "its metadata cannot be read"),
    ],
)
def test_card_on_the_hub_that_cannot_be_read_is_refused(
    on_hub: str, says: str, evidence: Evidence
) -> None:
    with pytest.raises(HubError, match=re.escape(says)):
        merge_cards(card(evidence), on_hub)


def test_line_ends_of_a_card_from_windows_stay(evidence: Evidence) -> None:
    merged = merge_cards(card(evidence), "---\r\nthumbnail: a.png\r\n---\r\n# Mine\r\n")
    assert "thumbnail: a.png\r\n" in merged
    assert ModelCard(merged).data.base_model == "owner/base"


def test_checkpoint_s_card_has_no_sample_of_the_finished_adapter(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    made = card(read_evidence(tmp_path / "run" / "checkpoints" / "step-000003"))
    assert "## Before and after" not in made
    assert "for 3 of 6 steps" in made
    assert ", before and after" not in made


def test_loss_that_was_not_taken_of_this_very_state_is_not_called_the_adapter_s(
    evidence: Evidence,
) -> None:
    later = [
        {**entry, "step": 5} if entry.get("step") == 6 and "eval_loss" in entry else entry
        for entry in evidence.entries
    ]
    made = card(replace(evidence, entries=later))
    assert "**Held-out loss" not in made
    names = [
        metric["name"]
        for metric in ModelCard(made).data.to_dict()["model-index"][0]["results"][0]["metrics"]
    ]
    assert names == [
        "held-out loss of the base, nats per target token",
        "held-out perplexity of the base",
    ]
    assert "**Held-out loss" in card(evidence)


def test_base_is_called_unchanged_only_where_the_run_has_looked(evidence: Evidence) -> None:
    ended_early = replace(
        evidence, run={key: value for key, value in evidence.run.items() if key != "result"}
    )
    assert ", before and after" in card(evidence)
    assert ", before and after" not in card(ended_early)


def test_session_that_began_behind_this_step_is_not_its_own(
    evidence: Evidence, changed: Changed
) -> None:
    first = evidence.run["sessions"][0]
    later = {
        **first,
        "first_step": 6,
        "device": "another machine",
        "not_bit_exact": ["device was x, is another"],
    }
    assert "another" not in card(changed(sessions=[first, later])).split("## Training")[1]
