"""fp16's loss scale: it goes the way of torch's GradScaler, repeats where that one skips, and
changes no bit itself."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from loop.config.knobs import Config
from loop.data.batch import Batch
from loop.errors import CheckpointError
from loop.model.lora import causal_lm_of
from loop.model.loss import SummedLoss
from loop.process.command import run_command
from loop.process.launch import make_accelerator
from loop.process.signals import Signals
from loop.run.prepare import Run, prepare_run
from loop.run.rehearsal import rehearse
from loop.train import optimizer_step, train_run
from loop.update.loss_scale import START, LossScale
from tests.conftest import flags
from tests.processes import start, start_altered, wait_until
from tests.test_train import assert_same_run

Configs = Callable[..., Config]
Settings = Callable[..., dict[str, Any]]

OVERFLOWS = 2.0**127
"""Gradients of 2 and more are infinite at this scale in float32; `WILD` has such."""
WILD = {"lora_alpha": 16384, "learning_rate": 1e-6, "lora_dropout": 0.1}


# The scale by itself


@pytest.mark.parametrize(
    ("scale", "finite", "after"),
    [
        # (value, finite_steps, halvings) before and after, by hand
        ((65536.0, 0, 0), True, (65536.0, 1, 0)),
        ((65536.0, 7, 0), False, (32768.0, 0, 1)),
        ((32768.0, 0, 1), False, (16384.0, 0, 2)),
        ((16384.0, 0, 2), True, (16384.0, 1, 0)),
        ((65536.0, 1998, 0), True, (65536.0, 1999, 0)),
        ((65536.0, 1999, 0), True, (131072.0, 0, 0)),
        ((65536.0, 1999, 0), False, (32768.0, 0, 1)),
        ((1.0, 0, 19), False, (0.5, 0, 20)),
    ],
)
def test_a_finite_gradient_counts_and_another_halves(
    scale: tuple[float, int, int], finite: bool, after: tuple[float, int, int]
) -> None:
    changed = LossScale(True, *scale)
    assert changed.can_halve
    changed.count_step() if finite else changed.halve()
    assert (changed.value, changed.finite_steps, changed.halvings) == after


def test_the_twentieth_halving_of_a_step_is_the_last() -> None:
    given_up = LossScale(True, 0.5, 0, 20)
    assert not given_up.can_halve
    given_up.count_step()
    assert given_up.can_halve


def test_a_static_scale_stays_and_repeats_nothing() -> None:
    static = LossScale(False)
    for _ in range(4001):
        assert not static.can_halve
        static.count_step()
    assert static.value == 1.0
    assert static.tensors() == {}


def test_fp16_starts_at_65536() -> None:
    assert START == 65536.0


def pattern() -> list[bool]:
    """Of 7,000 gradients, which are finite: two long calms, single overflows, and several in a
    row."""
    torch.manual_seed(0)
    rough = (torch.rand(500) > 0.1).tolist()
    return [True] * 2500 + rough + [False] * 7 + [True] * 1999 + [False] + [True] * 1993


def test_the_scale_goes_the_way_of_torchs_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu")
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scaler.scale(torch.zeros(1))  # it makes its state at the first use
    ours, theirs = LossScale(True, 65536.0), []
    found = []
    for finite in pattern():
        parameter.grad = torch.tensor([1.0 if finite else math.inf])
        scaler.step(optimizer)
        scaler.update()
        theirs.append(scaler.get_scale())
        ours.count_step() if finite else ours.halve()
        found.append(ours.value)
    assert found == theirs
    assert max(found) == 131072.0
    assert min(found) < 1.0
    assert len(found) == 7000


# In the loop: float32 on the CPU, at scales where the scaled gradient overflows


@pytest.fixture
def families(bloom: Path, llama: Path) -> dict[str, Path]:
    return {"bloom": bloom, "llama": llama}


def forwards_of(run: Run) -> list[int]:
    """Grows by one at each forward in training mode."""
    calls: list[int] = []
    run.loss.register_forward_hook(lambda module, *_: calls.append(1) if module.training else None)
    return calls


def trained(config: Config, scale: LossScale | None = None) -> tuple[Run, int]:
    """The run at its end (or at `stop_after_steps`), and how many forwards it took."""
    with Signals() as signals:
        run = prepare_run(config, make_accelerator(config))
        run = dataclasses.replace(run, loss_scale=scale) if scale else run
        calls = forwards_of(run)
        train_run(run, signals, {}, [])
    return run, len(calls)


@pytest.mark.runs
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_a_step_whose_scaled_gradient_overflows_is_repeated_with_half_the_scale_and_ends_in_the_same_bytes(
    config: Configs, families: dict[str, Path], tmp_path: Path, family: str
) -> None:
    knobs = {**WILD, "model_name_or_path": str(families[family]), "max_steps": 4}
    _, forwards = trained(config(**knobs, output_dir=str(tmp_path / "plain")))
    scaled, more = trained(
        config(**knobs, output_dir=str(tmp_path / "scaled")), LossScale(True, OVERFLOWS)
    )
    halvings = math.log2(OVERFLOWS / scaled.loss_scale.value)
    assert halvings >= 1
    assert halvings == int(halvings)
    assert scaled.loss_scale.finite_steps <= 4
    assert (
        more > forwards
    )  # some micro-batches were done again, with the same units dropped: the bytes are equal
    assert_same_run(tmp_path / "scaled", tmp_path / "plain")
    moments, kept = (
        load_file(tmp_path / name / "checkpoints" / "step-000004" / "optimizer.safetensors")
        for name in ("plain", "scaled")
    )
    assert kept.pop("loss_scale").tolist() == [
        scaled.loss_scale.value,
        scaled.loss_scale.finite_steps,
    ]
    assert moments.keys() == kept.keys()
    assert all(torch.equal(moments[name], kept[name]) for name in moments)


@pytest.mark.runs
@pytest.mark.parametrize("power", [-40, 16, 100])
def test_a_power_of_two_that_does_not_overflow_changes_no_byte_and_repeats_nothing(
    config: Configs, tmp_path: Path, power: int
) -> None:
    _, forwards = trained(config(output_dir=str(tmp_path / "plain"), max_steps=3))
    run, same = trained(
        config(output_dir=str(tmp_path / "scaled"), max_steps=3), LossScale(True, 2.0**power)
    )
    assert (run.loss_scale.value, run.loss_scale.finite_steps) == (2.0**power, 3)
    assert same == forwards
    assert_same_run(tmp_path / "scaled", tmp_path / "plain")


@pytest.mark.runs
def test_the_scale_after_a_growth_in_the_middle_of_a_run_is_in_the_checkpoint(
    config: Configs, tmp_path: Path
) -> None:
    used = config(output_dir=str(tmp_path / "run"), max_steps=3)
    run, _ = trained(used, LossScale(True, 65536.0, finite_steps=1998))
    assert (run.loss_scale.value, run.loss_scale.finite_steps) == (131072.0, 1)
    tensors = load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "optimizer.safetensors")
    assert (tensors["loss_scale"].tolist(), tensors["loss_scale"].dtype) == (
        [131072.0, 1.0],
        torch.float64,
    )


# A gradient that never becomes finite


def refused_step(
    used: Config,
    scale: LossScale,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Run], None] = lambda run: None,
) -> tuple[str, int]:
    """What is said when the first step ends with exit code 7, and how many forwards it took."""
    run = dataclasses.replace(
        rehearse(prepare_run(used, make_accelerator(used)), None), loss_scale=scale
    )
    spoil(run)
    before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    calls = forwards_of(run)
    with Signals() as signals:
        assert run_command(lambda: print(optimizer_step(run, run.steps[0], 1e-3, signals))) == 7
    assert all(torch.equal(run.parameters[name], before[name]) for name in before)
    assert not run.optimizer.state
    return capsys.readouterr().err, len(calls)


@pytest.mark.runs
def test_a_gradient_that_overflows_at_every_scale_ends_with_7_after_20_halvings_and_an_untouched_adapter(
    config: Configs, capsys: pytest.CaptureFixture[str]
) -> None:
    # A budget that holds the whole step: one forward a try.
    used = config(lora_alpha=2**40, micro_batch_tokens=1024, lora_dropout=0.1)
    scale = LossScale(True, OVERFLOWS)
    said, forwards = refused_step(used, scale, capsys)
    assert re.fullmatch(
        r"error: step 0: loss \d+\.\d+, gradient norm (nan|inf), rows \[.*\n", said
    ), said
    assert scale.value == OVERFLOWS / 2**20
    assert forwards == 21  # the step and its 20 repeats


@pytest.mark.runs
@pytest.mark.parametrize("dynamic", [True, False], ids=["fp16", "float32"])
def test_a_loss_that_is_not_finite_is_not_tried_again_at_any_scale(
    config: Configs, llama: Path, capsys: pytest.CaptureFixture[str], dynamic: bool
) -> None:
    def spoil(run: Run) -> None:
        causal_lm_of(run.model).model.layers[1].mlp.down_proj.base_layer.weight.data[3, 5] = (
            math.nan
        )

    scale = LossScale(dynamic)
    used = config(model_name_or_path=str(llama), micro_batch_tokens=1024)
    said, forwards = refused_step(used, scale, capsys, spoil)
    assert said.startswith("error: step 0: loss nan, gradient norm nan, rows [")
    assert len(said.splitlines()) == 1
    assert (scale.value, forwards) == (1.0, 1)


# In a checkpoint


@pytest.mark.runs
def test_a_run_ended_early_goes_on_with_the_halved_scale_and_ends_in_the_same_bytes(
    config: Configs, tmp_path: Path
) -> None:
    knobs = {**WILD, "max_steps": 6}
    straight, _ = trained(
        config(**knobs, output_dir=str(tmp_path / "straight")), LossScale(True, OVERFLOWS)
    )
    parted = config(**knobs, output_dir=str(tmp_path / "parted"))
    first, _ = trained(dataclasses.replace(parted, stop_after_steps=2), LossScale(True, OVERFLOWS))
    assert first.loss_scale.value < OVERFLOWS
    # The checkpoint's scale and count win over what the second start begins with.
    second, _ = trained(parted, LossScale(True, 1.0, finite_steps=1000))
    assert second.loss_scale == straight.loss_scale
    assert_same_run(tmp_path / "parted", tmp_path / "straight")
    last = [
        tmp_path / name / "checkpoints" / "step-000006" / "optimizer.safetensors"
        for name in ("parted", "straight")
    ]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_what_is_saved_of_a_scale_comes_back() -> None:
    kept = LossScale(True, 2.0**-3, finite_steps=1234).tensors()
    assert list(kept) == ["loss_scale"]
    found = LossScale(True, 65536.0)
    others = {"a.exp_avg": torch.zeros(1), **kept}
    found.restore(others)
    assert (found.value, found.finite_steps, found.halvings) == (0.125, 1234, 0)
    assert list(others) == ["a.exp_avg"]  # the rest is the optimizer's


def test_a_static_scale_neither_keeps_nor_takes_anything() -> None:
    tensors: dict[str, Tensor] = {"a.exp_avg": torch.zeros(1)}
    LossScale(False).restore(tensors)
    assert list(tensors) == ["a.exp_avg"]


@pytest.mark.runs
def test_a_checkpoint_without_the_scale_is_refused_by_name(config: Configs, tmp_path: Path) -> None:
    used = config(output_dir=str(tmp_path / "run"), max_steps=2, stop_after_steps=1)
    trained(used)  # without fp16, so without a scale
    with pytest.raises(CheckpointError, match=r"^optimizer\.safetensors: loss_scale is missing$"):
        trained(used, LossScale(True, 65536.0))


@pytest.mark.runs
def test_a_checkpoint_with_a_scale_is_refused_by_name_where_none_is_used(
    config: Configs, tmp_path: Path
) -> None:
    used = config(output_dir=str(tmp_path / "run"), max_steps=2, stop_after_steps=1)
    trained(used, LossScale(True, 65536.0))
    with pytest.raises(CheckpointError, match=r"^optimizer\.safetensors: .*'loss_scale'"):
        trained(used)


def scaled_until_it_overflows(run: Run) -> Run:
    return dataclasses.replace(run, loss_scale=LossScale(True, OVERFLOWS))


@pytest.mark.runs
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_halves_its_scale_killed_and_resumed_is_the_straight_run_bit_for_bit(
    settings: Settings, tmp_path: Path, num_processes: int
) -> None:
    knobs = {**WILD, "max_steps": 16, "save_steps": 1}
    straight, killed = (
        settings(**knobs, output_dir=str(tmp_path / name)) for name in ("straight", "killed")
    )
    launched = start_altered(
        scaled_until_it_overflows, flags(straight), tmp_path / "log", num_processes
    )
    assert launched.wait() == [0] * num_processes, launched.text()
    first = start_altered(
        scaled_until_it_overflows, flags(killed), tmp_path / "first", num_processes
    )
    assert wait_until((tmp_path / "killed" / "checkpoints" / "step-000003").exists, first), (
        first.text()
    )
    first.kill()
    assert not (tmp_path / "killed" / "adapter").exists(), "the run ended before it was killed"
    again = start_altered(
        scaled_until_it_overflows, flags(killed), tmp_path / "again", num_processes
    )
    assert again.wait() == [0] * num_processes, again.text()
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    states = [
        load_file(tmp_path / name / "checkpoints" / "step-000016" / "optimizer.safetensors")
        for name in ("killed", "straight")
    ]
    assert torch.equal(states[0]["loss_scale"], states[1]["loss_scale"])
    assert states[0]["loss_scale"][0] < OVERFLOWS


# Half precision for real


class Half(SummedLoss):
    """The loss under fp16 autocast, which accelerate gives only on a GPU."""

    def forward(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return super().forward(batch)


@pytest.fixture
def first_step(
    config: Configs, families: dict[str, Path]
) -> Iterator[Callable[..., tuple[Run, dict[str, Tensor]]]]:
    """The first step of an adapter whose B is not zero: the run after it, and its gradient."""
    with Signals() as signals:

        def of(family: str, half: bool, scale: LossScale) -> tuple[Run, dict[str, Tensor]]:
            used = config(model_name_or_path=str(families[family]), max_grad_norm=0)
            run = prepare_run(used, make_accelerator(used))
            torch.manual_seed(1)
            for parameter in run.parameters.values():
                parameter.data += 0.02 * torch.randn_like(parameter)
            loss = Half(run.model, causal_lm_of(run.model)).train() if half else run.loss
            loss.padding_free = run.loss.padding_free
            run = dataclasses.replace(run, loss=loss, loss_scale=scale)
            optimizer_step(run, run.steps[0], 1e-3, signals)
            return run, {name: parameter.grad for name, parameter in run.parameters.items()}

        yield of


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    flat, wanted = (
        torch.cat([tensor.flatten() for tensor in of.values()]) for of in (found, expected)
    )
    return float((flat - wanted).norm() / wanted.norm())


@pytest.mark.runs
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_an_fp16_gradient_overflows_at_a_large_scale_and_after_halving_agrees_with_float32(
    first_step: Callable[..., tuple[Run, dict[str, Tensor]]], family: str
) -> None:
    _, exact = first_step(family, False, LossScale(False))
    run, halved = first_step(family, True, LossScale(True, 2.0**24))
    assert 2.0**10 < run.loss_scale.value < 2.0**24
    assert difference(halved, exact) < 1e-2
    _, vanished = first_step(family, True, LossScale(False, 2.0**-12))
    assert difference(vanished, exact) > 5 * difference(halved, exact)  # what the scale is for


# fp16 without a GPU

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
@pytest.mark.runs
@pytest.mark.parametrize("more", [{}, {"ACCELERATE_USE_CPU": "true"}], ids=["", "CPU asked for"])
def test_fp16_on_a_machine_without_a_gpu_ends_with_2_and_one_sentence(
    settings: Settings, tmp_path: Path, more: dict[str, str]
) -> None:
    environment = {"ACCELERATE_MIXED_PRECISION": "fp16", **more}
    launched = start(flags(settings()), tmp_path / "log", environment=environment)
    assert launched.wait() == [2], launched.text()
    assert launched.text().startswith(
        "error: mixed_precision: fp16 is for a GPU and torch sees none; "
    )
    assert len(launched.text().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@no_gpu
@pytest.mark.runs
def test_a_float16_base_without_fp16_ends_with_2_before_the_base_is_looked_for(
    settings: Settings, tmp_path: Path
) -> None:
    launched = start(
        flags(settings(dtype="float16", model_name_or_path="nobody/nothing")), tmp_path / "log"
    )
    assert launched.wait() == [2], launched.text()  # 6 if it had looked for the model first
    assert launched.text().startswith("error: dtype: float16 needs mixed_precision: fp16")
    assert len(launched.text().splitlines()) == 1
