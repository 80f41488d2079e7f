"""The loop against references it does not share: transformers' own loss in float64, and its own
uninterrupted run."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from loop.config.knobs import Config
from loop.run.prepare import Run
from loop.train import train
from tests.conftest import flags
from tests.processes import run, start, start_altered, wait_until

pytestmark = pytest.mark.runs
Settings = Callable[..., dict[str, Any]]


def ledger(folder: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "ledger.jsonl").read_text().splitlines()]


def step_lines(folder: Path | str) -> list[dict[str, Any]]:
    return [line for line in ledger(folder) if "loss" in line]


def texts(dataset: Path | str) -> list[str]:
    return [
        json.loads(line)["text"] for line in Path(dataset).read_text(encoding="utf-8").splitlines()
    ]


def reference_gradient(
    used: dict[str, Any], adapter: Path, rows: list[int], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The mean loss over all targets of `rows`, one unpadded row at a time, by transformers' own
    shift and loss."""
    model = AutoModelForCausalLM.from_pretrained(used["model_name_or_path"], dtype=dtype)
    model = PeftModel.from_pretrained(
        model, str(adapter), is_trainable=True, autocast_adapter_dtype=False
    ).to(dtype)
    tokenizer = AutoTokenizer.from_pretrained(used["model_name_or_path"])
    ids = [
        tokenizer(texts(used["dataset_name"])[row])["input_ids"] + [tokenizer.eos_token_id]
        for row in rows
    ]
    ids = [row[: used["max_length"]] for row in ids]
    targets = sum(len(row) - 1 for row in ids)
    for row in ids:
        tokens = torch.tensor([row])
        logits = model(input_ids=tokens).logits
        with pytest.MonkeyPatch.context() as patch:
            # transformers' loss lowers logits to float32 with .float(): here that would be the
            # reference's error.
            patch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(dtype))
            mean = model.get_base_model().loss_function(
                logits=logits, labels=tokens, vocab_size=logits.shape[-1]
            )
        (mean * ((len(row) - 1) / targets)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def gradient_of_second_step(folder: Path) -> dict[str, torch.Tensor]:
    """With adam_beta1 0 AdamW's first moment is the gradient itself, and the checkpoint holds
    it."""
    tensors = load_file(folder / "checkpoints" / "step-000002" / "optimizer.safetensors")
    found = {name: tensor for name, tensor in tensors.items() if name.endswith(".exp_avg")}
    return {
        name.removesuffix(".exp_avg").replace(".weight", ".default.weight"): t
        for name, t in found.items()
    }


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    flat = torch.cat([found[name].double().flatten() for name in sorted(found)])
    wanted = torch.cat([expected[name].double().flatten() for name in sorted(expected)])
    assert wanted.norm() > 1e-3
    return float((flat - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        ("gpt2", "float64", 1e-12),
        ("llama", "float64", 1e-12),
        ("bloom", "float64", 1e-7),  # its softmax is float32 whatever the dtype
        ("gpt2", "float32", 3e-6),
        ("llama", "float32", 3e-6),
        ("bloom", "float32", 3e-6),
    ],
)
@pytest.mark.parametrize("micro_batch_tokens", [128, 1024])
def test_gradient_of_a_step_is_that_of_transformers_own_loss(
    family: str, dtype: str, tolerance: float, num_processes: int, micro_batch_tokens: int,
    settings: Settings, tmp_path: Path, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    used = settings(
        model_name_or_path=str(request.getfixturevalue(family)), dtype=dtype, max_steps=2, save_steps=1,
        adam_beta1=0, max_grad_norm=0, micro_batch_tokens=micro_batch_tokens,
    )  # fmt: skip
    run(flags(used), tmp_path / "log", num_processes)
    folder = Path(used["output_dir"])
    second = step_lines(folder)[1]
    reference = reference_gradient(
        used, folder / "checkpoints" / "step-000001", second["rows"], torch.float64
    )
    found = gradient_of_second_step(folder)
    assert relative_difference(found, reference) < tolerance
    norm = torch.cat([tensor.double().flatten() for tensor in reference.values()]).norm()
    assert second["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize(
    "changed",
    [{"num_processes": 2}, {"micro_batch_tokens": 128}],
    ids=["two processes", "another cut"],
)
def test_hundred_steps_have_the_same_rows_and_losses(
    changed: dict[str, int], settings: Settings, tmp_path: Path
) -> None:
    usual = settings(max_steps=100, output_dir=str(tmp_path / "usual"), learning_rate=1e-3)
    other = {**usual, "output_dir": str(tmp_path / "other")}
    num_processes = changed.pop("num_processes", 1)
    run(flags(usual), tmp_path / "log")
    run(flags(other | changed), tmp_path / "log", num_processes)
    lines, others = step_lines(usual["output_dir"]), step_lines(other["output_dir"])
    assert [line["rows"] for line in lines] == [line["rows"] for line in others]
    assert [line["target_tokens"] for line in lines] == [line["target_tokens"] for line in others]
    assert len(lines) == 100
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(lines, others)) < 1e-5
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def transformers_loss(model: Any, tokenizer: Any, rows: list[str]) -> float:
    """Nats per target token by transformers' own loss, row by row, rows cut to 128 tokens."""
    total, targets = 0.0, 0
    for row in rows:
        ids = (tokenizer(row)["input_ids"] + [tokenizer.eos_token_id])[:128]
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        total, targets = total + float(mean) * (len(ids) - 1), targets + len(ids) - 1
    return total / targets


def test_adapter_loads_with_peft_and_gives_the_reported_held_out_loss(
    settings: Settings, tmp_path: Path
) -> None:
    used = settings(eval_fraction=0.2, max_steps=20)
    run(flags(used), tmp_path / "log")
    folder = Path(used["output_dir"])
    trained_on = {row for line in step_lines(folder) for row in line["rows"]}
    assert len(trained_on) == 32
    held_out = [texts(used["dataset_name"])[row] for row in sorted(set(range(40)) - trained_on)]
    base = AutoModelForCausalLM.from_pretrained(used["model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(used["model_name_or_path"])
    evaluations = [line["eval_loss"] for line in ledger(folder) if "eval_loss" in line]
    assert evaluations[0] == pytest.approx(transformers_loss(base, tokenizer, held_out), rel=1e-5)
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    assert evaluations[-1] == pytest.approx(
        transformers_loss(adapted, tokenizer, held_out), rel=1e-5
    )
    assert evaluations[-1] < evaluations[0]


def test_each_step_uses_the_rows_that_numpy_draws(settings: Settings, tmp_path: Path) -> None:
    import numpy as np

    used = settings(max_steps=7, global_batch_size=15, seed=5, eval_fraction=0.125)
    run(flags(used), tmp_path / "log", 2)
    drawn = [row for line in step_lines(used["output_dir"]) for row in line["rows"]]
    heldout = np.random.RandomState([5, 2**32 - 1]).permutation(40)[:5]
    training = np.array([row for row in range(40) if row not in heldout])
    epochs = [
        training[np.random.RandomState([5, epoch]).permutation(35)].tolist() for epoch in range(3)
    ]
    assert drawn == epochs[0] + epochs[1] + epochs[2]
    assert [line["epoch"] for line in step_lines(used["output_dir"])] == [0, 0, 0, 1, 1, 2, 2]


def test_same_command_twice_gives_the_same_bytes(settings: Settings, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        run(
            flags(settings(output_dir=str(tmp_path / folder), eval_fraction=0.1, lora_dropout=0.1)),
            tmp_path / "log",
        )
    for file in (
        "ledger.jsonl",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_another_seed_gives_another_run(settings: Settings, tmp_path: Path) -> None:
    for seed in (1, 2):
        run(flags(settings(output_dir=str(tmp_path / str(seed)), seed=seed)), tmp_path / "log")
    assert step_lines(tmp_path / "1")[0]["rows"] != step_lines(tmp_path / "2")[0]["rows"]


def test_dropout_is_a_function_of_the_step_and_is_applied(
    settings: Settings, tmp_path: Path
) -> None:
    dropped = settings(output_dir=str(tmp_path / "dropped"), lora_dropout=0.3, max_steps=3)
    plain = settings(output_dir=str(tmp_path / "plain"), max_steps=3)
    run(flags(dropped), tmp_path / "log")
    run(flags(plain), tmp_path / "log")
    losses = [
        [line["loss"] for line in step_lines(used["output_dir"])] for used in (dropped, plain)
    ]
    assert losses[0][0] == losses[1][0]  # B is zero: nothing to drop yet
    assert losses[0][2] != losses[1][2]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_stopping_and_going_on_equals_the_straight_run(
    num_processes: int, settings: Settings, tmp_path: Path
) -> None:
    usual = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "eval_fraction": 0.2,
        "eval_steps": 2,
        "lora_dropout": 0.1,
    }
    straight = settings(**usual, output_dir=str(tmp_path / "straight"))
    parted = settings(**usual, output_dir=str(tmp_path / "parted"))
    run(flags(straight), tmp_path / "log", num_processes)
    run([*flags(parted), "--stop_after_steps", "3"], tmp_path / "log", num_processes)
    assert not (tmp_path / "parted" / "adapter").exists()
    run(flags(parted), tmp_path / "log", num_processes)
    assert_same_run(tmp_path / "parted", tmp_path / "straight")


@pytest.mark.parametrize("first", [1, 2, 3, 4, 5])
def test_a_resume_at_any_step_equals_the_straight_run(
    first: int, settings: Settings, tmp_path: Path
) -> None:
    straight = settings(output_dir=str(tmp_path / "straight"), lora_dropout=0.1)
    run(flags(straight), tmp_path / "log")
    parted = settings(output_dir=str(tmp_path / "parted"), lora_dropout=0.1)
    run([*flags(parted), "--stop_after_steps", str(first)], tmp_path / "log")
    run([*flags(parted), "--stop_after_steps", "1"], tmp_path / "log")
    run(flags(parted), tmp_path / "log")
    assert_same_run(tmp_path / "parted", tmp_path / "straight")


def test_bf16_autocast_trains_and_resumes_bit_for_bit(settings: Settings, tmp_path: Path) -> None:
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    straight, parted = (
        settings(output_dir=str(tmp_path / name)) for name in ("straight", "parted")
    )
    run(flags(straight), tmp_path / "log", environment=bf16)
    run([*flags(parted), "--stop_after_steps", "2"], tmp_path / "log", environment=bf16)
    run(flags(parted), tmp_path / "log", environment=bf16)
    assert_same_run(tmp_path / "parted", tmp_path / "straight")
    exact = settings(output_dir=str(tmp_path / "exact"))
    run(flags(exact), tmp_path / "log")
    losses = [step_lines(used["output_dir"])[0]["loss"] for used in (straight, exact)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_loss_that_is_not_finite_stops_before_the_adapter_moves(
    llama: Path, settings: Settings, tmp_path: Path
) -> None:
    clean = settings(
        model_name_or_path=str(llama), save_steps=1, output_dir=str(tmp_path / "clean")
    )
    run([*flags(clean), "--stop_after_steps", "3"], tmp_path / "log")
    rows = step_lines(clean["output_dir"])[2]["rows"]
    before = {row for line in step_lines(clean["output_dir"])[:2] for row in line["rows"]}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = [set(tokenizer(text)["input_ids"][:128]) for text in texts(clean["dataset_name"])]
    poison = min(set.union(*(ids[row] for row in rows)) - set.union(*(ids[row] for row in before)))
    model = AutoModelForCausalLM.from_pretrained(
        llama
    )  # its embedding and its head are two tensors
    model.model.embed_tokens.weight.data[poison] = float("nan")
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    used = {
        **clean,
        "model_name_or_path": str(tmp_path / "poisoned"),
        "output_dir": str(tmp_path / "run"),
    }
    for num_processes in (1, 2):
        launched = start(flags(used), tmp_path / f"log-{num_processes}", num_processes)
        assert launched.wait() == [7] * num_processes
        last = launched.text().strip().splitlines()[-1]
        assert last.startswith("error: step 2: loss nan")
        assert str(rows) in last
    checkpoints = [Path(used["output_dir"]) / "checkpoints" / f"step-{step:06d}" for step in (1, 2)]
    assert sorted(checkpoints[0].parent.iterdir()) == checkpoints
    saved = [
        load_file(Path(folder) / "checkpoints/step-000002/adapter_model.safetensors")
        for folder in (clean["output_dir"], used["output_dir"])
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_run_on_local_files_opens_no_socket(settings: Settings, tmp_path: Path) -> None:
    words = flags(settings(eval_fraction=0.1, sample_prompt="A good", max_steps=2))
    # A process of its own, because the libraries read HF_HUB_OFFLINE when they are imported: here
    # it is not set.
    code = "from tests.processes import run_without_network; run_without_network()"
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=online,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words[words.index("--model_name_or_path") + 1] = "nobody/nothing"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=online,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 99  # a Hub id does open one
    assert "used the network" in done.stderr


def test_second_run_in_the_same_folder_is_refused_with_five_and_harms_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    straight, shared = (
        settings(output_dir=str(tmp_path / name), max_steps=60) for name in ("straight", "shared")
    )
    run(flags(straight), tmp_path / "log")
    first = start(flags(shared), tmp_path / "first")
    ledger_file = Path(shared["output_dir"]) / "ledger.jsonl"
    assert wait_until(lambda: size(ledger_file) > 0, first)
    second = start(flags(shared), tmp_path / "second")
    assert second.wait() == [5]
    assert "is written to by process" in second.text().strip().splitlines()[-1]
    assert first.wait() == [0], first.text()
    assert_same_run(Path(shared["output_dir"]), Path(straight["output_dir"]))


def test_held_out_loss_that_is_not_finite_ends_with_seven(
    llama: Path, settings: Settings, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "nan")
    for num_processes in (1, 2):
        used = settings(model_name_or_path=str(tmp_path / "nan"), eval_fraction=0.2)
        launched = start(flags(used), tmp_path / f"log-{num_processes}", num_processes)
        assert launched.wait() == [7] * num_processes
        assert (
            launched.text().strip().splitlines()[-1].startswith("error: the held-out loss is nan")
        )


def test_resume_compares_with_what_wrote_the_checkpoint_not_with_the_last_start(
    settings: Settings, tmp_path: Path
) -> None:
    used = settings(max_steps=60, save_steps=3)
    run([*flags(used), "--stop_after_steps", "3"], tmp_path / "log")
    changed = [*flags(used), "--micro_batch_tokens", "128"]
    killed = start([*changed, "--save_steps", "100"], tmp_path / "killed")
    before = size(Path(used["output_dir"]) / "ledger.jsonl")
    assert wait_until(lambda: size(Path(used["output_dir"]) / "ledger.jsonl") > before, killed)
    killed.kill()
    again = run([*changed, "--stop_after_steps", "1"], tmp_path / "again")
    assert "not bit-exact from step 3: micro_batch_tokens was 256, is 128" in again.text()
    once_more = run([*changed, "--stop_after_steps", "1"], tmp_path / "once-more")
    assert "not bit-exact" not in once_more.text()


def test_row_longer_than_the_models_context_is_refused_with_two(
    gpt2: Path, settings: Settings, tmp_path: Path
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "a b c d " * 200}) + "\n")
    used = settings(
        model_name_or_path=str(gpt2), dataset_name=str(long), max_length=300, micro_batch_tokens=300
    )
    launched = start(flags(used), tmp_path / "log")
    assert launched.wait() == [2]
    assert "a row has 300 tokens, the model takes 256" in launched.text().strip().splitlines()[-1]


def test_bf16_without_a_gpu_is_refused_unless_the_cpu_is_asked_for(
    settings: Settings, tmp_path: Path
) -> None:
    launched = start(
        flags(settings()), tmp_path / "log", environment={"ACCELERATE_MIXED_PRECISION": "bf16"}
    )
    assert launched.wait() == [2]
    assert "bf16 is for a GPU and torch sees none" in launched.text()


def test_gradient_crosses_processes_once_a_step_with_the_loss_behind_it(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    crossed = []
    reduce = Accelerator.reduce
    monkeypatch.setattr(
        Accelerator,
        "reduce",
        lambda self, tensor, *rest: crossed.append(tensor) or reduce(self, tensor, *rest),
    )
    train(config(max_steps=3))
    # r=4 on the four linear modules of two layers: 4 x (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32) x
    # 2 = 4,096 numbers.
    assert [(tensor.numel(), tensor.dtype) for tensor in crossed] == [
        (4101, torch.float32)
    ] * 3  # the loss and four signals


class Collectives(torch.utils._python_dispatch.TorchDispatchMode):
    """Prints the name and the numbers of every operation between processes, whoever asks for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            numbers = sum(
                leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)
            )
            print(f"\n{func.__name__} of {numbers}", flush=True)
        return func(*args, **(kwargs or {}))


def counted(run: Run) -> Run:
    if run.accelerator.is_main_process:
        Collectives().__enter__()
        run.optimizer.register_step_post_hook(lambda *_: print("\nupdate", flush=True))
    return run


def test_two_processes_meet_once_before_each_update_whatever_call_it_is(
    settings: Settings, tmp_path: Path
) -> None:
    launched = start_altered(
        counted, flags(settings(max_steps=3, eval_fraction=0.1)), tmp_path / "log", 2
    )
    assert launched.wait() == [0, 0], launched.text()
    met = re.findall(r"(?m)^(?:\w+\.default of \d+|update)$", launched.text())
    first = met.index("update")
    assert met[first - 1 : first + 5] == ["allreduce_.default of 4101", "update"] * 3
    assert met[first + 5] == "allreduce_.default of 1"  # the evaluation


def test_moments_of_a_bf16_run_are_float32(settings: Settings, tmp_path: Path) -> None:
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    used = settings(dtype="bfloat16", max_steps=1)
    run(flags(used), tmp_path / "log", environment=bf16)
    folder = Path(used["output_dir"]) / "checkpoints" / "step-000001"
    for file in ("optimizer.safetensors", "adapter_model.safetensors"):
        assert {tensor.dtype for tensor in load_file(folder / file).values()} == {torch.float32}


def assert_same_run(found: Path, expected: Path) -> None:
    for file in (
        "ledger.jsonl",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ):
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file


class Kills:
    """Counts where SIGKILL fell."""

    def __init__(self) -> None:
        self.all = self.after_a_ledger_line = self.while_saving = 0


KILLS = Kills()


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_killed_at_any_moment_and_resumed_equals_the_uninterrupted_run(
    num_processes: int, settings: Settings, tmp_path: Path
) -> None:
    usual = {
        "lora_dropout": 0.1,
        "max_steps": 24,
        "save_steps": 2,
        "eval_fraction": 0.1,
        "eval_steps": 5,
        "lora_r": 64,
    }
    straight = settings(**usual, output_dir=str(tmp_path / "straight"))
    killed = settings(**usual, output_dir=str(tmp_path / "killed"))
    run(flags(straight), tmp_path / "log", num_processes)
    assert {line["epoch"] for line in step_lines(straight["output_dir"])} > {0, 1}
    folder = Path(killed["output_dir"])
    moments: list[Callable[[int], bool]] = [
        lambda before: size(folder / "ledger.jsonl") > before,
        lambda before: bool(list((folder / "checkpoints").glob(".tmp-*"))),
        lambda before: folder.exists(),
        lambda before: (
            (folder / "metrics.jsonl").exists() and size(folder / "ledger.jsonl") > before + 2000
        ),
        lambda before: bool(list((folder / "checkpoints").glob(".tmp-*"))),
        lambda before: bool(list((folder / "checkpoints").glob(".tmp-*/manifest.json"))),
        lambda before: size(folder / "ledger.jsonl") > before,
        lambda before: bool(list((folder / "checkpoints").glob(".tmp-*"))),
    ]
    for number, moment in enumerate(moments):
        before = size(folder / "ledger.jsonl")
        launched = start(flags(killed), tmp_path / f"log-{number}", num_processes)
        happened = wait_until(lambda: moment(before), launched)  # noqa: B023
        launched.kill()
        assert happened, launched.text()
        assert not (folder / "adapter").exists(), "the run ended before it was killed"
        KILLS.all += 1
        KILLS.after_a_ledger_line += (
            size(folder / "ledger.jsonl") > 0 and len(step_lines_whole(folder)) > 0
        )
        KILLS.while_saving += bool(list((folder / "checkpoints").glob(".tmp-*")))
    run(flags(killed), tmp_path / "log", num_processes)
    assert_same_run(folder, Path(straight["output_dir"]))
    assert not list(folder.glob("**/.tmp-*"))


def test_kills_fell_where_they_matter() -> None:
    if KILLS.all == 0:
        pytest.skip("counts the kills of the test before, which did not run")
    assert KILLS.all >= 20
    assert KILLS.after_a_ledger_line >= 8
    assert KILLS.while_saving >= 4


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def step_lines_whole(folder: Path) -> list[str]:
    """Step lines of a ledger that a kill may have torn."""
    return [
        line
        for line in (folder / "ledger.jsonl").read_text().splitlines()
        if '"target_tokens"' in line
    ]


def test_run_directory_deleted_while_training_ends_at_the_next_save_with_five(
    settings: Settings, tmp_path: Path
) -> None:
    used = settings(max_steps=100_000, save_steps=20)
    launched = start(flags(used), tmp_path / "log")
    folder = Path(used["output_dir"])
    assert wait_until(lambda: size(folder / "ledger.jsonl") > 2000, launched)
    folder.rename(tmp_path / "moved-away")
    assert launched.wait() == [5]
    assert "not written: No such file or directory" in launched.text().strip().splitlines()[-1]
    assert not folder.exists()


def test_full_determinism_trains_and_changes_no_bit_on_the_cpu(
    settings: Settings, tmp_path: Path
) -> None:
    for name, asked in (("plain", "false"), ("deterministic", "true")):
        used = settings(output_dir=str(tmp_path / name), full_determinism=asked)
        run(flags(used), tmp_path / "log")
    assert_same_run(tmp_path / "deterministic", tmp_path / "plain")
