"""Bases in 4 and 8 bits: what is quantized, that they train and resume as any base does, and the
trap on the CPU."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
)

from loop.config.knobs import Config
from loop.model.base import load_base
from loop.model.checksum import base_checksum
from loop.model.lora import adapter_parameters, add_adapter, census
from loop.model.quantize import keep_trainable, quantization_config
from loop.process.command import run_command
from loop.process.launch import make_accelerator
from loop.process.signals import Signals
from loop.run.prepare import Run, prepare_run
from loop.run.rehearsal import rehearse
from loop.train import evaluate, optimizer_step, train
from tests.conftest import VOCABULARY, _save_model, bloom_config, flags
from tests.processes import Launched, start, start_altered, wait_until
from tests.test_train import (
    assert_same_run,
    ledger,
    reference_gradient,
    relative_difference,
    step_lines,
    texts,
    transformers_loss,
)

Configs = Callable[..., Config]
Settings = Callable[..., dict[str, Any]]

CPU = torch.device("cpu")
FAMILIES, BITS = ("bloom", "llama"), (4, 8)
KILLED = [("llama", 4), ("bloom", 8)]
FOUR = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
EIGHT = BitsAndBytesConfig(load_in_8bit=True)
LINEAR = {"bloom": 4 * 2, "llama": 7 * 2}  # linear modules beside the head


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, Path]:
    """Of hidden size 64, one block of nf4: bitsandbytes packs no narrower rows for avx512_bf16."""
    bloom = bloom_config()
    bloom.hidden_size = 64
    llama = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    return {
        name: _save_model(tmp_path_factory.mktemp(f"wide-{name}"), tokenizer_folder, config)
        for name, config in (("bloom", bloom), ("llama", llama))
    }


@pytest.fixture(scope="module")
def knobs(bases: dict[str, Path], ragged: Path) -> Settings:
    """A small run on a quantized base with an evaluation after every step."""

    def of(family: str, bits: int, folder: Path, **changed: Any) -> dict[str, Any]:
        usual = {
            "model_name_or_path": str(bases[family]), "dataset_name": str(ragged), "output_dir": str(folder),
            "max_length": 128, "micro_batch_tokens": 256, "global_batch_size": 8, "max_steps": 8, "learning_rate": 1e-2,
            "lora_r": 4, "lora_target_modules": "all-linear", "eval_fraction": 0.2, "eval_steps": 1, "save_steps": 1,
        }  # fmt: skip
        return {**usual, f"load_in_{bits}bit": True, **changed}

    return of


@pytest.fixture(scope="module")
def runs(knobs: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same eight steps of each family in 4 and in 8 bits, in five ways.

    `straight`; `checkpointed`: with gradient checkpointing; `parted`: ended after three steps and
    started again; `two`: on two processes; `killed`, in two cases: with SIGKILL once it has saved
    three steps, and started again."""
    folder = tmp_path_factory.mktemp("runs")

    def go(family: str, bits: int, way: str, processes: int = 1, **changed: Any) -> Launched:
        name = f"{family}-{bits}-{way}"
        log = folder / f"{name}.log"
        return start(flags(knobs(family, bits, folder / name, **changed)), log, processes)

    def succeed(*launched: Launched) -> None:
        codes = [code for one in launched for code in one.wait()]
        assert set(codes) == {0}, "".join(one.text() for one in launched)

    for family, bits in itertools.product(FAMILIES, BITS):
        succeed(go(family, bits, "straight"), go(family, bits, "parted", stop_after_steps=3))
        assert not (folder / f"{family}-{bits}-parted" / "adapter").exists()
        succeed(
            go(family, bits, "checkpointed", gradient_checkpointing=True),
            go(family, bits, "parted"),
        )
        succeed(go(family, bits, "two", processes=2))
    for family, bits in KILLED:
        killed = go(family, bits, "killed")
        saved = folder / f"{family}-{bits}-killed" / "checkpoints" / "step-000003"
        assert wait_until(saved.exists, killed), killed.text()
        killed.kill()
        assert not (folder / f"{family}-{bits}-killed" / "adapter").exists(), (
            "the run ended before it was killed"
        )
    succeed(*(go(family, bits, "killed") for family, bits in KILLED))
    return folder


