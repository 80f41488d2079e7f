import json
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import get_scheduler

from loop.config.knobs import Config
from loop.errors import CheckpointError, ConfigError
from loop.update.optim import (
    OPTIMIZERS,
    adamw,
    learning_rate,
    optimizer_tensors,
    restore_optimizer,
    warmup,
)
from tests.conftest import flags
from tests.processes import start, wait_until
from tests.test_train import assert_same_run, step_lines

Configs = Callable[..., Config]
Settings = Callable[..., dict[str, Any]]

# Here and in transformers: the knob, and the name of the schedule with warm-up.
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize(
    ("num_steps", "warmup_steps", "in_steps"),
    [
        (1, 0, 0),
        (7, 0, 0),
        (10, 1, 1),
        (10, 3, 3),
        (10, 10, 10),
        (100, 0.03, 3),
        (101, 0.03, 4),
        (50, 0.5, 25),
    ],
)
@pytest.mark.parametrize("shape", SCHEDULES)
def test_every_step_has_the_learning_rate_of_transformers(
    config: Configs, shape: str, num_steps: int, warmup_steps: float, in_steps: int
) -> None:
    ours = config(
        learning_rate=2e-4, lr_scheduler_type=shape, warmup_steps=warmup_steps, max_steps=None
    )
    assert warmup(ours, num_steps) == in_steps
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    scheduler = get_scheduler(
        SCHEDULES[shape], theirs, num_warmup_steps=in_steps, num_training_steps=num_steps
    )
    for step in range(num_steps):
        assert learning_rate(step, ours, num_steps) == pytest.approx(
            theirs.param_groups[0]["lr"], rel=1e-12, abs=0
        )
        theirs.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("shape", "warmup_steps", "at"),
    [
        # 10 steps, the peak at 8: every value by hand
        ("linear", 0, {0: 8.0, 5: 4.0, 9: 0.8}),
        ("linear", 2, {0: 0.0, 1: 4.0, 2: 8.0, 6: 4.0, 9: 1.0}),
        ("linear", 0.2, {0: 0.0, 1: 4.0, 2: 8.0, 9: 1.0}),
        ("linear", 0.15, {0: 0.0, 1: 4.0, 2: 8.0, 9: 1.0}),  # 1.5 steps are rounded up
        ("constant", 0, {0: 8.0, 9: 8.0}),
        ("constant", 4, {0: 0.0, 1: 2.0, 3: 6.0, 4: 8.0, 9: 8.0}),
        ("cosine", 0, {0: 8.0, 5: 4.0, 9: 0.1957739348193862}),  # 4 (1 + cos 162 degrees)
        (
            "cosine",
            4,
            {0: 0.0, 4: 8.0, 7: 4.0, 9: 0.5358983848622454},
        ),  # 4 (1 + cos 150 degrees) = 4 - 2 sqrt 3
        ("linear", 10, {0: 0.0, 9: 7.2}),
    ],
)
def test_the_learning_rate_at_the_start_the_end_of_warm_up_and_the_last_step(
    config: Configs, shape: str, warmup_steps: float, at: dict[int, float]
) -> None:
    knobs = config(
        learning_rate=8.0, lr_scheduler_type=shape, warmup_steps=warmup_steps, max_steps=10
    )
    for step, rate in at.items():
        assert learning_rate(step, knobs, 10) == pytest.approx(rate, rel=1e-12, abs=0), step


def parameters_of(seed: int) -> dict[str, nn.Parameter]:
    torch.manual_seed(seed)
    return {name: nn.Parameter(torch.randn(3, 4)) for name in ("a.weight", "b.weight")}


def update(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], seed: int
) -> None:
    torch.manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(3, 4)
    optimizer.step()


def test_the_optimizer_takes_every_knob_and_one_group(config: Configs) -> None:
    knobs = config(
        learning_rate=0.5, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3, weight_decay=0.2
    )
    (group,) = adamw(parameters_of(0).values(), knobs).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        0.5,
        (0.8, 0.9),
        1e-3,
        0.2,
    )
    assert len(group["params"]) == 2


def test_one_update_is_adamw_worked_out_by_hand(config: Configs) -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = adamw([parameter], config(learning_rate=0.5, adam_epsilon=1e-12, weight_decay=0.1))
    parameter.grad = torch.tensor([3.0])
    optimizer.step()
    # Decay: 2 (1 - 0.5 x 0.1) = 1.9. The first step of Adam is the learning rate times the
    # gradient's sign.
    assert parameter.item() == pytest.approx(1.4, abs=1e-6)


