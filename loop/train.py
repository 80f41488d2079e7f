"""main -> train -> optimizer_step: the only file with control flow over steps."""

if __name__ == "__main__":  # the imports below take seconds; `start` imports this file by its name
    from loop.process.command import start

    start("train")

import math
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from loop.config.command_line import config_yaml, parse_command_line
from loop.config.knobs import FIELDS, Config
from loop.data.steps import Step
from loop.errors import NonFiniteError, TrainingStateError
from loop.model.checksum import frozen_tensors
from loop.model.lora import adapter_config_json, gradients, restore_adapter
from loop.process.anonymous import anonymous
from loop.process.command import launched_processes
from loop.process.environment import source_commit
from loop.process.kernels import kernels
from loop.process.launch import make_accelerator
from loop.process.memory import forget_peak
from loop.process.signals import Signals
from loop.run.finish import Result, finish, keep_sample, stop
from loop.run.heldout import heldout_loss
from loop.run.prepare import Run, compare_processes, describe, prepare_run, remarks, run_facts
from loop.run.progress import Record
from loop.run.rehearsal import rehearse
from loop.state.checkpoint import Checkpoint, prune_checkpoints, write_checkpoint
from loop.state.files import lock_folder, replace_file
from loop.state.ledger import LedgerPosition
from loop.state.resume import find_checkpoint, inexact
from loop.state.run_json import open_session
from loop.update.optim import learning_rate, optimizer_tensors, restore_optimizer


class Update(NamedTuple):
    """What one optimizer step was, equal on every process."""

    loss: float  # nats per target token, over all processes' targets
    grad_norm: float  # before clipping
    signals: list[float]  # how many processes heard each of process/signals.py::SIGNALS