def load_plainly(base: Path, bits: int) -> PreTrainedModel:
    """The quantized base as a user of transformers loads it, without this project; its gradients
    kept."""
    config = FOUR if bits == 4 else EIGHT
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, device_map="cpu"
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


# What is quantized


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_module_but_the_head_is_nf4_with_double_quantization_and_products_in_dtype(
    knobs: Settings, tmp_path: Path, family: str, dtype: str
) -> None:
    base = load_base(Config(**knobs(family, 4, tmp_path, dtype=dtype)), CPU)
    head = base.get_output_embeddings()
    linear = [
        module for module in base.modules() if isinstance(module, nn.Linear) and module is not head
    ]
    assert len(linear) == LINEAR[family]
    for module in linear:
        assert isinstance(module, Linear4bit)
        assert module.compute_dtype == getattr(torch, dtype)
        state = module.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
        assert (state.state2.blocksize, state.absmax.dtype) == (
            256,
            torch.uint8,
        )  # the scales are quantized too
        assert module.weight.dtype == torch.uint8
        assert module.weight.numel() * 2 == module.in_features * module.out_features
    rest = [p for p in base.parameters() if not isinstance(p, type(linear[0].weight))]
    assert {p.dtype for p in rest} == {getattr(torch, dtype)}
    assert type(head) is nn.Linear


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_module_but_the_head_is_int8_with_outliers_kept_apart(
    knobs: Settings, tmp_path: Path, family: str
) -> None:
    base = load_base(Config(**knobs(family, 8, tmp_path)), CPU)
    head = base.get_output_embeddings()
    linear = [
        module for module in base.modules() if isinstance(module, nn.Linear) and module is not head
    ]
    assert len(linear) == LINEAR[family]
    for module in linear:
        assert isinstance(module, Linear8bitLt)
        assert (module.weight.dtype, module.state.threshold, module.state.has_fp16_weights) == (
            torch.int8,
            6.0,
            False,
        )
    assert type(head) is nn.Linear


@pytest.mark.runs
@pytest.mark.parametrize(("bits", "names"), [(4, ["float32", "nf4"]), (8, ["float32", "int8"])])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_census_counts_the_numbers_of_the_unquantized_model(
    runs: Path, knobs: Settings, tmp_path: Path, family: str, bits: int, names: list[str]
) -> None:
    plain = {**knobs(family, bits, tmp_path), f"load_in_{bits}bit": False}
    expected = census(add_adapter(load_base(Config(**plain), CPU), Config(**plain)))
    found = json.loads((runs / f"{family}-{bits}-straight" / "run.json").read_bytes())["census"]
    assert found["base_dtypes"] == names
    assert {**found, "base_dtypes": None} == {**expected, "base_dtypes": None}


