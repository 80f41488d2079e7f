"""A run, ready for its first step: model, data, optimizer, and the identity that names it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from loop.batch import Batch
from loop.checkpoint import serialise
from loop.collate import collate
from loop.config import Config
from loop.data import Data, Examples, load_data
from loop.errors import ConfigError, DataError, LoopError
from loop.files import canonical_json, prepare_folder, sha256
from loop.loss import SummedLoss, check_head
from loop.model import (
    adapter_parameters,
    add_adapter,
    base_checksum,
    base_config,
    causal_lm_of,
    census,
    load_base,
    load_tokenizer,
)
from loop.optim import adamw, warmup
from loop.order import ORDER_VERSION, num_positions, num_steps
from loop.record import environment
from loop.steps import Steps


@dataclass(frozen=True)
class Run:
    """Everything that a step needs. Equal on every process but for the process's share of `steps`."""

    config: Config
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    data: Data
    model: PeftModel
    loss: SummedLoss
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    steps: Steps
    num_steps: int
    census: dict[str, Any]
    identity: dict[str, Any]
    """What may not change in a resume; its sha256 is the ledger's first `prev`."""
    environment: dict[str, Any]
    """What may, and then is not bit-exact: versions, processes, threads, device, the cut. As they were at the start."""

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def identity_sha256(self) -> str:
        return sha256(canonical_json(self.identity))


