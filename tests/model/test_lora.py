import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, PreTrainedModel

from loop.config.knobs import Config
from loop.data.tokenizer import load_tokenizer
from loop.errors import CheckpointError, ConfigError, HubError
from loop.model import checksum
from loop.model.base import base_config, load_base
from loop.model.checksum import base_checksum, checksum_notice
from loop.model.lora import (
    adapter_config_json,
    adapter_parameters,
    add_adapter,
    census,
    restore_adapter,
)
from tests.conftest import flags
from tests.processes import run, start

Configs = Callable[..., Config]
CPU = torch.device("cpu")
QKV = "base_model.model.transformer.h.{}.self_attention.query_key_value.lora_{}.weight"
BLOOM_LINEAR = ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
PROMPT = torch.arange(4, 24).view(1, 20)

# PEFT's own remark about GPT-2, whose linear modules are transposed; it does what it says.
conv1d = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"
)


def adapted(config: Config) -> PeftModel:
    return add_adapter(load_base(config, CPU), config)


def disturb(model: PeftModel) -> None:
    """LoRA's B is zero at the start: give every tensor of the adapter a value that shows."""
    torch.manual_seed(5)
    for parameter in adapter_parameters(model).values():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)


# What is trained


@pytest.mark.parametrize(
    ("modules", "trained"),
    [
        # r x (inputs + outputs) of each module, hidden size 32, two layers
        ("query_key_value", 2 * 4 * (32 + 96)),
        ("dense", 2 * 4 * (32 + 32)),
        ("dense_4h_to_h,dense_h_to_4h", 2 * 4 * (128 + 32) * 2),
        ("all-linear", 4096),  # the sum of the three
        ("none", 1024),  # PEFT's default for BLOOM is query_key_value
    ],
)
def test_lora_trains_this_many_numbers_of_the_small_bloom(
    config: Configs, modules: str, trained: int
) -> None:
    counted = census(adapted(config(lora_target_modules=modules)))
    assert counted["trained_parameters"] == trained
    # Embedding 384 x 32 with its norm; a layer has 12,704; the last norm. The tied head is not
    # counted again.
    assert counted["all_parameters"] == trained + 384 * 32 + 64 + 2 * 12704 + 64


def test_the_census_names_every_trained_tensor_with_shape_and_dtype(config: Configs) -> None:
    counted = census(adapted(config(lora_target_modules="query_key_value")))
    assert counted["tensors"] == {
        QKV.format(0, "A"): [[4, 32], "float32"],
        QKV.format(0, "B"): [[96, 4], "float32"],
        QKV.format(1, "A"): [[4, 32], "float32"],
        QKV.format(1, "B"): [[96, 4], "float32"],
    }
    assert counted["base_dtypes"] == ["float32"]


def test_bloom_7b1_trains_7864320_of_7076880384_numbers(config: Configs) -> None:
    shape = BloomConfig(hidden_size=4096, n_layer=30, n_head=32, vocab_size=250880)
    with torch.device("meta"):
        base = BloomForCausalLM(shape)
        model = add_adapter(base, config(lora_r=16, lora_target_modules=None))
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad) == 7_864_320
    )  # 30 x 16 x (4,096 + 12,288)
    assert sum(p.numel() for p in model.parameters()) == 7_076_880_384
    assert model.peft_config["default"].target_modules == ["query_key_value"]


def test_the_adapter_is_float32_on_a_bfloat16_base(config: Configs) -> None:
    counted = census(adapted(config(dtype="bfloat16")))
    assert counted["base_dtypes"] == ["bfloat16"]
    assert {dtype for _, dtype in counted["tensors"].values()} == {"float32"}


def test_step_0_starts_at_the_base_exactly_and_at_the_same_adapter_for_the_same_seed(
    config: Configs,
) -> None:
    base, model, same, other = (
        load_base(config(), CPU),
        *(adapted(config(seed=seed)) for seed in (42, 42, 43)),
    )
    assert torch.equal(model.eval()(PROMPT).logits, base.eval()(PROMPT).logits)
    ours, again, different = (adapter_parameters(of) for of in (model, same, other))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert not any(torch.equal(ours[name], different[name]) for name in ours if "lora_A" in name)
    assert not any(parameter.any() for name, parameter in ours.items() if "lora_B" in name)


