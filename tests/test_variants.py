"""Variants of plain LoRA: gradient checkpointing, rsLoRA and DoRA, each against what it must
equal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loop.config.knobs import Config
from loop.model.base import load_base
from loop.model.checksum import base_checksum
from loop.model.lora import adapter_parameters, add_adapter
from loop.train import train
from tests.conftest import flags
from tests.processes import Launched, start
from tests.state.test_resume import outcome
from tests.test_train import (
    assert_same_run,
    ledger,
    reference_gradient,
    relative_difference,
    step_lines,
    texts,
    transformers_loss,
)

Settings = Callable[..., dict[str, Any]]

pytestmark = [
    pytest.mark.runs,
    # PEFT's own remark about GPT-2, whose linear modules are transposed; it does what it says.
    pytest.mark.filterwarnings(
        "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"
    ),
]
FAMILIES = ("bloom", "llama", "gpt2")
CHECKPOINTED, RSLORA, DORA = (
    {"gradient_checkpointing": True},
    {"use_rslora": True, "lora_alpha": 8},
    {"use_dora": True},
)
VARIANTS = {
    "plain": {"lora_alpha": 16},
    "checkpointed": {"lora_alpha": 16, **CHECKPOINTED},
    "rslora": RSLORA,  # 8 / sqrt(4) is 16 / 4
    "dora": DORA,
    "dora-checkpointed": {**DORA, **CHECKPOINTED},
    "all": {**RSLORA, **DORA, **CHECKPOINTED},
}
MODULES = {
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}


@pytest.fixture(scope="module")
def bases(bloom: Path, llama: Path, gpt2: Path) -> dict[str, Path]:
    return {"bloom": bloom, "llama": llama, "gpt2": gpt2}


@pytest.fixture(scope="module")
def knobs(bases: dict[str, Path], ragged: Path) -> Settings:
    def of(family: str, folder: Path, **changed: Any) -> dict[str, Any]:
        usual = {
            "model_name_or_path": str(bases[family]), "dataset_name": str(ragged), "output_dir": str(folder),
            "max_length": 128, "micro_batch_tokens": 256, "global_batch_size": 8, "max_steps": 6, "learning_rate": 1e-2,
            "lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.1, "eval_fraction": 0.2,
        }  # fmt: skip
        return {**usual, **changed}

    return of


@pytest.fixture(scope="module")
def runs(knobs: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant of each family, six steps in this process; some again in two parts, in
    processes of their own."""
    folder = tmp_path_factory.mktemp("runs")

    def part(family: str, variant: str, **changed: Any) -> Launched:
        name = f"{family}-{variant}-parted"
        used = knobs(family, folder / name, **VARIANTS[variant], **changed)
        return start(flags(used), folder / f"{name}.log")

    for family in FAMILIES:
        parted = ("checkpointed", "rslora", "dora") if family != "gpt2" else ("dora",)
        first = [part(family, variant, stop_after_steps=3) for variant in parted]
        for variant, changed in VARIANTS.items():
            train(Config(**knobs(family, folder / f"{family}-{variant}", **changed)))
        assert [one.wait() for one in first] == [[0]] * len(parted), "".join(
            one.text() for one in first
        )
        second = [part(family, variant) for variant in parted]
        assert [one.wait() for one in second] == [[0]] * len(parted), "".join(
            one.text() for one in second
        )
    return folder


def without_hashes(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in ("prev", "hash")}
        for line in ledger(folder)
    ]


def state(folder: Path) -> bytes:
    return (folder / "checkpoints" / "step-000006" / "optimizer.safetensors").read_bytes()


# Gradient checkpointing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("plain", "variant"), [("plain", "checkpointed"), ("dora", "dora-checkpointed")]
)
def test_gradient_checkpointing_is_the_plain_run_bit_for_bit_with_dropout_too(
    runs: Path, family: str, plain: str, variant: str
) -> None:
    assert_same_run(runs / f"{family}-{variant}", runs / f"{family}-{plain}")
    assert state(runs / f"{family}-{variant}") == state(runs / f"{family}-{plain}")


# rsLoRA


