"""A run, ready for its first step: model, data, optimizer, and the identity that names it."""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from loop.config.knobs import Config
from loop.data.collate import collate
from loop.data.examples import Data, load_data
from loop.data.order import ORDER_VERSION, num_positions, num_steps
from loop.data.steps import Steps
from loop.data.tokenizer import load_tokenizer, tokenizer_sha256
from loop.errors import ConfigError, DataError, LoopError
from loop.model.base import base_commit, base_config, base_dtype, load_base
from loop.model.body import check_padding_free
from loop.model.checksum import base_checksum, checksum_notice, frozen_tensors
from loop.model.lora import (
    adapter_parameters,
    add_adapter,
    causal_lm_of,
    census,
    leave_inputs_to_autocast,
)
from loop.model.loss import SummedLoss, check_head
from loop.process.environment import environment
from loop.process.memory import in_memory
from loop.state.checkpoint import serialize
from loop.state.files import canonical_json, prepare_folder, sha256
from loop.update.loss_scale import START, LossScale
from loop.update.optim import adamw, warmup


@dataclass(frozen=True)
class Run:
    """Everything that a step needs; equal on every process but for its share of `steps`."""

    config: Config
    requested: Config
    """As given; `config` has the commits and, after the rehearsal, the number that `auto` is."""
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    data: Data
    model: PeftModel
    loss: SummedLoss
    loss_scale: LossScale
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    steps: Steps
    identity: dict[str, Any]
    """What may not change in a resume; its sha256 is the ledger's first `prev`."""
    frozen: dict[str, tuple[torch.Size, torch.dtype]]  # of every tensor that may not change
    packing: str  # how rows are laid out, in words
    environment: dict[str, Any]
    """What a resume may change, and then is not bit-exact: versions, code, processes, threads,
    device, and the announced knobs, as they were at the start."""

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def num_steps(self) -> int:
        return num_steps(self.steps.positions, self.steps.global_batch_size)

    @property
    def identity_sha256(self) -> str:
        return sha256(canonical_json(self.identity))


def prepare_run(config: Config, accelerator: Accelerator) -> Run:
    """Load everything and compare the processes; the run's folder is made, probed and swept.

    Raises: any LoopError."""
    if accelerator.is_main_process:
        prepare_folder(Path(config.output_dir))
        prepare_folder(Path(config.output_dir) / "checkpoints")
    if not sys.stderr.isatty() or not accelerator.is_main_process:
        disable_progress_bar()
    requested, config = config, _with_dtype_and_commit(config, accelerator)
    tokenizer = load_tokenizer(config)
    with accelerator.main_process_first():  # one process tokenizes, the others read its cache
        data = load_data(config, tokenizer)
    config = replace(config, dataset_revision=data.commit or config.dataset_revision)
    if config.micro_batch_tokens != "auto" and data.longest > config.micro_batch_tokens:
        sizes = f"{config.micro_batch_tokens} cannot hold the longest row, {data.longest} tokens"
        raise ConfigError(f"micro_batch_tokens: {sizes}; raise it, or lower max_length")
    with in_memory(f"the base in {config.base_bits} bits", "load_in_4bit, or a smaller base, does"):
        model = add_adapter(load_base(config, accelerator.device), config)
    _check_rows_fit(data, model)
    loss, packing = _prepare_loss(accelerator, config, model, data)
    parameters = adapter_parameters(model)
    identity = _identity(config, accelerator, data, model, loss)
    announced = {**environment(accelerator), **config.knobs("announced")}
    _compare_starts(accelerator, config, identity, announced, parameters)
    fp16 = accelerator.mixed_precision == "fp16"
    run = Run(
        config=config,
        requested=requested,
        accelerator=accelerator,
        tokenizer=tokenizer,
        data=data,
        model=model,
        loss=loss,
        loss_scale=LossScale(True, START) if fp16 else LossScale(False),
        parameters=parameters,
        optimizer=adamw(parameters.values(), config),
        steps=_steps(config, data, loss.padding_free, accelerator),
        identity=identity,
        frozen=frozen_tensors(model),
        packing=packing,
        environment=announced,
    )
    if warmup(config, run.num_steps) > run.num_steps:
        raise ConfigError(
            f"warmup_steps: {config.warmup_steps:g} is longer than the run of {run.num_steps} steps"
        )
    return run


def _with_dtype_and_commit(config: Config, accelerator: Accelerator) -> Config:
    """The config with the base's dtype and its commit on the Hub: all files are of one state."""
    precision = accelerator.mixed_precision
    config = replace(config, dtype=config.dtype or base_dtype(accelerator.device, precision))
    if precision != "fp16" and config.dtype == "float16":
        raise ConfigError(
            "dtype: float16 needs mixed_precision: fp16, as in launch_configs/one_gpu_fp16.yaml"
        )
    return replace(config, model_revision=base_commit(config) or config.model_revision)