@pytest.mark.parametrize("of", ["bloom", "llama", pytest.param("gpt2", marks=conv1d)])
def test_all_linear_is_pefts_own_choice(
    config: Configs, request: pytest.FixtureRequest, of: str
) -> None:
    folder = request.getfixturevalue(of)
    ours = adapted(config(model_name_or_path=str(folder)))
    base = AutoModelForCausalLM.from_pretrained(folder)
    theirs = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    trained = [
        {name for name, p in model.named_parameters() if p.requires_grad}
        for model in (ours, theirs)
    ]
    assert trained[0] == trained[1]
    assert len(trained[0]) >= 16


@pytest.mark.parametrize(
    ("of", "modules"),
    [
        ("bloom", ["query_key_value"]),
        pytest.param("gpt2", ["c_attn"], marks=conv1d),
        ("llama", ["q_proj", "v_proj"]),
    ],
)
def test_the_default_modules_are_pefts_for_the_architecture(
    config: Configs, request: pytest.FixtureRequest, of: str, modules: list[str]
) -> None:
    folder = request.getfixturevalue(of)
    assert (
        census(adapted(config(model_name_or_path=str(folder), lora_target_modules=None)))[
            "target_modules"
        ]
        == modules
    )


@pytest.mark.parametrize(
    ("modules", "wrong"),
    [
        ("q_proj", "q_proj"),
        ("query_key_value,q_proj", "q_proj"),
        ("query_key_value,q_proj,v_proj", "q_proj, v_proj"),
        ("query_key", "query_key"),
        ("ln_f", "ln_f"),  # there, but not linear
        ("", ""),
    ],
)
def test_a_wrong_target_module_is_refused_with_the_candidates_even_beside_a_right_one(
    config: Configs, modules: str, wrong: str
) -> None:
    said = f"^lora_target_modules: {wrong} is not in this model; it has dense, .*, query_key_value$"
    with pytest.raises(ConfigError, match=said):
        adapted(config(lora_target_modules=modules))


def test_a_base_that_is_trainable_is_a_bug_and_is_named(config: Configs) -> None:
    model = adapted(config())
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="word_embeddings"):
        adapter_parameters(model)


def test_an_adapter_that_trains_nothing_is_refused(config: Configs) -> None:
    model = adapted(config())
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing is trainable"):
        adapter_parameters(model)


# What is saved