@pytest.mark.parametrize("family", FAMILIES)
def test_rslora_at_alpha_8_is_plain_lora_at_alpha_16_where_r_is_4(runs: Path, family: str) -> None:
    plain, other = runs / f"{family}-plain", runs / f"{family}-rslora"
    assert without_hashes(other) == without_hashes(plain)
    assert (other / "ledger.jsonl").read_bytes() != (
        plain / "ledger.jsonl"
    ).read_bytes()  # it is another run
    weights = [
        (folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (other, plain)
    ]
    assert weights[0] == weights[1]
    assert state(other) == state(plain)


def test_rslora_at_the_same_alpha_is_not_plain_lora(
    knobs: Settings, tmp_path: Path, runs: Path
) -> None:
    used = Config(**knobs("bloom", tmp_path / "run", lora_alpha=16, use_rslora=True))
    train(used)
    assert without_hashes(tmp_path / "run")[3] != without_hashes(runs / "bloom-plain")[3]


# DoRA


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["dora", "all"])
def test_dora_trains_and_saves_a_magnitude_for_every_adapted_module_and_leaves_the_base(
    runs: Path, knobs: Settings, tmp_path: Path, family: str, variant: str
) -> None:
    folder = runs / f"{family}-{variant}"
    used = Config(**knobs(family, tmp_path, **VARIANTS[variant]))
    model = add_adapter(load_base(used, torch.device("cpu")), used)
    start_at = adapter_parameters(model)
    trained = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sorted(trained) == sorted(start_at)
    assert not any(torch.equal(trained[name], start_at[name]) for name in trained)
    magnitudes = [name for name in trained if name.endswith(".lora_magnitude_vector")]
    assert len(magnitudes) * 3 == len(trained)
    for name in magnitudes:
        module = model.get_submodule(name.removesuffix(".lora_magnitude_vector")).base_layer
        weight = (
            module.weight if family != "gpt2" else module.weight.T
        )  # GPT-2's are stored transposed
        assert torch.allclose(
            start_at[name], torch.linalg.vector_norm(weight, dim=1)
        )  # one for each output
    checksum = base_checksum(model)
    assert json.loads((folder / "run.json").read_bytes())["identity"]["base_checksum"] == checksum


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_dora_starts_at_the_untouched_base_and_learns(runs: Path, family: str) -> None:
    dora, plain = (
        [line["eval_loss"] for line in ledger(runs / f"{family}-{variant}") if "eval_loss" in line]
        for variant in ("dora", "plain")
    )
    assert dora[0] == pytest.approx(plain[0], rel=1e-6)
    assert dora[-1] < dora[0] - 0.1
    assert dora[-1] != plain[-1]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", None), ("float32", 5e-6)])
@pytest.mark.parametrize("variant", ["rslora", "dora", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_a_step_is_that_of_transformers_own_loss(
    knobs: Settings, tmp_path: Path, family: str, variant: str, dtype: str, tolerance: float | None
) -> None:
    used = knobs(
        family, tmp_path / "run", **VARIANTS[variant], dtype=dtype, max_steps=2, save_steps=1,
        adam_beta1=0, max_grad_norm=0, lora_dropout=0, eval_fraction=0,
    )  # fmt: skip
    train(Config(**used))
    second = step_lines(tmp_path / "run")[1]
    checkpoints = tmp_path / "run" / "checkpoints"
    # With adam_beta1 0 AdamW's first moment is the gradient itself.
    tensors = load_file(checkpoints / "step-000002" / "optimizer.safetensors")
    found = {
        name.removesuffix(".exp_avg").removesuffix(".weight") + ".default.weight": tensor
        for name, tensor in tensors.items()
        if name.endswith(".exp_avg")
    }
    assert any("lora_magnitude_vector" in name for name in found) == (
        "use_dora" in VARIANTS[variant]
    )
    reference = reference_gradient(used, checkpoints / "step-000001", second["rows"], torch.float64)
    # BLOOM's softmax is float32 whatever the dtype.
    assert relative_difference(found, reference) < (
        tolerance or (1e-7 if family == "bloom" else 1e-12)
    )


# What all of them leave


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        (family, variant)
        for family in ("bloom", "llama")
        for variant in ("checkpointed", "rslora", "dora")
    ]
    + [("gpt2", "dora")],
)
def test_ended_early_and_resumed_it_is_the_straight_run_bit_for_bit(
    runs: Path, family: str, variant: str
) -> None:
    straight, parted = runs / f"{family}-{variant}", runs / f"{family}-{variant}-parted"
    assert outcome(parted) == outcome(straight)
    assert state(parted) == state(straight)
    assert "not bit-exact" not in (runs / f"{family}-{variant}-parted.log").read_text()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_adapters_config_is_read_by_peft_as_it_was_asked_for(
    runs: Path, family: str, variant: str
) -> None:
    asked = VARIANTS[variant]
    found = LoraConfig.from_pretrained(str(runs / f"{family}-{variant}" / "adapter"))
    assert (found.use_rslora, found.use_dora) == (
        asked.get("use_rslora", False),
        asked.get("use_dora", False),
    )
    assert (found.r, found.lora_alpha, found.lora_dropout) == (4, asked.get("lora_alpha", 32), 0.1)
    assert (found.target_modules, found.bias, found.task_type) == (
        MODULES[family],
        "none",
        "CAUSAL_LM",
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["checkpointed", "rslora", "dora", "all"])
def test_the_adapter_loads_with_peft_and_gives_the_reported_held_out_loss(
    runs: Path, bases: dict[str, Path], ragged: Path, family: str, variant: str
) -> None:
    folder = runs / f"{family}-{variant}"
    reported = [line["eval_loss"] for line in ledger(folder) if "eval_loss" in line][-1]
    trained_on = {row for line in step_lines(folder) for row in line["rows"]}
    assert len(trained_on) == 32
    tokenizer = AutoTokenizer.from_pretrained(bases[family])
    base = AutoModelForCausalLM.from_pretrained(bases[family])
    model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    heldout = [texts(ragged)[row] for row in sorted(set(range(40)) - trained_on)]
    assert transformers_loss(model, tokenizer, heldout) == pytest.approx(reported, rel=1e-5)