def one_bit_of(tensor: Tensor) -> Tensor:
    """A view of one byte in the middle of the tensor."""
    flat = tensor.detach().view(-1).view(torch.uint8)
    return flat[len(flat) // 2 : len(flat) // 2 + 1]


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_one_flipped_bit_of_a_quantized_weight_or_of_its_scales_changes_the_checksum(
    knobs: Settings, tmp_path: Path, bits: int, forward_first: bool
) -> None:
    used = Config(**knobs("llama", bits, tmp_path))
    model = add_adapter(load_base(used, CPU), used)
    before = base_checksum(model)
    if forward_first:  # where int8 moves its scales from the weight into the module
        model(input_ids=torch.arange(4, 24).view(1, 20), use_cache=False)
        assert base_checksum(model) == before
    layer = model.get_base_model().model.layers[1].mlp.down_proj.base_layer
    if bits == 4:
        state = layer.weight.quant_state
        parts = [layer.weight, state.absmax, state.state2.absmax, state.offset]
    else:
        parts = [layer.weight, layer.weight.SCB if layer.state.SCB is None else layer.state.SCB]
    for part in parts:
        byte = one_bit_of(part)
        byte ^= 1
        assert base_checksum(model) != before
        byte ^= 1
        assert base_checksum(model) == before


# Through the real program


@pytest.mark.runs
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_tensor_moves_the_loss_falls_and_the_base_does_not_move(
    runs: Path, knobs: Settings, tmp_path: Path, family: str, bits: int
) -> None:
    folder = runs / f"{family}-{bits}-straight"
    used = Config(**knobs(family, bits, tmp_path))
    model = add_adapter(load_base(used, CPU), used)
    start_at = adapter_parameters(model)
    trained = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sorted(trained) == sorted(start_at)
    assert len(trained) == 2 * LINEAR[family]
    assert not any(torch.equal(trained[name], start_at[name]) for name in trained)
    losses = [line["loss"] for line in step_lines(folder)]
    held_out = [line["eval_loss"] for line in ledger(folder) if "eval_loss" in line]
    assert len(losses) == 8
    assert len(held_out) == 9  # before the first step, and after each
    assert losses[-1] < losses[0] - 0.2
    assert held_out[-1] < held_out[0] - 0.2
    checksum = base_checksum(model)
    assert json.loads((folder / "run.json").read_bytes())["identity"]["base_checksum"] == checksum
    said = (runs / f"{family}-{bits}-straight.log").read_text()
    assert f"base     checksum {checksum[:12]} before and after: not one byte has changed\n" in said


@pytest.mark.runs
@pytest.mark.parametrize(
    ("family", "bits", "way"),
    [(*one, way) for one in itertools.product(FAMILIES, BITS) for way in ("parted", "checkpointed")]
    + [(*one, "killed") for one in KILLED],
)
def test_ended_early_or_killed_and_resumed_or_with_gradient_checkpointing_it_is_the_same_run_bit_for_bit(
    runs: Path, family: str, bits: int, way: str
) -> None:
    assert_same_run(runs / f"{family}-{bits}-{way}", runs / f"{family}-{bits}-straight")
    sessions = json.loads((runs / f"{family}-{bits}-{way}" / "run.json").read_bytes())["sessions"]
    assert len(sessions) == (1 if way == "checkpointed" else 2)
    assert [session["not_bit_exact"] for session in sessions] == [[]] * len(sessions)


@pytest.mark.runs
@pytest.mark.parametrize(
    ("bits", "held_out"), [(4, 1e-5), (8, 1e-3)]
)  # int8 keeps outliers apart batch by batch
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_have_the_same_rows_and_losses(
    runs: Path, family: str, bits: int, held_out: float
) -> None:
    one, two = (ledger(runs / f"{family}-{bits}-{way}") for way in ("straight", "two"))
    assert [line.get("rows") for line in one] == [line.get("rows") for line in two]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two) if "loss" in a) < 1e-5
    assert (
        max(abs(a["eval_loss"] - b["eval_loss"]) for a, b in zip(one, two) if "eval_loss" in a)
        < held_out
    )


