from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from loop.config import Config
from loop.errors import CheckpointError
from loop.optim import adamw, learning_rate, optimizer_tensors, restore_optimizer, warmup

Configs = Callable[..., Config]

# Here and in transformers: the knob, and the name of the schedule with warm-up.
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.parametrize(
    ("num_steps", "warmup_steps", "in_steps"),
    [(1, 0, 0), (7, 0, 0), (10, 1, 1), (10, 3, 3), (10, 10, 10), (100, 0.03, 3), (101, 0.03, 4), (50, 0.5, 25)],
)
@pytest.mark.parametrize("shape", SCHEDULES)
def test_every_step_has_the_learning_rate_of_transformers(
    config: Configs, shape: str, num_steps: int, warmup_steps: float, in_steps: int
) -> None:
    ours = config(learning_rate=2e-4, lr_scheduler_type=shape, warmup_steps=warmup_steps, max_steps=None)
    assert warmup(ours, num_steps) == in_steps
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    scheduler = get_scheduler(SCHEDULES[shape], theirs, num_warmup_steps=in_steps, num_training_steps=num_steps)
    for step in range(num_steps):
        assert learning_rate(step, ours, num_steps) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12, abs=0)
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
        ("cosine", 4, {0: 0.0, 4: 8.0, 7: 4.0, 9: 0.5358983848622454}),  # 4 (1 + cos 150 degrees) = 4 - 2 sqrt 3
        ("linear", 10, {0: 0.0, 9: 7.2}),
    ],
)
def test_the_learning_rate_at_the_start_the_end_of_warm_up_and_the_last_step(
    config: Configs, shape: str, warmup_steps: float, at: dict[int, float]
) -> None:
    knobs = config(learning_rate=8.0, lr_scheduler_type=shape, warmup_steps=warmup_steps, max_steps=10)
    for step, rate in at.items():
        assert learning_rate(step, knobs, 10) == pytest.approx(rate, rel=1e-12, abs=0), step


def parameters_of(seed: int) -> dict[str, nn.Parameter]:
    torch.manual_seed(seed)
    return {name: nn.Parameter(torch.randn(3, 4)) for name in ("a.weight", "b.weight")}


def update(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(3, 4)
    optimizer.step()


def test_the_optimizer_takes_every_knob_and_one_group(config: Configs) -> None:
    knobs = config(learning_rate=0.5, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3, weight_decay=0.2)
    (group,) = adamw(parameters_of(0).values(), knobs).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.9), 1e-3, 0.2)
    assert len(group["params"]) == 2


def test_one_update_is_adamw_worked_out_by_hand(config: Configs) -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = adamw([parameter], config(learning_rate=0.5, adam_epsilon=1e-12, weight_decay=0.1))
    parameter.grad = torch.tensor([3.0])
    optimizer.step()
    # Decay: 2 (1 - 0.5 x 0.1) = 1.9. The first step of Adam is the learning rate times the gradient's sign.
    assert parameter.item() == pytest.approx(1.4, abs=1e-6)


def test_restored_moments_give_the_next_updates_bit_for_bit(config: Configs) -> None:
    straight, knobs = parameters_of(0), config(weight_decay=0.1)
    optimizer = adamw(straight.values(), knobs)
    for step in range(3):
        update(optimizer, straight, step)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, straight).items()}
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in straight.items()}
    restored = adamw(resumed.values(), knobs)
    restore_optimizer(restored, resumed, saved)
    for step in range(3, 6):
        update(optimizer, straight, step)
        update(restored, resumed, step)
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert saved["a.weight.step"].item() == 3  # the tensors that were given are not the ones that are counted on


def test_the_moments_are_named_after_their_tensors_and_there_are_none_before_the_first_update(config: Configs) -> None:
    parameters = parameters_of(0)
    optimizer = adamw(parameters.values(), config())
    assert optimizer_tensors(optimizer, parameters) == {}
    update(optimizer, parameters, 0)
    tensors = optimizer_tensors(optimizer, parameters)
    moments = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(tensors) == [f"{name}.{moment}" for name in ("a.weight", "b.weight") for moment in moments]
    assert torch.allclose(tensors["a.weight.exp_avg"], 0.1 * parameters["a.weight"].grad, atol=1e-7)


def _without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_without("b.weight.exp_avg_sq"), "b.weight.exp_avg_sq"),
        (_without("a.weight.step"), "a.weight.step"),
        (lambda tensors: tensors.clear(), "a.weight.exp_avg"),
        (lambda tensors: tensors.update({"c.weight.exp_avg": torch.zeros(3, 4)}), "c.weight.exp_avg"),
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