def _steps(config: Config, data: Data, padding_free: bool, accelerator: Accelerator) -> Steps:
    return Steps(
        examples=data.train,
        positions=num_positions(
            len(data.train), config.num_train_epochs, config.max_steps, config.global_batch_size
        ),
        global_batch_size=config.global_batch_size,
        # 0 until the rehearsal has found what `auto` is.
        micro_batch_tokens=0 if config.micro_batch_tokens == "auto" else config.micro_batch_tokens,
        seed=config.seed,
        padding_free=padding_free,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def _compare_starts(
    accelerator: Accelerator,
    config: Config,
    identity: dict[str, Any],
    announced: dict[str, Any],
    parameters: dict[str, nn.Parameter],
) -> None:
    """All that has to be the same on every process before step 0.

    Raises: LoopError, on every process alike."""
    # Not the folder's name: each machine may reach the same folder by another.
    knobs = {**config.knobs("announced", "free"), "output_dir": None}
    facts = {"identity": identity, "knobs": knobs, "device": announced["device"]}
    facts["versions"] = [announced["versions"], announced["source_sha256"]]
    facts["adapter at the start"] = sha256(serialize(dict(parameters)))
    compare_processes(accelerator, facts)


def _prepare_loss(
    accelerator: Accelerator, config: Config, model: PeftModel, data: Data
) -> tuple[SummedLoss, str]:
    """The one prepared module, and in words how rows are laid out for it.

    Real rows, before any training, show whether head(hidden) is this model's logits, and whether
    packed rows leave its hidden states as they are."""
    causal_lm, device = causal_lm_of(model), accelerator.device
    if accelerator.mixed_precision != "no":
        leave_inputs_to_autocast(model)
    # Device and autocast. evaluation_mode: no DDP, whose buckets make a resume on 3 inexact.
    loss: SummedLoss = accelerator.prepare_model(SummedLoss(model, causal_lm), evaluation_mode=True)
    exact = accelerator.mixed_precision == "no" and next(loss.parameters()).dtype.itemsize >= 4
    shortest = data.train.read(np.array([data.train.lengths.argmin()]))
    row = collate(shortest, padding_free=False)  # own logits are of every token
    with accelerator.autocast():
        check_head(loss.eval(), row.to(device), tolerance=1e-4 if exact else 1e-2)
    loss.fused = config.fused_loss
    if loss.own_logits:
        return loss.train(), "padded rows, its own logits at their memory: head(hidden) is not them"
    if not config.padding_free:
        return loss.train(), "padded rows, as asked"
    # The longest too: a window of attention shows only where a row exceeds it.
    widest = max((data.train, data.heldout), key=lambda part: part.lengths.max(initial=0))
    ends = widest.read(np.array([widest.lengths.argmax()])) + shortest
    padded, free = (collate(ends, padding_free).to(device) for padding_free in (False, True))
    tolerance = 1e-4 if exact else 5e-2
    with accelerator.autocast():
        difference = check_padding_free(causal_lm, padded, free, tolerance)
    loss.padding_free = difference < tolerance
    if loss.padding_free:
        agreement = f"hidden states within {difference:.0e} of its own forward"
        return loss.train(), f"rows end to end, no padding; {agreement}"
    reason = f"without padding its hidden states are {difference:.0e} off its own forward"
    if difference == math.inf:
        reason = "there is no other layout for this model and rows of this length"
    return loss.train(), f"padded rows: {reason}"


def _check_rows_fit(data: Data, model: PeftModel) -> None:
    """Raises: DataError for a token without an embedding, ConfigError for a row too long."""
    embeddings = model.get_input_embeddings().num_embeddings
    if data.largest_token_id >= embeddings:
        reason = f"the model has {embeddings} embeddings; another tokenizer?"
        raise DataError(f"token id {data.largest_token_id}: {reason}")
    context = getattr(causal_lm_of(model).config, "max_position_embeddings", None)
    if context is not None and data.longest > context:
        reason = f"a row has {data.longest} tokens, the model takes {context}"
        raise ConfigError(f"max_length: {reason}; lower max_length")


def run_facts(run: Run) -> dict[str, Any]:
    """The part of `run.json` that is a function of the run, not of a session."""
    commit = None if Path(run.config.model_name_or_path).exists() else run.config.model_revision
    base = {"name": _public_name(run.config.model_name_or_path), "commit": commit}
    dataset = {"name": _public_name(run.config.dataset_name), "commit": run.data.commit}
    return {
        "identity": run.identity,
        "identity_sha256": run.identity_sha256,
        "base": {**base, "tokenizer_sha256": tokenizer_sha256(run.tokenizer)},
        "data": {**dataset, "counts": run.data.counts, "templates": run.data.templates},
        "census": census(run.model),
        "num_steps": run.num_steps,
    }


def unpinned(requested: Config, used: Config) -> list[str]:
    """A notice for a base or dataset of the Hub whose revision may be another commit tomorrow."""
    revisions = [
        (knob, getattr(requested, knob), getattr(used, knob))
        for knob in ("model_revision", "dataset_revision")
    ]
    return [
        f"not pinned: {knob} {name or 'main'} is commit {commit} today;"
        f" write {knob}: {commit} to repeat this run"
        for knob, name, commit in revisions
        if name != commit
    ]


def remarks(run: Run) -> list[str]:
    """What a person should hear before a run like this one."""
    precision, dtype = run.accelerator.mixed_precision, run.config.dtype
    lines = unpinned(run.requested, run.config)
    if precision != "no" and dtype == "float32":
        low = {"bf16": "bfloat16", "fp16": "float16"}[precision]
        cost = f"a second copy of every weight, in {low}, is kept for the backward"
        lines.append(f"dtype: float32 under {precision}: {cost}; dtype: {low} needs none")
    return lines


def describe(run: Run) -> list[str]:
    """The run in four lines, for a person."""
    config, counts, accelerator = run.config, run.data.counts, run.accelerator
    trained = census(run.model)
    dropped = counts["dropped_without_target"] + counts["dropped_too_long"]
    numbers = f"{trained['trained_parameters']:,} of {trained['all_parameters']:,} parameters"
    share = trained["trained_parameters"] / trained["all_parameters"]
    epochs = run.steps.positions / len(run.data.train)
    fate = (
        f"{dropped:,} dropped, {counts['truncated']:,} truncated,"
        f" {counts['duplicate_train_rows']:,} duplicates"
    )
    tokens = f"{counts['train_target_tokens']:,} target tokens"
    rows = f"{len(run.data.train):,} rows with {tokens} to train on"
    if counts["heldout_rows_also_in_train"]:
        fate += f", {counts['heldout_rows_also_in_train']:,} held-out rows also in train"
    modules = ", ".join(trained["target_modules"])
    return [
        (
            f"data   {_public_name(config.dataset_name)} as {' -> '.join(run.data.templates)!r}:"
            f" {rows}, {len(run.data.heldout):,} held out, {fate}"
        ),
        (
            f"model  {_public_name(config.model_name_or_path)}:"
            f" frozen in {', '.join(trained['base_dtypes'])},"
            f" checksum {run.identity['base_checksum'][:12]}; {run.packing}"
        ),
        f"LoRA   r={config.lora_r} on {modules}: trains {numbers} ({share:.3%})",
        (
            f"steps  {run.num_steps:,} of {config.global_batch_size} rows, {epochs:.2f} epochs;"
            f" {accelerator.device.type},"
            f" {accelerator.num_processes} x {torch.get_num_threads()} threads,"
            f" precision {accelerator.mixed_precision}"
        ),
    ]


def _identity(
    config: Config, accelerator: Accelerator, data: Data, model: PeftModel, loss: SummedLoss
) -> dict[str, Any]:
    """What files and models hold, not their names: a moved folder is still the same run."""
    trained = census(model)
    return {
        **config.knobs("identity"),
        "base_checksum": announced_checksum(accelerator, model),
        "base_config_sha256": sha256(canonical_json(base_config(config))),
        "base_dtypes": trained["base_dtypes"],
        "data_fingerprint": data.fingerprint,
        "lora_target_modules": trained["target_modules"],
        "mixed_precision": accelerator.mixed_precision,
        "order_version": ORDER_VERSION,
        "own_logits": loss.own_logits,
        "padding_free": loss.padding_free,
    }


def announced_checksum(accelerator: Accelerator, model: PeftModel, when: str = "") -> str:
    """`base_checksum`, said beforehand where it takes seconds, which would look like a hang."""
    for notice in checksum_notice(model):
        accelerator.print(f"{notice}{when}", flush=True)
    return base_checksum(model)


def compare_processes(accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """One gather: do all processes agree on these? Raises: LoopError, on every process alike."""
    digests = [list(bytes.fromhex(sha256(canonical_json(fact)))) for fact in facts.values()]
    own = torch.tensor([digests], device=accelerator.device)
    gathered = accelerator.gather(own)  # (processes, facts, 32 bytes)
    for process, theirs in enumerate(gathered):
        for name, its, first in zip(facts, theirs, gathered[0]):
            if not torch.equal(its, first):
                difference = f"process {process} differs from process 0 in its {name}"
                raise LoopError(f"{difference}; all must have the same")


def _public_name(name: str) -> str:
    """A folder or file by its last part only: one machine's folders are nobody's provenance."""
    return Path(name).name if Path(name).exists() else name
