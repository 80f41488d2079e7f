"""Text from a run, a checkpoint and a plain model, compared with what plain PEFT and transformers
write."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from loop.finished.named_model import find_named_model, load_model
from loop.generate import main
from loop.process.command import run_command
from tests.conftest import bloom_config, flags
from tests.processes import run

pytestmark = pytest.mark.runs
Settings = Callable[..., dict[str, Any]]
PROMPT = "“A good friend"


@pytest.fixture
def trained(settings: Settings, tmp_path: Path) -> Path:
    """A finished run of 6 steps with checkpoints after 3 and 6."""
    run(flags(settings(save_steps=3, learning_rate=0.03)), tmp_path / "log")
    return tmp_path / "run"


@pytest.fixture
def unfinished(settings: Settings, tmp_path: Path) -> Path:
    """A run of 6 steps that was stopped after 4, with checkpoints after 2 and 4."""
    run(flags(settings(save_steps=2, stop_after_steps=4, learning_rate=0.03)), tmp_path / "log")
    return tmp_path / "run"


@pytest.fixture
def generate(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of the command, without the seconds that a new process
    imports."""

    def of(*argv: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_command(lambda: main([str(word) for word in argv]))
        return code, *capfd.readouterr()

    return of


Generate = Callable[..., tuple[int, str, str]]


def plain_tokens(
    model: Path, adapter: Path | None = None, prompt: str = PROMPT, **how: Any
) -> list[int]:
    """The prompt and 12 more tokens by what a user would write in Python; greedy unless `how` says
    otherwise."""
    network = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if adapter is not None:
        network = PeftModel.from_pretrained(network, adapter)
    how = {"max_new_tokens": 12, "do_sample": False, **how}
    return list(network.generate(**tokenizer(prompt, return_tensors="pt"), **how)[0].tolist())


def plainly(model: Path, adapter: Path | None = None, prompt: str = PROMPT, **how: Any) -> str:
    tokens = plain_tokens(model, adapter, prompt, **how)
    return str(AutoTokenizer.from_pretrained(model).decode(tokens, skip_special_tokens=True))


def changed_copy(model: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """The model with another tokenizer."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def as_stdin(text: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(text))


def process(*argv: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "loop.generate", *argv]
    root = Path(__file__).parent.parent
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(words, cwd=root, env=environment, text=True, **pipes)


def test_text_of_a_run_is_that_of_plain_peft_and_transformers(
    generate: Generate, trained: Path, bloom: Path
) -> None:
    expected = plainly(bloom, trained / "adapter")
    assert generate(trained, "--prompt", PROMPT, "--max_new_tokens", 12) == (0, expected + "\n", "")
    assert generate(trained / "adapter", "--prompt", PROMPT, "--max-new-tokens=12") == (
        0,
        expected + "\n",
        "",
    )


def test_base_is_what_the_run_started_from(generate: Generate, trained: Path, bloom: Path) -> None:
    expected = plainly(bloom)
    assert expected != plainly(bloom, trained / "adapter")
    assert generate(trained, "--base", "--prompt", PROMPT, "--max_new_tokens", 12) == (
        0,
        expected + "\n",
        "",
    )
    assert generate(bloom, "--prompt", PROMPT, "--max_new_tokens", 12) == (0, expected + "\n", "")


def test_checkpoint_is_generated_from_as_it_was(
    generate: Generate, trained: Path, bloom: Path
) -> None:
    checkpoint = trained / "checkpoints" / "step-000003"
    expected = plainly(bloom, checkpoint)
    assert expected != plainly(bloom, trained / "adapter")
    assert generate(checkpoint, "--prompt", PROMPT, "--max_new_tokens", 12) == (
        0,
        expected + "\n",
        "",
    )


def test_json_line_says_what_was_used(generate: Generate, trained: Path, bloom: Path) -> None:
    code, out, err = generate(
        trained, "--json", "--prompt", PROMPT, "--max_new_tokens", 12, "--seed", 7
    )
    assert (code, out.count("\n"), err) == (0, 1, "")
    weights = (trained / "adapter" / "adapter_model.safetensors").read_bytes()
    expected = {
        "prompt": PROMPT,
        "completion": plainly(bloom, trained / "adapter").removeprefix(PROMPT),
        "completion_tokens": 12,
        "model": str(bloom),
        "adapter": str(trained / "adapter"),
        "adapter_sha256": sha256(weights).hexdigest(),
        "seed": 7,
        "temperature": 0.0,
        "max_new_tokens": 12,
        "stopped": "length",
    }
    assert json.loads(out) == expected
    of_base = json.loads(generate(trained, "--base", "--json", "--prompt", PROMPT)[1])
    assert (of_base["adapter"], of_base["adapter_sha256"], of_base["completion_tokens"]) == (
        None,
        None,
        40,
    )


def test_json_line_of_a_checkpoint_has_the_sha256_of_its_file(
    generate: Generate, trained: Path
) -> None:
    checkpoint = trained / "checkpoints" / "step-000003"
    answer = json.loads(generate(checkpoint, "--json", "--prompt", PROMPT)[1])
    weights = (checkpoint / "adapter_model.safetensors").read_bytes()
    assert (answer["adapter"], answer["adapter_sha256"]) == (
        str(checkpoint),
        sha256(weights).hexdigest(),
    )


def test_above_temperature_zero_the_seed_draws_from_all_tokens(
    generate: Generate, bloom: Path
) -> None:
    how = ("--prompt", PROMPT, "--max_new_tokens", 12, "--temperature", 3)
    torch.manual_seed(7)
    expected = plainly(bloom, do_sample=True, temperature=3.0, top_k=0)
    torch.manual_seed(7)
    assert expected != plainly(bloom, do_sample=True, temperature=3.0, top_k=50)
    assert generate(bloom, *how, "--seed", 7)[1] == expected + "\n"
    assert generate(bloom, *how, "--seed", 7)[1] == expected + "\n"
    assert generate(bloom, *how, "--seed", 8)[1] != expected + "\n"


def test_answer_does_not_depend_on_the_prompts_before_it(
    generate: Generate, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", as_stdin(b"Love\nNight\nLove\n"))
    code, out, err = generate(bloom, "--json", "--temperature", 1)
    answers = [json.loads(line) for line in out.splitlines()]
    alone = json.loads(generate(bloom, "--json", "--temperature", 1, "--prompt", "Night")[1])
    assert (code, err, [answer["prompt"] for answer in answers]) == (
        0,
        "",
        ["Love", "Night", "Love"],
    )
    assert answers[1] == alone
    assert answers[0] == answers[2]


def test_empty_line_ends_the_prompts_and_a_terminal_is_shown_a_mark(
    bloom: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stdin, stderr = as_stdin("Love\r\nŁódź\n\nnever read\n".encode()), io.StringIO()
    for stream in (stdin, stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "stderr", stderr)
    main([str(bloom), "--json"])
    assert [json.loads(line)["prompt"] for line in capfd.readouterr().out.splitlines()] == [
        "Love",
        "Łódź",
    ]
    assert stderr.getvalue() == "> > > "


def test_text_stops_at_the_end_of_text(generate: Generate, llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    made = plain_tokens(llama)[len(tokenizer(PROMPT)["input_ids"]) :]
    assert made.index(made[2]) == 2
    third = tokenizer.convert_ids_to_tokens(made[2])
    ended = changed_copy(
        llama, tmp_path / "ended", lambda tokenizer: setattr(tokenizer, "eos_token", third)
    )
    answer = json.loads(generate(ended, "--json", "--prompt", PROMPT)[1])
    assert (answer["stopped"], answer["completion_tokens"]) == ("end_of_text", 3)
    assert answer["completion"] == tokenizer.decode(made[:2])


def test_prompt_goes_on_where_the_tokenizer_ends_every_text(
    generate: Generate, bloom: Path, tmp_path: Path
) -> None:
    def end_every_text(tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])

    ending = changed_copy(bloom, tmp_path / "ending", end_every_text)
    assert AutoTokenizer.from_pretrained(ending)(PROMPT)["input_ids"][-1] == 2
    assert generate(ending, "--prompt", PROMPT, "--max_new_tokens", 12) == (
        0,
        plainly(bloom) + "\n",
        "",
    )
    assert generate(ending, "--prompt", "")[0] == 2


def test_models_own_generation_defaults_do_not_leak_in(
    generate: Generate, llama: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(llama, tmp_path / "own")
    path = own / "generation_config.json"
    leaks = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.5,
        "repetition_penalty": 5.0,
        "min_new_tokens": 3,
    }
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), **leaks, "bad_words_ids": [[40]], "max_length": 4}
        )
    )
    assert plainly(own) != plainly(llama)
    assert generate(own, "--prompt", PROMPT, "--max_new_tokens", 12) == (
        0,
        plainly(llama) + "\n",
        "",
    )


def test_unfinished_run_is_its_newest_checkpoint_and_says_so(
    generate: Generate, unfinished: Path, bloom: Path
) -> None:
    newest = unfinished / "checkpoints" / "step-000004"
    notice = f"{unfinished}: not finished; this is its newest checkpoint, step-000004\n"
    expected = plainly(bloom, newest)
    assert generate(unfinished, "--prompt", PROMPT, "--max_new_tokens", 12) == (
        0,
        expected + "\n",
        notice,
    )


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_tampered_checkpoint_is_refused(generate: Generate, unfinished: Path, file: str) -> None:
    path = unfinished / "checkpoints" / "step-000004" / file
    path.write_bytes(path.read_bytes()[:-2] + b"!\n")
    for source in (unfinished, path.parent):
        code, out, err = generate(source, "--prompt", PROMPT)
        assert (code, out) == (4, "")
        assert f"{path}: sha256" in err.splitlines()[-1]
    path.unlink()
    code, out, err = generate(path.parent, "--prompt", PROMPT)
    assert (code, out, err) == (4, "", f"error: {path.parent}: missing or unexpected: {file}\n")


def test_tampered_adapter_is_refused_with_both_hashes(generate: Generate, trained: Path) -> None:
    path = trained / "adapter" / "adapter_model.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    found, stated = sha256(path.read_bytes()).hexdigest(), sha256(original).hexdigest()
    words = f"run.json states sha256 {stated}; its training command restores it"
    assert generate(trained, "--prompt", PROMPT) == (
        4,
        "",
        f"error: {path}: found {found}, {words}\n",
    )
    assert generate(trained, "--base", "--prompt", PROMPT)[0] == 0
    path.unlink()
    assert generate(trained, "--prompt", PROMPT) == (
        4,
        "",
        f"error: {path}: found no file, {words}\n",
    )


def test_run_without_adapter_and_checkpoint_has_only_its_base(
    generate: Generate, trained: Path
) -> None:
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(trained / name)
    (trained / "run.json").unlink()
    words = "found no finished adapter and no checkpoint; train it on, or give --base"
    assert generate(trained, "--prompt", PROMPT) == (4, "", f"error: {trained}: {words}\n")
    assert generate(trained, "--base", "--prompt", PROMPT)[0] == 0


def test_base_of_a_run_is_the_commit_that_was_trained_on(trained: Path) -> None:
    path = trained / "config.yaml"  # which names the commit, not the branch that was asked for
    assert find_named_model(str(trained), False).config.model_revision is None
    path.write_text(
        path.read_text().replace("model_revision: null", f"model_revision: '{'0' * 40}'")
    )
    assert find_named_model(str(trained), False).config.model_revision == "0" * 40


@pytest.mark.parametrize(
    ("default", "asked", "dtype", "in_4bit"),
    [
        ("dtype: float32", "dtype: float32", torch.float32, False),
        ("dtype: float32", "dtype: null", torch.float32, False),
        ("dtype: float32", "dtype: float64", torch.float64, False),
        ("load_in_4bit: false", "load_in_4bit: true", torch.float32, True),
    ],
)
def test_base_is_in_the_dtype_and_quantization_of_the_runs_config(
    trained: Path, default: str, asked: str, dtype: torch.dtype, in_4bit: bool
) -> None:
    path = trained / "config.yaml"
    assert default in path.read_text()
    path.write_text(path.read_text().replace(default, asked))
    model = load_model(find_named_model(str(trained), False))
    assert model.get_input_embeddings().weight.dtype == dtype
    assert getattr(model, "is_loaded_in_4bit", False) == in_4bit


@pytest.mark.parametrize("other", ["deeper bloom", "llama"])
def test_base_that_the_adapter_does_not_fit_is_refused(
    generate: Generate, trained: Path, bloom: Path, llama: Path, tmp_path: Path, other: str
) -> None:
    place = llama
    if (
        other == "deeper bloom"
    ):  # the adapter has nothing for its third layer, of which PEFT only warns
        place = shutil.copytree(bloom, tmp_path / "deeper")
        config = bloom_config()
        config.n_layer = 3
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
    path = trained / "config.yaml"
    path.write_text(path.read_text().replace(str(bloom), str(place)))
    code, out, err = generate(trained, "--prompt", PROMPT)
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert err.startswith(f"error: {trained / 'adapter'}: does not fit {place}: ")


@pytest.mark.parametrize(
    ("words", "code", "answer"),
    [
        (["--prompt", ""], 2, "--prompt: found '', which has no tokens; expected some text"),
        (["--prompt", "a\udcff"], 2, r"--prompt: found 'a\udcff', expected UTF-8"),
        (
            ["--prompt", "a", "--max_new_tokens", "300"],
            2,
            "--max_new_tokens 300, the model takes 256 together",
        ),
        (
            ["--prompt", "a " * 300, "--max_new_tokens", "1"],
            2,
            "tokens and --max_new_tokens 1, the model takes 256",
        ),
        (
            ["--prompt", "a", "--max_new_tokens", "-3"],
            2,
            "--max_new_tokens: found -3, expected 1 or more",
        ),
        (
            ["--prompt", "a", "--max_new_tokens", "0"],
            2,
            "--max_new_tokens: found 0, expected 1 or more",
        ),
        (
            ["--prompt", "a", "--temperature", "-0.5"],
            2,
            "--temperature: found -0.5, expected 0 or more",
        ),
        (
            ["--prompt", "a", "--temperature", "nan"],
            2,
            "--temperature: found nan, expected 0 or more",
        ),
        (
            ["--prompt", "a", "--temperature", "inf"],
            2,
            "--temperature: found inf, expected 0 or more",
        ),
        (["--prompt", "a", "--seed", "-1"], 2, "--seed: found -1, expected 0 or more"),
        (
            ["--prompt", "a", "--seed", "one"],
            2,
            "argument --seed: invalid int value: 'one'; --help lists the flags",
        ),
        (
            ["--prompt", "a", "--temp", "1"],
            2,
            "unrecognized arguments: --temp 1; --help lists the flags",
        ),
    ],
)
def test_mistake_is_answered_in_one_sentence(
    generate: Generate, llama: Path, words: list[str], code: int, answer: str
) -> None:
    found, out, err = generate(llama, *words)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert answer in err


def test_prompt_may_fill_the_model_to_its_last_position(generate: Generate, llama: Path) -> None:
    assert len(AutoTokenizer.from_pretrained(llama)("a")["input_ids"]) == 1
    answer = json.loads(generate(llama, "--json", "--prompt", "a", "--max_new_tokens", 255)[1])
    assert answer["completion_tokens"] == 255 or answer["stopped"] == "end_of_text"
    assert generate(llama, "--prompt", "a", "--max_new_tokens", 256)[0] == 2


def test_name_that_is_nothing_is_refused(
    generate: Generate, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    slip = Path(tmp_path.name) / "rnu"  # looks like a Hub id, but there is a run beside it
    for name in (slip, "./rnu", tmp_path / "rnu"):
        words = "found no such folder; expected a run, a checkpoint in it, or a model"
        assert generate(name, "--prompt", "a") == (2, "", f"error: {name}: {words}\n")
    absent = trained / "checkpoints" / "step-000999"
    words = "found no folder, expected a checkpoint"
    assert generate(absent, "--prompt", "a") == (4, "", f"error: {absent}: {words}\n")
    lonely = shutil.copytree(trained / "adapter", tmp_path / "lonely")
    words = "found an adapter without its run; expected RUN or RUN/checkpoints/step-N"
    assert generate(lonely, "--prompt", "a") == (2, "", f"error: {lonely}: {words}\n")
    code, out, err = generate("nobody/nothing", "--prompt", "a")
    assert (code, out) == (6, "")
    assert err.splitlines()[-1].endswith(
        "or a Hub id that is online or downloaded before: hf download nobody/nothing, then"
        " HF_HUB_OFFLINE=1"
    )


def test_prompt_is_refused_before_the_base_is_loaded(
    generate: Generate, tokenizer_folder: Path
) -> None:
    code, _, err = generate(tokenizer_folder, "--prompt", "a")  # a folder without a model
    assert (code, err.startswith(f"error: model_name_or_path: no model in {tokenizer_folder}")) == (
        2,
        True,
    )
    code, _, err = generate(tokenizer_folder, "--prompt", "")
    assert (code, err.startswith("error: --prompt: ")) == (2, True)


def test_mistakes_are_reported_together(generate: Generate) -> None:
    code, _, err = generate("anything", "--seed", -1, "--temperature", -1, "--max_new_tokens", -1)
    assert code == 2
    assert [line.split(":")[-2].strip() for line in err.splitlines()] == [
        "--max_new_tokens",
        "--temperature",
        "--seed",
    ]


def test_prompts_are_piped_through_and_nothing_else_is_written(trained: Path, bloom: Path) -> None:
    child = process(str(trained), "--json", "--max_new_tokens", "12")
    out, err = child.communicate(f"{PROMPT}\nLove\n", timeout=120)
    whole = [
        answer["prompt"] + answer["completion"] for answer in map(json.loads, out.splitlines())
    ]
    assert (child.returncode, err) == (0, "")
    assert whole == [plainly(bloom, trained / "adapter", prompt) for prompt in (PROMPT, "Love")]


def test_session_answers_at_once_and_ctrl_c_ends_it_with_130(bloom: Path) -> None:
    child = process(str(bloom), "--max_new_tokens", "12")
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(PROMPT + "\n")
    child.stdin.flush()
    patience = threading.Timer(
        60, child.kill
    )  # else an answer that never comes is waited for without end
    patience.start()
    first = child.stdout.read(len(plainly(bloom)) + 1)
    patience.cancel()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (first, out) == (plainly(bloom) + "\n", "")
    assert (child.returncode, err.count("\n")) == (130, 1)
    assert err.startswith("error: interrupted")


def test_unknown_flag_ends_the_process_with_two() -> None:
    child = process("anything", "--promt", "a")
    out, err = child.communicate(timeout=60)
    words = "error: unrecognized arguments: --promt a; --help lists the flags\n"
    assert (child.returncode, out, err) == (2, "", words)