@pytest.mark.runs
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changed",
    [{"load_in_4bit": False, "load_in_8bit": True}, {"load_in_4bit": False}],
    ids=["in 8 bits", "unquantized"],
)
def test_a_run_in_4_bits_goes_on_in_4_bits_only(
    runs: Path, knobs: Settings, tmp_path: Path, family: str, changed: dict[str, bool]
) -> None:
    folder = shutil.copytree(runs / f"{family}-4-straight", tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-000008")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    launched = start(flags({**knobs(family, 4, folder), **changed}), tmp_path / "log")
    assert launched.wait() == [4], launched.text()
    assert "load_in_4bit was True, is False" in launched.text()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.runs
@pytest.mark.parametrize(
    ("family", "bits", "dtype"),
    [
        ("llama", 4, "bfloat16"),
        ("bloom", 4, "bfloat16"),
        ("bloom", 4, "float32"),
        ("bloom", 8, "bfloat16"),
        ("bloom", 8, "float32"),  # its biases are float32, its input under autocast is not
    ],
)
def test_bf16_autocast_on_a_quantized_base_trains_a_float32_adapter_and_leaves_the_base(
    knobs: Settings, tmp_path: Path, family: str, bits: int, dtype: str
) -> None:
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    used = knobs(family, bits, tmp_path / "run", dtype=dtype, eval_steps=4)
    launched = start(flags(used), tmp_path / "log", environment=bf16)
    assert launched.wait() == [0], launched.text()
    losses = [line["loss"] for line in step_lines(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.2
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    manifest = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert manifest["census"]["base_dtypes"] == [dtype, {4: "nf4", 8: "int8"}[bits]]
    checksum = manifest["identity"]["base_checksum"]
    assert (
        f"base     checksum {checksum[:12]} before and after: not one byte has changed\n"
        in launched.text()
    )


@pytest.mark.runs
def test_dora_on_an_int8_base_is_refused_with_2_and_one_sentence(
    knobs: Settings, tmp_path: Path
) -> None:
    launched = start(flags(knobs("llama", 8, tmp_path / "run", use_dora=True)), tmp_path / "log")
    assert launched.wait() == [2], launched.text()
    assert len(launched.text().splitlines()) == 1
    assert launched.text().startswith("error: use_dora: with load_in_8bit ")
    assert not (tmp_path / "run").exists()


# Against references without this project


def dequantized(base: Path, bits: int, folder: Path) -> Path:
    """The quantized base written out as a plain float32 model, by bitsandbytes' own table or the
    formula of int8."""
    quantized = load_plainly(base, bits)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    moved = 0
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, Linear4bit):
                values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            elif isinstance(module, Linear8bitLt):
                values = module.weight.data.float() * module.weight.SCB.view(-1, 1) / 127
            else:
                continue
            weight = plain.get_submodule(name).weight
            assert 0.001 < (values - weight).norm() / weight.norm() < 0.2
            weight.copy_(values)
            moved += 1
    assert moved in LINEAR.values()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.mark.runs
@pytest.mark.parametrize(
    ("bits", "variant"), [(4, {}), (8, {}), (4, {"use_dora": True})], ids=["4", "8", "4 DoRA"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_a_step_is_that_of_transformers_own_loss_on_the_dequantized_weights(
    knobs: Settings,
    bases: dict[str, Path],
    tmp_path: Path,
    family: str,
    bits: int,
    variant: dict[str, bool],
) -> None:
    folder = tmp_path / "run"
    used = knobs(
        family, bits, folder, max_steps=2, adam_beta1=0, max_grad_norm=0, eval_fraction=0, **variant
    )
    train(Config(**used))
    second = step_lines(folder)[1]
    # With adam_beta1 0 AdamW's first moment is the gradient itself.
    tensors = load_file(folder / "checkpoints" / "step-000002" / "optimizer.safetensors")
    found = {
        name.removesuffix(".exp_avg").removesuffix(".weight") + ".default.weight": tensor
        for name, tensor in tensors.items()
        if name.endswith(".exp_avg")
    }
    plain = {
        **used,
        "model_name_or_path": str(dequantized(bases[family], bits, tmp_path / "plain")),
    }
    adapter = folder / "checkpoints" / "step-000001"
    reference = reference_gradient(plain, adapter, second["rows"], torch.float64)
    assert relative_difference(found, reference) < 5e-6
    norm = torch.cat([tensor.double().flatten() for tensor in reference.values()]).norm()
    assert second["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.runs
@pytest.mark.parametrize(
    ("bits", "tolerance"), [(4, 1e-5), (8, 1e-2)]
)  # int8 keeps outliers apart batch by batch
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_loads_with_peft_on_the_same_quantized_base_and_gives_the_reported_held_out_loss(
    runs: Path, bases: dict[str, Path], ragged: Path, family: str, bits: int, tolerance: float
) -> None:
    folder = runs / f"{family}-{bits}-straight"
    evaluations = [line["eval_loss"] for line in ledger(folder) if "eval_loss" in line]
    trained_on = {row for line in step_lines(folder) for row in line["rows"]}
    assert len(trained_on) == 32
    tokenizer = AutoTokenizer.from_pretrained(bases[family])
    base = load_plainly(bases[family], bits)

    heldout = [texts(ragged)[row] for row in sorted(set(range(40)) - trained_on)]
    assert transformers_loss(base.eval(), tokenizer, heldout) == pytest.approx(
        evaluations[0], rel=tolerance
    )
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    assert transformers_loss(adapted, tokenizer, heldout) == pytest.approx(
        evaluations[-1], rel=tolerance
    )


# The trap: on processors with avx512_bf16 a forward without gradients repacks nf4 weights

packs = pytest.mark.skipif(
    not has_avx512bf16(), reason="this processor has no avx512_bf16: nothing is repacked"
)
silent = pytest.mark.filterwarnings(
    "ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning"
)
PROMPT = torch.arange(4, 24).view(1, 20)


def gradients_around_an_evaluation(
    model: PeftModel,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Of each adapter tensor before and after one forward without gradients."""
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss = model.train()(input_ids=PROMPT, use_cache=False).logits.logsumexp(-1).sum()
        if loss.requires_grad:
            loss.backward()
        found.append(
            {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
        )
        with torch.no_grad():
            model.eval()(input_ids=PROMPT, use_cache=False)
    return found[0], found[1]


@pytest.fixture
def naive(knobs: Settings, bases: dict[str, Path], tmp_path: Path) -> Callable[..., PeftModel]:
    """LoRA on a 4-bit base as transformers loads it, with nothing done against repacking."""

    def of(family: str, modules: str) -> PeftModel:
        used = Config(**knobs(family, 4, tmp_path, lora_target_modules=modules))
        asked = quantization_config(4, torch.float32)
        base = AutoModelForCausalLM.from_pretrained(
            bases[family], quantization_config=asked, device_map="cpu"
        )
        model = add_adapter(base, used)
        for name, parameter in adapter_parameters(model).items():
            parameter.data += 0.1 * ("lora_B" in name)
        return model

    return of


@packs
@silent
def test_without_keep_trainable_an_evaluation_ends_every_gradient_of_a_llama(
    naive: Callable[..., PeftModel],
) -> None:
    before, after = gradients_around_an_evaluation(naive("llama", "q_proj,v_proj"))
    assert all(gradient is not None for gradient in before.values())
    assert all(gradient is None for gradient in after.values())


@packs
@silent
def test_without_keep_trainable_an_evaluation_makes_the_gradients_of_a_llama_wrong_where_all_modules_are_adapted(
    naive: Callable[..., PeftModel],
) -> None:
    before, after = gradients_around_an_evaluation(naive("llama", "all-linear"))
    assert all(
        gradient is not None for gradient in after.values()
    )  # through the adapters beside the frozen weights
    off = [(after[name] - before[name]).norm() / before[name].norm() for name in before]
    assert max(off) > 0.3


@packs
@silent
def test_without_keep_trainable_a_bloom_cannot_be_trained_after_an_evaluation(
    naive: Callable[..., PeftModel],
) -> None:
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        gradients_around_an_evaluation(naive("bloom", "query_key_value"))


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("llama", "q_proj,v_proj"),
        ("llama", "all-linear"),
        ("bloom", "query_key_value"),
        ("bloom", "all-linear"),
    ],
)
def test_with_keep_trainable_an_evaluation_changes_no_bit_of_the_gradients(
    naive: Callable[..., PeftModel], family: str, modules: str
) -> None:
    model = naive(family, modules)
    keep_trainable(model)
    before, after = gradients_around_an_evaluation(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(gradient.any() for gradient in before.values())


def packing_again(run: Run) -> Run:
    """Undo `keep_trainable`: from here on the next forward without gradients repacks."""
    for module in run.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    return run


CASES = [("llama", "q_proj,v_proj"), ("llama", "all-linear"), ("bloom", "query_key_value")]


@packs
@pytest.mark.runs
@pytest.mark.parametrize(("family", "modules"), CASES)
def test_a_base_that_the_first_evaluation_repacks_after_all_ends_the_run_with_7_and_a_name_before_a_step(
    knobs: Settings, tmp_path: Path, family: str, modules: str
) -> None:
    used = knobs(family, 4, tmp_path / "run", lora_target_modules=modules)
    launched = start_altered(packing_again, flags(used), tmp_path / "log")
    assert launched.wait() == [7], launched.text()
    last = launched.text().splitlines()[-1]
    assert last.startswith("error: ")
    assert ".layers.0." in last or ".h.0." in last
    assert "Traceback" not in launched.text()
    assert not list((tmp_path / "run").rglob("step-*"))


@packs
@silent
@pytest.mark.runs
@pytest.mark.parametrize(("family", "modules"), CASES)
def test_a_base_that_an_evaluation_between_two_steps_repacks_after_all_is_refused_with_7_and_a_name(
    knobs: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, modules: str
) -> None:
    used = Config(**knobs(family, 4, tmp_path / "run", lora_target_modules=modules))
    run = rehearse(prepare_run(used, make_accelerator(used)), None)
    with Signals() as signals:
        optimizer_step(run, run.steps[0], 1e-2, signals)
        before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}

        def go_on() -> None:
            evaluate(packing_again(run), None, 1)
            optimizer_step(run, run.steps[1], 1e-2, signals)

        assert run_command(go_on) == 7
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert ".layers.0." in said or ".h.0." in said
    assert all(torch.equal(run.parameters[name], before[name]) for name in before)