def test_restored_moments_give_the_next_updates_bit_for_bit(config: Configs) -> None:
    straight, knobs = parameters_of(0), config(weight_decay=0.1)
    optimizer = adamw(straight.values(), knobs)
    for step in range(3):
        update(optimizer, straight, step)
    saved = {
        name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, straight).items()
    }
    resumed = {
        name: nn.Parameter(parameter.detach().clone()) for name, parameter in straight.items()
    }
    restored = adamw(resumed.values(), knobs)
    restore_optimizer(restored, resumed, saved)
    for step in range(3, 6):
        update(optimizer, straight, step)
        update(restored, resumed, step)
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert (
        saved["a.weight.step"].item() == 3
    )  # the tensors that were given are not the ones that are counted on


def test_the_moments_are_named_after_their_tensors_and_there_are_none_before_the_first_update(
    config: Configs,
) -> None:
    parameters = parameters_of(0)
    optimizer = adamw(parameters.values(), config())
    assert optimizer_tensors(optimizer, parameters) == {}
    update(optimizer, parameters, 0)
    tensors = optimizer_tensors(optimizer, parameters)
    moments = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(tensors) == [
        f"{name}.{moment}" for name in ("a.weight", "b.weight") for moment in moments
    ]
    assert torch.allclose(tensors["a.weight.exp_avg"], 0.1 * parameters["a.weight"].grad, atol=1e-7)


def _without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_without("b.weight.exp_avg_sq"), "b.weight.exp_avg_sq"),
        (_without("a.weight.step"), "a.weight.step"),
        (lambda tensors: tensors.clear(), "a.weight.exp_avg"),
        (
            lambda tensors: tensors.update({"c.weight.exp_avg": torch.zeros(3, 4)}),
            "c.weight.exp_avg",
        ),
        (
            lambda tensors: tensors.update({"a.weight.exp_avg": torch.zeros(4, 3)}),
            "of another shape: .*a.weight.exp_avg",
        ),
        (
            lambda tensors: tensors.update({"b.weight.exp_avg_sq": torch.zeros(3)}),
            "of another shape: .*b.weight.exp_avg_sq",
        ),
    ],
)
def test_a_missing_strange_or_misshapen_moment_is_refused_by_name(
    config: Configs, spoil: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    parameters = parameters_of(0)
    optimizer = adamw(parameters.values(), config())
    update(optimizer, parameters, 0)
    tensors = optimizer_tensors(optimizer, parameters)
    spoil(tensors)
    untouched = adamw(parameters.values(), config())
    with pytest.raises(CheckpointError, match=rf"^optimizer\.safetensors: .*{named}"):
        restore_optimizer(untouched, parameters, tensors)


# Moments in 8 bits, and paged ones


def minimised(
    optimizer: type[torch.optim.Optimizer] | Config, size: int, weight_decay: float
) -> tuple[Any, ...]:
    """200 updates on sum of c (x - t)^2 / 2 with curvatures c from 0.1 to 2: the way of x, the
    losses, the state."""
    torch.manual_seed(0)
    x, target, curvature = (
        nn.Parameter(torch.randn(size)),
        torch.randn(size),
        torch.linspace(0.1, 2, size),
    )
    begin = x.detach().clone()
    if isinstance(optimizer, Config):
        made = adamw([x], optimizer)
    else:
        made = optimizer([x], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    losses = []
    for step in range(200):
        made.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        made.zero_grad()
        loss = (curvature * (x - target) ** 2).mean() / 2
        (loss * size).backward()
        made.step()
        losses.append(loss.item())
    return x.detach() - begin, losses, made.state[x]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("size", "dtype", "way_off", "loss_off"),
    [
        (4095, torch.float32, 1e-6, 1e-5),
        (4096, torch.uint8, 0.03, 0.3),
        (10_000, torch.uint8, 0.03, 0.3),
    ],
    ids=["below 4096 numbers in 32 bits", "16 blocks", "40 blocks, the last short"],
)
def test_adamw_in_8_bits_goes_the_way_of_torchs_down_a_quadratic(
    config: Configs,
    size: int,
    dtype: torch.dtype,
    way_off: float,
    loss_off: float,
    weight_decay: float,
) -> None:
    expected, losses, _ = minimised(torch.optim.AdamW, size, weight_decay)
    in_8_bits = config(optim="adamw_bnb_8bit", learning_rate=1.0, weight_decay=weight_decay)
    found, losses_found, state = minimised(in_8_bits, size, weight_decay)
    assert (state["state1"].dtype, state["state2"].dtype) == (dtype, dtype)
    assert (found - expected).norm() / expected.norm() < way_off
    assert losses[-1] < losses[0] / 100
    assert losses_found[-1] == pytest.approx(losses[-1], rel=loss_off)


MIXED = {
    "a.weight": (64, 64),
    "b.weight": (3, 4),
    "c.weight": (70, 100),
}  # 16 blocks, too small for 8 bits, 28 blocks
ON_CPU = "ignore:Paged optimizers are not supported on CPU:UserWarning"
CLASSES = [
    bitsandbytes.optim.AdamW8bit,
    bitsandbytes.optim.PagedAdamW32bit,
    bitsandbytes.optim.PagedAdamW8bit,
]


def mixed_parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in MIXED.items()}