def optimizer_step(run: Run, step: Step, rate: float, signals: Signals) -> Update:
    """One update of the adapter.

    Raises: NonFiniteError on every process alike, before the adapter or the moments have moved."""
    accelerator, config = run.accelerator, run.config
    # 1. The divisor first: targets of the whole step over all processes, known before any forward.
    scale = 1.0 / step.target_tokens

    while True:
        # 2. Accumulate the gradient of the mean; sum it over processes in one call, with the loss.
        run.optimizer.zero_grad(set_to_none=True)
        losses = []
        for k, batch in step.micro_batches:
            seed_dropout(config.seed, step.step, k)
            loss_sum = run.loss(batch.to(accelerator.device))
            accelerator.backward(loss_sum * (scale * run.loss_scale.value))
            losses.append(loss_sum.detach() * scale)
        behind = torch.cat([torch.stack(losses).sum().view(1), signals.flags(accelerator.device)])
        summed = accelerator.reduce(torch.cat([*gradients(run.parameters), behind]), "sum")
        gradient = summed[: -len(behind)] / run.loss_scale.value
        grad_norm = torch.linalg.vector_norm(gradient)
        numbers = torch.cat([grad_norm.view(1), summed[-len(behind) :]])
        norm, loss, *heard = numbers.tolist()  # the one sync
        overflowed = math.isfinite(loss) and not math.isfinite(norm)
        if not overflowed or not run.loss_scale.can_halve:
            break
        run.loss_scale.halve()  # fp16: once more, same rows, dropout and rate; nothing is skipped

    # 3. Update: refuse what is not finite before anything moves; clip; step.
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFiniteError(_not_finite(step, loss, norm))
    run.loss_scale.count_step()
    trained = set_gradients(run.parameters, gradient)
    if config.max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(trained, config.max_grad_norm, grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()

    # 4. Report what was optimized: the loss over the targets of all processes.
    return Update(loss, norm, heard)


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Which units are dropped is a function of these three, so nothing of it needs saving."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def set_gradients(parameters: dict[str, nn.Parameter], flat: Tensor) -> list[nn.Parameter]:
    """Give each tensor its part of the summed gradient, as a view of it; returns the tensors."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    for parameter, part in zip(parameters.values(), flat.split(sizes)):
        parameter.grad = part.view_as(parameter)
    return list(parameters.values())


def _not_finite(step: Step, loss: float, norm: float) -> str:
    return (
        f"step {step.step}: loss {loss}, gradient norm {norm}, rows {step.rows}: the adapter was"
        " not touched and the last checkpoint is intact; look at these rows, or lower"
        " learning_rate in another output_dir"
    )


def train(config: Config, set_by: dict[str, str] | None = None) -> Result:
    """Train to the end (or `stop_after_steps`), from the newest checkpoint if there is one.

    `set_by` says of each knob who set it, for `config.yaml`. Raises: any LoopError; whatever was
    saved before stays valid. Stopped, after saving, where a signal ended it."""
    accelerator = make_accelerator(config)
    lock = lock_folder(Path(config.output_dir)) if accelerator.is_main_process else nullcontext()
    switches = kernels(config.full_determinism)
    with Signals() as signals, anonymous(), switches, lock as notice:
        run = prepare_run(config, accelerator)
        return train_run(run, signals, set_by or {}, [notice] if notice else [])


def train_run(run: Run, signals: Signals, set_by: dict[str, str], notices: list[str]) -> Result:
    """The loop over steps; what `record` does not guard, all processes do, collectives included."""
    config, accelerator = run.config, run.accelerator
    requested = config.resume_from_checkpoint
    checkpoint, passed_over = find_checkpoint(run.folder, requested, run.identity)
    compare_processes(accelerator, {"checkpoint to go on from": checkpoint and checkpoint.step})
    if checkpoint is not None:
        restore(run, checkpoint)
        if checkpoint.step == run.num_steps:
            return finish(run)
    run = rehearse(run, checkpoint)
    forget_peak(accelerator.device)
    first = checkpoint.step if checkpoint else 0
    last = min(run.num_steps, first + (config.stop_after_steps or run.num_steps))
    for notice in [*notices, *passed_over, *remarks(run)]:
        accelerator.print(notice)
    record = open_record(run, checkpoint, set_by) if accelerator.is_main_process else None
    if checkpoint is None:
        keep_sample(run, "base")
        evaluate(run, record, 0)
    signals.defer()
    on_gpu = accelerator.device.type == "cuda"
    loader = DataLoader(run.steps, sampler=range(first, last), batch_size=None, pin_memory=on_gpu)
    for step in loader:
        rate = learning_rate(step.step, config, run.num_steps)
        update = optimizer_step(run, step, rate, signals)
        done, request = step.step + 1, signals.take(update.signals)
        if record is not None:
            record.step(step, update.loss, update.grad_norm, rate, accelerator.device)
        if done == run.num_steps or (config.eval_steps and done % config.eval_steps == 0):
            evaluate(run, record, done)
        is_due = done == last or done % config.save_steps == 0
        if record is not None and (is_due or request.stop or request.save):
            save(run, record, done)
        if request.stop:
            break
    if record is not None:
        record.close()
    return finish(run) if done == run.num_steps else stop(run, done, request.stop)


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put a verified checkpoint's state into the run. Raises: CheckpointError."""
    tensors = dict(checkpoint.optimizer)
    run.loss_scale.restore(tensors)
    restore_optimizer(run.optimizer, run.parameters, tensors)
    restore_adapter(run.parameters, checkpoint.adapter)


def open_record(run: Run, checkpoint: Checkpoint | None, set_by: dict[str, str]) -> Record:
    """Describe the run, write `config.yaml` and a session into `run.json`, and open the ledger."""
    first_step = checkpoint.step if checkpoint else 0
    fixed, device = run.config.full_determinism, run.accelerator.device.type
    changes = inexact(checkpoint, run.environment, device, fixed) if checkpoint else []
    resumed = [f"resume from step {first_step}, {run.folder / 'checkpoints'}"] if checkpoint else []
    print("\n".join([*describe(run), *resumed]), flush=True)
    for change in changes:
        print(f"not bit-exact from step {first_step}: {change}", flush=True)
    where = {**run.environment, "source_commit": source_commit()}
    open_session(run.folder / "run.json", run_facts(run), where, first_step, changes)
    filled = [name for name in FIELDS if getattr(run.config, name) != getattr(run.requested, name)]
    resolved = config_yaml(run.config, {**set_by, **dict.fromkeys(filled, "found")})
    replace_file(run.folder / "config.yaml", resolved.encode())
    start = checkpoint.ledger if checkpoint else LedgerPosition(0, 0, run.identity_sha256)
    return Record(run.folder, start, first_step, run.num_steps, run.config.logging_steps)


def evaluate(run: Run, record: Record | None, updates: int) -> None:
    """Take the held-out loss after `updates` updates, on all processes, if rows were held out.

    Raises: TrainingStateError by name if a forward without gradients changed a frozen tensor."""
    if len(run.data.heldout) > 0:
        loss = heldout_loss(run.accelerator, run.loss, run.data.heldout, run.steps)
        if record is not None:
            record.evaluation(updates, loss, run.data.counts["heldout_target_tokens"])
    now = frozen_tensors(run.model)
    changed = [name for name, tensor in now.items() if tensor != run.frozen[name]]
    if changed:
        reason = "its shape or dtype changed in a forward; gradients would be wrong or lost"
        raise TrainingStateError(f"{changed[0]}: {reason}")


def save(run: Run, record: Record, step: int) -> None:
    """Write the checkpoint after `step` updates, then prune.

    On the main process alone: no other waits for its disk."""
    checkpoint = Checkpoint(
        step=step,
        identity=run.identity,
        ledger=record.ledger.sync(),
        adapter_config=adapter_config_json(run.model, run.config),
        adapter=dict(run.parameters),
        optimizer={**optimizer_tensors(run.optimizer, run.parameters), **run.loss_scale.tensors()},
        environment=run.environment,
    )
    folder = run.folder / "checkpoints"
    prune_checkpoints(folder, write_checkpoint(folder, checkpoint), run.config.save_total_limit)
    record.pause()


def main(argv: list[str]) -> None:
    """`python -m loop.train`, and with `accelerate launch` in front the same on many processes."""
    command = parse_command_line(argv, launched_processes())
    if command.print_config:
        print(config_yaml(command.config, command.set_by), end="")
    else:
        train(command.config, command.set_by)