def prepare_run(config: Config, accelerator: Accelerator) -> Run:
    """Load everything and compare the processes. The run directory is only probed, and swept of leftovers.

    Raises: any LoopError."""
    if accelerator.is_main_process:
        prepare_folder(Path(config.output_dir))
        prepare_folder(Path(config.output_dir) / "checkpoints")
    if not sys.stderr.isatty() or not accelerator.is_main_process:
        disable_progress_bar()
    tokenizer = load_tokenizer(config)
    with accelerator.main_process_first():  # one process tokenises, the others read its cache
        data = load_data(config, tokenizer)
    model = add_adapter(load_base(config, accelerator.device), config)
    embeddings = model.get_input_embeddings().num_embeddings
    if data.largest_token_id >= embeddings:
        raise DataError(f"token id {data.largest_token_id}: the model has {embeddings} embeddings; another tokenizer?")
    context = getattr(causal_lm_of(model).config, "max_position_embeddings", None)
    longest = max(int(part.lengths.max(initial=0)) for part in (data.train, data.heldout))
    if context is not None and longest > context:
        raise ConfigError(f"max_length: a row has {longest} tokens, the model takes {context}; lower max_length")
    # evaluation_mode: device and autocast, no DDP, whose buckets would make a resume on 3 processes inexact.
    loss = accelerator.prepare_model(SummedLoss(model, causal_lm_of(model)), evaluation_mode=True).train()
    parameters = adapter_parameters(model)
    optimizer = accelerator.prepare_optimizer(adamw(parameters.values(), config))
    trained = census(model)
    identity = _identity(config, accelerator, data, model, trained)
    here = {**environment(accelerator), **config.with_resume("announced")}
    knobs = {**config.with_resume("announced", "free"), "output_dir": None}
    facts = {"identity": identity, "knobs": knobs, "versions": [here["versions"], here["source_sha256"]]}
    compared = {name: canonical_json(fact) for name, fact in facts.items()}
    compare_processes(accelerator, {**compared, "adapter at the start": serialise(dict(parameters))})
    positions = num_positions(len(data.train), config.num_train_epochs, config.max_steps, config.global_batch_size)
    steps = Steps(
        examples=data.train,
        positions=positions,
        global_batch_size=config.global_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
        pad_token_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    total = num_steps(positions, config.global_batch_size)
    if warmup(config, total) > total:
        raise ConfigError(f"warmup_steps: {config.warmup_steps:g} is longer than the run of {total} steps")
    return Run(
        config, accelerator, tokenizer, data, model, loss, parameters, optimizer, steps, total, trained, identity, here
    )


def rehearse(run: Run) -> list[str]:
    """Before step 0: is head(hidden) this model's logits, does the largest micro-batch fit, does every tensor learn?

    Leaves no trace: gradients are dropped, and dropout is seeded anew for each micro-batch of a step.
    Returns a notice where the model's own logits must be used, else none. Raises: LoopError by the tensor's name."""
    device, pad = run.accelerator.device, run.steps.pad_token_id
    exact = run.accelerator.mixed_precision == "no" and next(run.loss.parameters()).dtype.itemsize >= 4
    first = collate(run.data.train.read(np.array([0])), pad).to(device)
    difference = check_head(run.loss.eval(), first, tolerance=1e-4 if exact else 1e-2)
    run.loss.train()
    config = run.config
    largest = largest_batch(run.data.train, config.micro_batch_tokens, config.global_batch_size, pad)
    run.accelerator.backward(run.loss(largest.to(device)))
    for name, parameter in run.parameters.items():
        if parameter.grad is None:
            raise LoopError(f"{name}: is trained but gets no gradient; the run was not started")
    run.optimizer.zero_grad(set_to_none=True)
    words = f"head(hidden) is {difference:.1%} off this model's own loss: its own logits are used, at their memory"
    return [words] if run.loss.whole_model else []


def largest_batch(examples: Examples, micro_batch_tokens: int, global_batch_size: int, pad_token_id: int) -> Batch:
    """Rows of neighbouring lengths that fill one forward most: no micro-batch of training has more padded tokens."""
    longest_first = np.argsort(-examples.lengths, kind="stable")
    widths = examples.lengths[longest_first]
    rows = np.minimum(np.minimum(micro_batch_tokens // widths, global_batch_size), np.arange(len(widths), 0, -1))
    start = int(np.argmax(rows * widths))
    return collate(examples.read(longest_first[start : start + rows[start]]), pad_token_id)


def run_manifest(run: Run) -> dict[str, Any]:
    """The part of `run.json` that is a function of the run, not of a session."""
    commit = getattr(causal_lm_of(run.model).config, "_commit_hash", None)
    dataset = {"name": _public_name(run.config.dataset_name), "commit": run.data.commit}
    return {
        "identity": run.identity,
        "identity_sha256": run.identity_sha256,
        "base": {"name": _public_name(run.config.model_name_or_path), "commit": commit},
        "data": {**dataset, "counts": run.data.counts},
        "census": run.census,
        "num_steps": run.num_steps,
    }


def describe(run: Run) -> list[str]:
    """The run in four lines, for a person."""
    config, counts, trained, accelerator = run.config, run.data.counts, run.census, run.accelerator
    dropped = counts["dropped_without_target"] + counts["dropped_too_long"]
    numbers = f"{trained['trained_parameters']:,} of {trained['all_parameters']:,} parameters"
    share = trained["trained_parameters"] / trained["all_parameters"]
    epochs = run.steps.positions / len(run.data.train)
    fate = f"{dropped:,} dropped, {counts['truncated']:,} truncated, {counts['duplicate_train_rows']:,} duplicates"
    rows = f"{len(run.data.train):,} rows with {counts['train_target_tokens']:,} target tokens to train on"
    return [
        f"data   {_public_name(config.dataset_name)} as {' -> '.join(run.data.templates)!r}: {rows}, "
        f"{len(run.data.heldout):,} held out, {fate}",
        f"model  {_public_name(config.model_name_or_path)}: frozen in {', '.join(trained['base_dtypes'])}, "
        f"checksum {run.identity['base_checksum'][:12]}",
        f"LoRA   r={config.lora_r} on {', '.join(trained['target_modules'])}: trains {numbers} ({share:.3%})",
        f"steps  {run.num_steps:,} of {config.global_batch_size} rows, {epochs:.2f} epochs; {accelerator.device.type}, "
        f"{accelerator.num_processes} x {torch.get_num_threads()} threads, precision {accelerator.mixed_precision}",
    ]


def _identity(
    config: Config, accelerator: Accelerator, data: Data, model: PeftModel, trained: dict[str, Any]
) -> dict[str, Any]:
    """Names of files and models are left out: what they hold is in, so a moved folder is still the same run."""
    return {
        **config.with_resume("identity"),
        "base_checksum": base_checksum(model),
        "base_config_sha256": sha256(canonical_json(base_config(config))),
        "base_dtypes": trained["base_dtypes"],
        "data_fingerprint": data.fingerprint,
        "lora_target_modules": trained["target_modules"],
        "mixed_precision": accelerator.mixed_precision,
        "order_version": ORDER_VERSION,
    }


def compare_processes(accelerator: Accelerator, facts: dict[str, bytes]) -> None:
    """One gather: do all processes agree on these? Raises: LoopError, on every process alike."""
    digests = [list(bytes.fromhex(sha256(fact))) for fact in facts.values()]
    gathered = accelerator.gather(torch.tensor([digests], device=accelerator.device))  # (processes, facts, 32 bytes)
    for process, found in enumerate(gathered):
        for name, mine, first in zip(facts, found, gathered[0]):
            if not torch.equal(mine, first):
                raise LoopError(f"process {process} differs from process 0 in its {name}; all must have the same")


def _public_name(name: str) -> str:
    """A folder or file by its last part only: the folders of one machine are nobody's provenance."""
    return Path(name).name if Path(name).exists() else name