def mixed_update(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], seed: int
) -> None:
    torch.manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.filterwarnings(ON_CPU)
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_restored_state_of_bitsandbytes_gives_the_next_updates_bit_for_bit(
    kind: Callable[..., torch.optim.Optimizer],
) -> None:
    straight = mixed_parameters()
    optimizer = kind(straight.values(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        mixed_update(optimizer, straight, step)
    saved = {
        name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, straight).items()
    }
    resumed = {
        name: nn.Parameter(parameter.detach().clone()) for name, parameter in straight.items()
    }
    restored = kind(resumed.values(), lr=0.1, weight_decay=0.1)
    restore_optimizer(restored, resumed, saved)
    assert all(
        torch.equal(resumed[name], straight[name]) for name in MIXED
    )  # restoring moved nothing
    for step in range(3, 6):
        mixed_update(optimizer, straight, step)
        mixed_update(restored, resumed, step)
        assert all(torch.equal(resumed[name], straight[name]) for name in MIXED)
    ours, theirs = (
        optimizer_tensors(one, of) for one, of in ((restored, resumed), (optimizer, straight))
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert int(ours["a.weight.step"]) == 6


def test_state_in_8_bits_is_two_bytes_a_number_with_two_scales_a_block_and_no_table(
    config: Configs,
) -> None:
    parameters = mixed_parameters()
    optimizer = adamw(parameters.values(), config(optim="adamw_bnb_8bit"))
    assert optimizer_tensors(optimizer, parameters) == {}
    mixed_update(optimizer, parameters, 0)
    found = {
        name: (t.dtype, tuple(t.shape))
        for name, t in optimizer_tensors(optimizer, parameters).items()
    }
    assert found == {
        "a.weight.step": (torch.int64, ()),
        "a.weight.state1": (torch.uint8, (64, 64)),
        "a.weight.state2": (torch.uint8, (64, 64)),
        "a.weight.absmax1": (torch.float32, (16,)),
        "a.weight.absmax2": (torch.float32, (16,)),
        "b.weight.step": (torch.int64, ()),
        "b.weight.state1": (torch.float32, (3, 4)),
        "b.weight.state2": (torch.float32, (3, 4)),
        "c.weight.step": (torch.int64, ()),
        "c.weight.state1": (torch.uint8, (70, 100)),
        "c.weight.state2": (torch.uint8, (70, 100)),
        "c.weight.absmax1": (torch.float32, (28,)),
        "c.weight.absmax2": (torch.float32, (28,)),
    }


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_without("a.weight.state2"), "a.weight.state2"),
        (_without("c.weight.absmax1"), "c.weight.absmax1"),
        (_without("b.weight.step"), "b.weight.step"),
        (
            lambda tensors: tensors.update({"a.weight.state1": torch.zeros(64, 64)}),
            "a.weight.state1",
        ),
        (
            lambda tensors: tensors.update({"b.weight.state1": torch.zeros(3, 4).byte()}),
            "b.weight.state1",
        ),
        (
            lambda tensors: tensors.update({"c.weight.absmax2": torch.zeros(28).double()}),
            "c.weight.absmax2",
        ),
        (lambda tensors: tensors.update({"c.weight.absmax2": torch.zeros(27)}), "c.weight.absmax2"),
        (lambda tensors: tensors.update({"a.weight.step": torch.tensor(1.0)}), "a.weight.step"),
        (lambda tensors: tensors.update({"a.weight.qmap1": torch.zeros(256)}), "a.weight.qmap1"),
    ],
)
def test_state_in_8_bits_that_misses_a_tensor_or_has_one_of_another_dtype_is_refused_by_name(
    config: Configs, spoil: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    parameters, knobs = mixed_parameters(), config(optim="adamw_bnb_8bit", weight_decay=0.1)
    optimizer = adamw(parameters.values(), knobs)
    mixed_update(optimizer, parameters, 0)
    tensors = {
        name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, parameters).items()
    }
    spoil(tensors)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises(CheckpointError, match=rf"^optimizer\.safetensors: .*'{named}'"):
        restore_optimizer(adamw(parameters.values(), knobs), parameters, tensors)
    assert all(torch.equal(parameters[name], before[name]) for name in before)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_paged_optimizer_without_a_gpu_is_refused_with_the_way_out(
    config: Configs, optim: str
) -> None:
    with pytest.raises(
        ConfigError,
        match=f"^optim: {optim} pages GPU memory, and there is no GPU; write adamw_bnb_8b",
    ):
        adamw(parameters_of(0).values(), config(optim=optim))