@pytest.mark.parametrize(
    "knobs", [{}, {"use_dora": True}, {"dtype": "bfloat16"}], ids=["LoRA", "DoRA", "bf16 base"]
)
def test_saved_names_and_tensors_are_those_of_pefts_own_save(
    config: Configs, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    model = adapted(config(**knobs))
    disturb(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    ours = adapter_parameters(model)
    assert list(ours) == sorted(theirs)
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize(
    "knobs", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["LoRA", "DoRA", "rsLoRA"]
)
def test_what_is_saved_loads_with_plain_peft_and_gives_the_same_logits(
    config: Configs, bloom: Path, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    model = adapted(config(**knobs)).eval()
    disturb(model)
    (tmp_path / "adapter_config.json").write_bytes(adapter_config_json(model, config(**knobs)))
    tensors = {
        name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(bloom)
    untouched = base(PROMPT).logits
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(PROMPT).logits, model(PROMPT).logits)
    assert not torch.allclose(loaded(PROMPT).logits, untouched, atol=0.01)


def test_adapter_config_is_pefts_with_sorted_keys_and_modules_and_no_place_of_this_machine(
    config: Configs, bloom: Path, tmp_path: Path
) -> None:
    content = adapter_config_json(adapted(config()), config())
    values = json.loads(content)
    assert content.decode() == json.dumps(values, indent=2, sort_keys=True) + "\n"
    assert values["target_modules"] == BLOOM_LINEAR
    assert (values["base_model_name_or_path"], values["revision"]) == (None, None)
    assert not any(
        str(place) in content.decode() for place in (bloom, bloom.parent, Path.home(), Path.cwd())
    )
    (tmp_path / "adapter_config.json").write_bytes(content)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LoraConfig)
    assert (loaded.r, loaded.lora_alpha, loaded.task_type, loaded.bias) == (
        4,
        32,
        "CAUSAL_LM",
        "none",
    )
    assert (loaded.target_modules, loaded.inference_mode) == ({*BLOOM_LINEAR}, True)


def test_adapter_config_does_not_depend_on_the_order_in_which_modules_are_asked_for(
    config: Configs,
) -> None:
    contents = {
        adapter_config_json(adapted(knobs), knobs)
        for order in (BLOOM_LINEAR, BLOOM_LINEAR[::-1], ["all-linear"])
        for knobs in [config(lora_target_modules=",".join(order))]
    }
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("knobs", "scale"),
    [({}, 8.0), ({"use_rslora": True}, 16.0), ({"lora_alpha": 6, "lora_r": 3}, 2.0)],
)
def test_the_update_is_scaled_by_alpha_over_r_or_its_root(
    config: Configs, knobs: dict[str, Any], scale: float
) -> None:
    model = adapted(config(**knobs))
    modules = [
        module
        for module in model.modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    ]
    assert len(modules) == 8
    assert {module.scaling["default"] for module in modules} == {
        scale
    }  # 32 / 4, 32 / sqrt(4), 6 / 3


@pytest.mark.parametrize("knob", ["use_rslora", "use_dora"])
def test_variants_of_lora_are_trained_and_named_in_the_finished_adapter(
    settings: Callable[..., dict[str, Any]], bloom: Path, tmp_path: Path, knob: str
) -> None:
    run(flags(settings(max_steps=2, **{knob: True})), tmp_path / "log")
    finished = tmp_path / "run" / "adapter"
    assert json.loads((finished / "adapter_config.json").read_bytes())[knob] is True
    trained = load_file(finished / "adapter_model.safetensors")
    start_at = adapter_parameters(adapted(Config(**settings(**{knob: True}))))
    assert sorted(trained) == sorted(start_at)
    assert not any(torch.equal(trained[name], start_at[name]) for name in trained)
    assert any("lora_magnitude_vector" in name for name in trained) == (knob == "use_dora")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bloom), finished)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda tensors: tensors.pop(QKV.format(0, "A")), "h.0.*lora_A"),
        (lambda tensors: tensors.update(stranger=torch.zeros(1)), "stranger"),
        (lambda tensors: tensors.update({QKV.format(1, "B"): torch.zeros(4, 96)}), "h.1.*lora_B"),
        (
            lambda tensors: tensors.update({QKV.format(1, "B"): torch.zeros(96, 4).half()}),
            "h.1.*lora_B",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name_and_nothing_is_copied(
    config: Configs, spoil: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    parameters = adapter_parameters(adapted(config(lora_target_modules="query_key_value")))
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    tensors = {name: torch.ones_like(parameter) for name, parameter in before.items()}
    spoil(tensors)
    with pytest.raises(CheckpointError, match=rf"^adapter_model\.safetensors: .*{named}"):
        restore_adapter(parameters, tensors)
    assert all(torch.equal(parameters[name], before[name]) for name in before)


# Gradient checkpointing


@pytest.mark.parametrize("of", ["bloom", "llama", pytest.param("gpt2", marks=conv1d)])
def test_gradient_checkpointing_runs_every_block_twice_and_moves_no_bit(
    config: Configs, request: pytest.FixtureRequest, of: str
) -> None:
    folder = str(request.getfixturevalue(of))
    found = []
    for checkpointing in (False, True):
        model = adapted(
            config(model_name_or_path=folder, gradient_checkpointing=checkpointing)
        ).train()
        disturb(model)
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
        calls: list[int] = []
        for block in blocks:
            next(block.children()).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        logits = model(PROMPT, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        found.append((len(calls), {name: p.grad for name, p in adapter_parameters(model).items()}))
    (plain_calls, plain), (calls_again, checkpointed) = found
    assert (plain_calls, calls_again) == (2, 4)
    for name, gradient in plain.items():
        assert gradient.any()
        assert torch.equal(checkpointed[name], gradient), name


# The base's checksum


def checksum_of_plain(base: PreTrainedModel) -> str:
    """`base_checksum` of a model that has no adapter yet, from its state alone."""
    places: dict[int, str] = {}
    for name, tensor in sorted(base.state_dict().items(), reverse=True):
        content = bytes(tensor.flatten().contiguous().view(torch.uint8).tolist())
        line = f"{name} {list(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()}\n"
        places[tensor.data_ptr()] = line  # a tied tensor counts once, under its first name
    return hashlib.sha256("".join(sorted(places.values())).encode()).hexdigest()


@pytest.fixture(scope="module")
def model(bloom: Path) -> PeftModel:
    knobs = Config(
        model_name_or_path=str(bloom), dataset_name="unused", output_dir="unused", lora_r=2
    )
    return adapted(knobs)


@pytest.mark.parametrize("of", ["bloom", "llama", pytest.param("gpt2", marks=conv1d)])
@pytest.mark.parametrize(
    "knobs",
    [{}, {"lora_target_modules": None, "lora_r": 2}, {"use_dora": True}],
    ids=["all", "default", "DoRA"],
)
def test_base_checksum_is_that_of_the_base_before_any_adapter_was_added(
    config: Configs, request: pytest.FixtureRequest, of: str, knobs: dict[str, Any]
) -> None:
    knobs = {"model_name_or_path": str(request.getfixturevalue(of)), **knobs}
    plain = checksum_of_plain(load_base(config(**knobs), CPU))
    adapter = adapted(config(**knobs))
    assert base_checksum(adapter) == plain
    disturb(adapter)
    assert base_checksum(adapter) == plain


class OnGpu(Tensor):
    """Says of itself that it is on a GPU, and so does every part of it."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("piece", [1, 7, 64, 2**26])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_tensor_of_a_gpu_is_hashed_in_pieces_to_the_same_line(
    monkeypatch: pytest.MonkeyPatch, piece: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = torch.randint(0, 200, shape).to(dtype)
    expected = checksum._checksum_line("weight", tensor)
    empty, buffers = torch.empty, []

    def pinned(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        buffers.append(size)
        return empty(size, dtype=dtype)  # pinned memory needs a GPU

    monkeypatch.setattr(checksum, "_PIECE", piece)
    monkeypatch.setattr(torch, "empty", pinned)
    line = checksum._checksum_line("weight", tensor.as_subclass(OnGpu))
    assert line == expected
    assert buffers == [min(piece, tensor.nbytes)]


@given(data=st.data())
@examples(derandomize=True, max_examples=40, deadline=None)
def test_one_flipped_bit_anywhere_changes_base_checksum(
    model: PeftModel, data: st.DataObject
) -> None:
    before = base_checksum(model)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    content = frozen[data.draw(st.sampled_from(sorted(frozen)))].data.view(-1).view(torch.uint8)
    place, bit = data.draw(st.integers(0, len(content) - 1)), 1 << data.draw(st.integers(0, 7))
    content[place] ^= bit
    changed = base_checksum(model)
    content[place] ^= bit
    assert changed != before
    assert base_checksum(model) == before


def test_two_swapped_words_or_tensors_change_base_checksum(model: PeftModel) -> None:
    before = base_checksum(model)
    first, second = (
        model.get_base_model().transformer.h[i].self_attention.dense.weight.data for i in (0, 1)
    )
    words = first.view(-1).view(torch.int64)
    words[[3, 200]] = words[[200, 3]]
    assert base_checksum(model) != before
    words[[3, 200]] = words[[200, 3]]
    assert base_checksum(model) == before
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)
    assert base_checksum(model) != before
    second.copy_(first)
    first.copy_(kept)
    assert base_checksum(model) == before


def test_another_dtype_is_another_base(config: Configs) -> None:
    assert base_checksum(adapted(config(dtype="bfloat16"))) != base_checksum(adapted(config()))


def test_base_config_leaves_out_where_it_lay_and_what_wrote_it(
    config: Configs, bloom: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(bloom, tmp_path / "moved")
    values = json.loads((moved / "config.json").read_bytes())
    (moved / "config.json").write_text(
        json.dumps({**values, "transformers_version": "0", "_name_or_path": "x"})
    )
    assert base_config(config(model_name_or_path=str(moved))) == base_config(config())
    assert base_config(config())["hidden_size"] == 32


# Bases that cannot be loaded


def _text_file(folder: Path) -> Path:
    (folder.parent / "model.txt").write_text("a model")
    return folder.parent / "model.txt"


def _only_bin(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def _written(name: str, content: bytes) -> Callable[[Path], Path]:
    def spoil(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder

    return spoil


def _truncated(folder: Path) -> Path:
    content = (folder / "model.safetensors").read_bytes()
    return _written("model.safetensors", content[:-100])(folder)


def _without_a_tensor(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("h.1.mlp.dense_h_to_4h.weight"))]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _remote_code(folder: Path) -> Path:
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'canary')!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    return _written(
        "config.json", json.dumps({"model_type": "evil", "auto_map": auto_map}).encode()
    )(folder)


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000000\n"
)
BAD_BASES: dict[str, Callable[[Path], Path]] = {
    "a text file": _text_file,
    "weights only as .bin": _only_bin,
    "an LFS pointer": _written("model.safetensors", POINTER),
    "an error page": _written(
        "model.safetensors", b"<!DOCTYPE html><html>503 Service Unavailable</html>"
    ),
    "an empty file of weights": _written("model.safetensors", b""),
    "truncated weights": _truncated,
    "a tensor is missing": _without_a_tensor,
    "config.json is not JSON": _written("config.json", b"{"),
    "an unknown architecture": _written("config.json", b'{"model_type": "nonesuch"}'),
    "code of the repository": _remote_code,
}


@pytest.mark.parametrize("of", BAD_BASES)
def test_a_folder_that_is_no_base_is_refused_in_one_line_with_exit_code_2(
    config: Configs, bloom: Path, tmp_path: Path, of: str
) -> None:
    name = str(BAD_BASES[of](shutil.copytree(bloom, tmp_path / "base")))
    with pytest.raises(ConfigError) as refused:
        load_base(config(model_name_or_path=name), CPU)
    message = str(refused.value)
    assert message.startswith(f"model_name_or_path: no model in {name}: ")
    assert "\n" not in message
    assert refused.value.exit_code == 2
    assert not (tmp_path / "canary").exists()


def test_a_folder_without_a_tokenizer_is_refused(
    config: Configs, bloom: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(
        bloom, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*", "special*")
    )
    with pytest.raises(ConfigError, match=f"^model_name_or_path: no tokenizer in {folder}: "):
        load_tokenizer(config(model_name_or_path=str(folder)))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-folder"])
def test_a_base_that_is_neither_here_nor_on_a_hub_in_reach_is_refused_in_one_line_with_exit_code_6(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    with pytest.raises(HubError) as refused:
        load_base(Config(**settings(model_name_or_path=name)), CPU)
    assert str(refused.value).startswith(f"model_name_or_path: {name}: ")
    launched = start(flags(settings(model_name_or_path=name)), tmp_path / "log")
    assert launched.wait() == [6], launched.text()
    assert launched.text().splitlines()[-1].startswith(f"error: model_name_or_path: {name}: ")
    assert "Traceback" not in launched.text()


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder"])
def test_a_folder_that_is_not_there_is_refused_and_no_hub_is_asked(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    launched = start(flags(settings(model_name_or_path=name)), tmp_path / "log")
    assert launched.wait() == [2], launched.text()
    said = (
        f"error: model_name_or_path: found no folder {os.path.abspath(name)}; expected one with"
        " safetensors\n"
    )
    assert launched.text() == said


def test_an_adapter_is_not_taken_for_a_base(config: Configs, bloom: Path, tmp_path: Path) -> None:
    model = adapted(config())
    model.base_model.config._name_or_path = str(bloom)
    model.peft_config["default"].base_model_name_or_path = str(bloom)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="it is an adapter"):
        load_base(config(model_name_or_path=str(tmp_path / "adapter")), CPU)


def test_a_checksum_is_announced_where_it_takes_seconds_and_not_for_a_small_base() -> None:
    with torch.device("meta"):
        large = torch.nn.Linear(25_000, 10_001, bias=False)  # 1.00 GB in float32
        small = torch.nn.Linear(25_000, 9_999, bias=False)
    assert checksum_notice(large.requires_grad_(False)) == ["base   1.0 GB: taking its checksum"]
    assert checksum_notice(small.requires_grad_(False)) == []
    assert checksum_notice(large.requires_grad_(True)) == []  # what is trained is not in it
