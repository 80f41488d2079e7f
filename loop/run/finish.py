"""How a run ends: the base proven untouched, the finished adapter written, and what came of it."""

import signal
from dataclasses import asdict, dataclass

from loop.errors import LoopError, Stopped
from loop.run.prepare import Run, announced_checksum
from loop.run.sample import sample
from loop.state.checkpoint import Checkpoint, read_checkpoint
from loop.state.files import commit_folder, sha256
from loop.state.ledger import perplexity, read_ledger
from loop.state.run_json import read_run_json, write_run_json


@dataclass(frozen=True)
class Result:
    """Where a run stands, read back from its verified checkpoint and ledger."""

    steps: int
    num_steps: int
    base_eval_loss: float | None  # held-out nats per target token of the untouched base
    eval_loss: float | None  # the same of the adapter, at the last evaluation
    adapter_sha256: str
    ledger_head: str


def finish(run: Run) -> Result:
    """End a run of which every step is done. Done a second time it changes no byte.

    Raises: LoopError if the base has moved; CheckpointError if no last checkpoint verifies."""
    if announced_checksum(run.accelerator, run.model, " again") != run.identity["base_checksum"]:
        raise LoopError("the frozen base changed during training; do not use this adapter")
    checkpoint, result = _read_result(run, run.num_steps)
    if run.accelerator.is_main_process:
        adapter, files = run.folder / "adapter", checkpoint.adapter_files()
        entries = adapter.iterdir() if adapter.is_dir() else ()
        present = {path.name: path.read_bytes() for path in entries} == files
        if not present:
            commit_folder(adapter, files)
        run_json = run.folder / "run.json"
        if present and read_run_json(run_json).get("result") == asdict(result):
            print("This run is finished: nothing was changed.")
        else:
            keep_sample(run, "adapter")
            write_run_json(run_json, {**read_run_json(run_json), "result": asdict(result)})
        print("\n".join(_summary(run, result)), flush=True)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return result


def stop(run: Run, step: int, number: int) -> Result:
    """End a session early, at a checkpoint. Raises: Stopped if the signal `number` asked for it."""
    _, result = _read_result(run, step)
    run.accelerator.end_training()
    if number:
        name = signal.Signals(number).name
        state = f"saved after step {step} of {run.num_steps}"
        raise Stopped(number, f"{name}: {state}; the same command goes on from there")
    run.accelerator.print(
        f"Stopped after step {step} of {run.num_steps}: without stop_after_steps the run goes on."
    )
    return result


def keep_sample(run: Run, of: str) -> None:
    """Continue `sample_prompt` and keep the text in `run.json` under `of`: base or adapter."""
    if run.accelerator.is_main_process and run.config.sample_prompt is not None:
        path = run.folder / "run.json"
        before = read_run_json(path)
        text = sample(run.accelerator, run.model, run.tokenizer, run.config.sample_prompt)
        samples = {**before.get("samples", {}), of: text}
        write_run_json(path, {**before, "samples": samples})


def _read_result(run: Run, step: int) -> tuple[Checkpoint, Result]:
    run.accelerator.wait_for_everyone()  # the main process has written it
    checkpoint = read_checkpoint(run.folder / "checkpoints" / f"step-{step:06d}")
    entries = read_ledger(run.folder / "ledger.jsonl", run.identity_sha256, checkpoint.ledger)
    losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry] or [None]
    adapter_sha256 = sha256(checkpoint.adapter_files()["adapter_model.safetensors"])
    return checkpoint, Result(
        step, run.num_steps, losses[0], losses[-1], adapter_sha256, checkpoint.ledger.head
    )


def _summary(run: Run, result: Result) -> list[str]:
    """What a person wants to know at the end, the two losses first."""
    lines = [""]
    if result.base_eval_loss is not None and result.eval_loss is not None:
        for name, loss in (("base", result.base_eval_loss), ("adapter", result.eval_loss)):
            lines.append(f"{name:8} held-out loss {loss:.4f}, perplexity {perplexity(loss):,.1f}")
    samples = read_run_json(run.folder / "run.json").get("samples", {})
    texts = {of: " ".join(samples[of].split()) for of in ("base", "adapter") if of in samples}
    lines += [f"{of:8} sample, an impression and no measure: {text}" for of, text in texts.items()]
    checksum = run.identity["base_checksum"][:12]
    weights = run.folder / "adapter" / "adapter_model.safetensors"
    return [
        *lines,
        f"base     checksum {checksum} before and after: not one byte has changed",
        f"ledger   {run.folder / 'ledger.jsonl'}, head {result.ledger_head}",
        f"adapter  {weights}, sha256 {result.adapter_sha256}",
        f'next     python -m loop.generate {run.folder} --prompt "..."',
        f"publish  python -m loop.publish {run.folder} --repo_id OWNER/NAME --dry_run",
    ]