@pytest.mark.runs
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to page from")
def test_a_paged_optimizer_without_a_gpu_ends_the_run_with_2_and_one_line(
    settings: Settings, tmp_path: Path
) -> None:
    launched = start(flags(settings(optim="paged_adamw_8bit")), tmp_path / "log")
    assert launched.wait() == [2], launched.text()
    assert launched.text().startswith("error: optim: paged_adamw_8bit pages GPU memory")
    assert len(launched.text().splitlines()) == 1
    assert not list((tmp_path / "run").rglob("*.json*"))


@pytest.fixture(scope="module")
def runs(bloom: Path, ragged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same steps with `adamw_bnb_8bit`, in one go, killed in between, and ended early; `torch`
    with torch's AdamW.

    At r=64 half of the adapter's tensors have 4,096 numbers or more."""
    folder = tmp_path_factory.mktemp("runs")
    usual = {
        "model_name_or_path": bloom, "dataset_name": ragged, "max_length": 128, "micro_batch_tokens": 256,
        "global_batch_size": 8, "max_steps": 20, "learning_rate": 0.01, "lora_r": 64, "lora_dropout": 0.1,
        "lora_target_modules": "all-linear", "weight_decay": 0.1, "save_steps": 1, "optim": "adamw_bnb_8bit",
    }  # fmt: skip

    def go(name: str, **changed: Any) -> Any:
        return start(
            flags({**usual, "output_dir": folder / name, **changed}), folder / f"{name}.log"
        )

    both = [go("straight"), go("parted", stop_after_steps=7)]
    assert [launched.wait() for launched in both] == [[0], [0]], "".join(
        launched.text() for launched in both
    )
    killed = go("killed")
    assert wait_until((folder / "killed" / "checkpoints" / "step-000005").exists, killed), (
        killed.text()
    )
    killed.kill()
    assert not (folder / "killed" / "adapter").exists(), "the run ended before it was killed"
    assert go("torch", optim="adamw_torch", stop_after_steps=2).wait() == [0]
    shutil.copytree(folder / "torch", folder / "other")
    rest = [go("killed"), go("parted"), go("other")]
    codes = [launched.wait() for launched in rest]
    assert codes == [[0], [0], [4]], "".join(launched.text() for launched in rest)
    return folder


@pytest.mark.runs
@pytest.mark.parametrize("way", ["killed", "parted"])
def test_adamw_in_8_bits_killed_or_ended_early_and_resumed_is_the_straight_run_bit_for_bit(
    runs: Path, way: str
) -> None:
    assert_same_run(runs / way, runs / "straight")
    last = [
        runs / name / "checkpoints" / "step-000020" / "optimizer.safetensors"
        for name in (way, "straight")
    ]
    assert last[0].read_bytes() == last[1].read_bytes()
    losses = [line["loss"] for line in step_lines(runs / "straight")]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.runs
def test_a_checkpoint_holds_8_bit_moments_of_large_tensors_and_no_table(runs: Path) -> None:
    tensors = load_file(runs / "straight" / "checkpoints" / "step-000020" / "optimizer.safetensors")
    adapter = load_file(runs / "straight" / "adapter" / "adapter_model.safetensors")
    assert not [name for name in tensors if "qmap" in name]
    for name, weight in adapter.items():
        dtype = torch.uint8 if weight.numel() >= 4096 else torch.float32
        assert {tensors[f"{name}.{moment}"].dtype for moment in ("state1", "state2")} == {dtype}
        assert int(tensors[f"{name}.step"]) == 20
    sizes = [weight.numel() >= 4096 for weight in adapter.values()]
    assert 0 < sum(sizes) < len(sizes)


@pytest.mark.runs
def test_a_run_with_torchs_adamw_does_not_go_on_in_8_bits(runs: Path) -> None:
    said = (runs / "other.log").read_text()
    assert "optim was 'adamw_torch', is 'adamw_bnb_8bit'\n" in said
    assert "another output_dir" in said
    assert (runs / "other" / "ledger.jsonl").read_bytes() == (
        runs / "torch" / "ledger.jsonl"
    ).read_bytes()
    found = [json.loads((runs / name / "run.json").read_bytes()) for name in ("other", "torch")]
    assert found[0] == found[1]


def test_each_optimizer_of_the_knob_is_built_and_no_other() -> None:
    assert set(OPTIMIZERS) == set(typing.get_args(typing.get_type_hints(Config)["optim"]))
