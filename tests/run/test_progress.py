import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import loop
from loop.config.command_line import parse_command_line
from loop.config.knobs import Config
from loop.data.steps import Step
from loop.errors import CheckpointError
from loop.process.memory import peak_memory
from loop.run.progress import Record
from loop.state.ledger import LedgerPosition, perplexity
from loop.state.run_json import open_session, read_run_json
from tests.conftest import flags
from tests.processes import run

CPU = torch.device("cpu")
EMPTY = LedgerPosition(0, 0, "00")


def step(number: int) -> Step:
    return Step(number, epoch=0, rows=[3, 1], target_tokens=10, tokens=12, padded_tokens=14, num_micro_batches=2,
                micro_batches=[])  # fmt: skip


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(bloom: Path, ragged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps in two sessions, the second on two processes; its log lies
    beside it."""
    folder = tmp_path_factory.mktemp("record")
    knobs = {
        "model_name_or_path": bloom, "dataset_name": ragged, "output_dir": folder / "run", "max_steps": 3,
        "max_length": 64, "micro_batch_tokens": 256, "global_batch_size": 8, "lora_r": 2, "eval_fraction": 0.1,
        "logging_steps": 2, "save_steps": 1,
    }  # fmt: skip
    run(flags({**knobs, "stop_after_steps": 1}), folder / "first.log")
    run(flags(knobs), folder / "second.log", num_processes=2)
    return folder / "run"


# Ledger and metrics


def test_a_step_is_one_line_of_the_ledger_with_these_keys_and_one_of_the_metrics(
    tmp_path: Path,
) -> None:
    record = Record(tmp_path, EMPTY, first_step=0, num_steps=2, logging_steps=1)
    record.evaluation(0, 6.5, 99)
    record.step(step(0), loss=2.5, grad_norm=0.5, rate=1e-3, device=CPU)
    assert record.ledger.sync().lines == 2
    record.close()
    evaluation, line = [
        json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()
    ]
    chain = {"prev", "hash"}
    assert {key: evaluation[key] for key in evaluation.keys() - chain} == {
        "step": 0, "eval_loss": 6.5, "eval_target_tokens": 99,
    }  # fmt: skip
    assert list(line) == [
        "step", "epoch", "rows", "target_tokens", "tokens", "padded_tokens", "micro_batches", "loss", "grad_norm",
        "learning_rate", "prev", "hash",
    ]  # fmt: skip
    assert {key: line[key] for key in line.keys() - chain} == {
        "step": 0, "epoch": 0, "rows": [3, 1], "target_tokens": 10, "tokens": 12, "padded_tokens": 14,
        "micro_batches": 2, "loss": 2.5, "grad_norm": 0.5, "learning_rate": 0.001,
    }  # fmt: skip
    (metrics,) = metrics_of(tmp_path)
    assert list(metrics) == ["step", "seconds", "target_tokens_per_second", "peak_memory_bytes"]
    assert metrics["seconds"] > 0
    assert metrics["target_tokens_per_second"] == pytest.approx(10 / metrics["seconds"])


def test_nothing_volatile_is_in_the_ledger(finished: Path) -> None:
    words = {
        key
        for line in (finished / "ledger.jsonl").read_text().splitlines()
        for key in json.loads(line)
    }
    assert words == {
        "step", "epoch", "rows", "target_tokens", "tokens", "padded_tokens", "micro_batches", "loss", "grad_norm",
        "learning_rate", "eval_loss", "eval_target_tokens", "prev", "hash",
    }  # fmt: skip


@pytest.mark.parametrize(
    "torn",
    [
        "",
        '{"step": 4, "sec',
        "\x00\x00\x00",
        "garbage",
        "5",
        "[]",
        '{"step": null}',
        '{"second": 1}',
        "\n\n",
    ],
)
def test_metrics_are_cut_back_to_the_checkpoint_and_a_torn_last_line_is_dropped(
    tmp_path: Path, torn: str
) -> None:
    lines = [json.dumps({"step": number, "seconds": 0.5}) + "\n" for number in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + torn)
    record = Record(tmp_path, EMPTY, first_step=2, num_steps=4, logging_steps=1)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:2])
    record.step(step(2), loss=2.5, grad_norm=0.5, rate=1e-3, device=CPU)
    record.close()
    assert [metrics["step"] for metrics in metrics_of(tmp_path)] == [0, 1, 2]


def test_metrics_with_bytes_that_are_no_text_do_not_stop_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n\xff\xfe\x00')
    Record(tmp_path, EMPTY, first_step=1, num_steps=2, logging_steps=1).close()
    assert metrics_of(tmp_path) == [{"step": 0}]


def test_over_several_sessions_metrics_have_each_step_once(finished: Path) -> None:
    metrics = metrics_of(finished)
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert all(line["seconds"] > 0 and line["peak_memory_bytes"] > 50e6 for line in metrics)


def test_without_a_terminal_a_line_is_printed_every_logging_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path, EMPTY, first_step=0, num_steps=5, logging_steps=2)
    for number in range(5):
        record.step(step(number), loss=2.5 + number, grad_norm=0.5, rate=1e-3, device=CPU)
    record.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "2/5" in lines[0]
    assert "loss 3.5000" in lines[0]
    assert "4/5" in lines[1]
    assert "loss 5.5000" in lines[1]


def test_peak_memory_is_that_of_this_process_in_bytes() -> None:
    assert 50e6 < peak_memory(CPU) < 1e12  # torch alone is above 50 MB


@pytest.mark.parametrize(
    ("nats", "expected"), [(0.0, 1.0), (1.0, 2.718281828459045), (800.0, float("inf"))]
)
def test_perplexity_is_e_to_the_loss(nats: float, expected: float) -> None:
    assert perplexity(nats) == pytest.approx(expected)


# run.json


def test_run_json_has_a_session_for_each_start_with_all_that_moves_bits(finished: Path) -> None:
    sessions = json.loads((finished / "run.json").read_bytes())["sessions"]
    assert [session["num_processes"] for session in sessions] == [1, 2]
    assert [session["first_step"] for session in sessions] == [0, 1]
    assert [session["not_bit_exact"] for session in sessions] == [[], ["num_processes was 1, is 2"]]
    for session in sessions:
        assert session["threads"] == 1
        assert session["micro_batch_tokens"] == 256
        assert session["device"]
        for package in (
            "torch",
            "accelerate",
            "transformers",
            "peft",
            "datasets",
            "tokenizers",
            "safetensors",
            "numpy",
        ):
            assert session["versions"][package] == metadata.version(package)
        assert session["started"].endswith("Z")


def test_run_json_names_the_source_by_its_hash(finished: Path) -> None:
    code = "import loop.train, sys; print(*(m.__file__ for n, m in sys.modules.items() if n[:4] == 'loop'))"
    words = [sys.executable, "-c", code]
    loaded = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    folder, source = Path(loop.__file__).parent, hashlib.sha256()
    for path in sorted(map(Path, loaded)):
        source.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    sessions = json.loads((finished / "run.json").read_bytes())["sessions"]
    assert {session["source_sha256"] for session in sessions} == {source.hexdigest()}


def test_run_json_names_the_commit_where_there_is_a_checkout(finished: Path) -> None:
    folder = Path(loop.__file__).parent
    git = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    session, _ = json.loads((finished / "run.json").read_bytes())["sessions"]
    expected = {git.stdout.strip(), git.stdout.strip() + "+"} if git.returncode == 0 else {None}
    assert session["source_commit"] in expected


def test_run_json_says_what_was_trained_on_what_and_what_came_out(
    finished: Path, bloom: Path, ragged: Path
) -> None:
    text = (finished / "run.json").read_text()
    manifest = json.loads(text)
    spelling = json.dumps(
        manifest["identity"], sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert manifest["identity_sha256"] == hashlib.sha256(spelling.encode()).hexdigest()
    assert (manifest["base"]["name"], manifest["base"]["commit"]) == (bloom.name, None)
    assert manifest["data"]["templates"] == ["{text}"]
    assert (manifest["data"]["name"], manifest["data"]["counts"]["rows"]) == ("ragged.jsonl", 40)
    assert (manifest["num_steps"], manifest["identity"]["order_version"]) == (3, 1)
    assert manifest["census"]["trained_parameters"] == 512  # r 2 x (32 + 96) x two layers
    adapter = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    assert manifest["result"]["adapter_sha256"] == hashlib.sha256(adapter).hexdigest()
    last = json.loads((finished / "ledger.jsonl").read_text().splitlines()[-1])
    assert (manifest["result"]["ledger_head"], manifest["result"]["eval_loss"]) == (
        last["hash"],
        last["eval_loss"],
    )
    assert not any(str(place.parent) in text for place in (finished, bloom, ragged))


def test_run_json_names_the_tokenizer_by_its_rules_special_tokens_and_chat_template(
    finished: Path, bloom: Path
) -> None:
    rules = {
        **json.loads((bloom / "tokenizer.json").read_text()),
        "truncation": None,
        "padding": None,
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    spelling = json.dumps(
        [rules, named, None], sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    base = json.loads((finished / "run.json").read_bytes())["base"]
    assert base["tokenizer_sha256"] == hashlib.sha256(spelling.encode()).hexdigest()


def test_run_json_of_another_identity_gives_no_sessions_to_this_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    open_session(path, {"identity_sha256": "a"}, {"threads": 1}, 0, [])
    open_session(path, {"identity_sha256": "b"}, {"threads": 2}, 0, [])
    assert [session["threads"] for session in read_run_json(path)["sessions"]] == [2]
    open_session(path, {"identity_sha256": "b"}, {"threads": 3}, 5, ["threads was 2, is 3"])
    assert [session["first_step"] for session in read_run_json(path)["sessions"]] == [0, 5]
    assert read_run_json(path)["sessions"][1]["not_bit_exact"] == ["threads was 2, is 3"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"5", b"\xff"])
def test_a_torn_run_json_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.json: not the JSON that was written"):
        read_run_json(tmp_path / "run.json")


# config.yaml


def test_config_yaml_has_every_knob_as_used_and_who_set_it(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 9\nlora_r: 3\nsave_steps: 7\n")
    argv = ["--config", str(recipe), *flags(settings(max_steps=1))]
    run(argv, tmp_path / "log")
    text = (tmp_path / "run" / "config.yaml").read_text()
    values = yaml.safe_load(text)
    assert Config(**{**values, "dtype": None}) == parse_command_line(argv).config
    assert values["dtype"] == "float32"  # what the run found where nothing was asked for
    who = {line.split(":")[0]: line.rsplit("# ", 1)[1] for line in text.splitlines()}
    assert (values["max_steps"], who["max_steps"]) == (1, "flag")  # the flag wins over the file
    assert (values["lora_r"], who["lora_r"]) == (4, "flag")
    assert (values["save_steps"], who["save_steps"]) == (7, "file")
    assert (values["seed"], who["seed"]) == (42, "default")
    assert who.keys() == values.keys()
