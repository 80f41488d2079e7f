"""What `growth.py` measures: one point each, in this process. Models are BLOOMs of random
weights."""

import itertools
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from loop.config.knobs import Config
from loop.data.batch import Example
from loop.data.collate import collate
from loop.process.launch import make_accelerator
from loop.process.memory import peak_memory
from loop.process.signals import Signals
from loop.run.prepare import Run, prepare_run
from loop.run.rehearsal import rehearse
from loop.train import open_record, optimizer_step, save
from loop.update.optim import learning_rate
from tests.benchmark.machine import forget_peak, in_a_fork, memory, own_memory
from tests.benchmark.work import DEMO, LORA, SEED

Result = dict[str, float]
CPU = torch.device("cpu")
WORD = "the"  # one token of the demo's tokenizer, also behind a space
SHAPES = {
    "head": (256, 2, 8),
    "tiny": (32, 2, 4),
    "deep": (768, 8, 12),
}  # hidden size, layers, attention heads
RAGGED = [*range(2, 128), 65]
"""Lengths of rows, 8,192 tokens together."""
STEP_TOKENS = 2048  # where the number of rows a step follows from their length
TIMED_SECONDS = 0.5  # steps are timed until they have taken this long


def model_folder(folder: Path, shape: str, vocabulary: int) -> Path:
    """The model, written at the first call: in a fork, because its making is no part of what is
    measured here."""
    path = folder / f"{shape}-{vocabulary}"
    if not path.is_dir():
        in_a_fork(_write_model, path, shape, vocabulary)
    return path


def _write_model(path: Path, shape: str, vocabulary: int) -> None:
    hidden, layers, heads = SHAPES[shape]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "hidden_dropout": 0.0}
    config = BloomConfig(
        vocab_size=vocabulary, hidden_size=hidden, n_layer=layers, n_head=heads, **tokens
    )
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(path)


def text_of(tokens: int) -> str:
    """A text that the demo's tokenizer makes this many tokens of, with the end-of-text that is put
    behind it."""
    return " ".join([WORD] * (tokens - 1))


def short_text(row: int) -> str:
    """One word or two, another for each row."""
    return f"row {row}" if row % 2 else str(row)


def write_rows(path: Path, texts: Iterable[str]) -> Path:
    if not path.is_file():
        with path.open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def vocabulary_point(folder: Path, vocabulary: int, series: str) -> Result:
    """32 rows of 64 tokens a step; `series` is a knob of this loop with its value, or the
    Trainer."""
    model = model_folder(folder, "head", vocabulary)
    rows = write_rows(folder / "rows-64.jsonl", [text_of(64)] * 128)
    if series.startswith("Trainer"):
        return _trainer_steps(model, [64] * 128, rows_a_step=32, micro=4)
    return _steps(model, rows, 32, fused_loss=series.endswith("true"))


def length_point(folder: Path, length: int, series: str) -> Result:
    """STEP_TOKENS tokens a step, in rows of one length."""
    rows_a_step = STEP_TOKENS // length
    rows = write_rows(folder / f"rows-{length}.jsonl", [text_of(length)] * (4 * rows_a_step))
    return _steps(
        model_folder(folder, "head", 16_384),
        rows,
        rows_a_step,
        padding_free=series.endswith("true"),
    )


def micro_point(folder: Path, micro: int, series: str) -> Result:
    """The RAGGED rows, all of them in each step."""
    rows = write_rows(folder / "ragged.jsonl", [text_of(length) for length in RAGGED])
    model = model_folder(folder, "head", 16_384)
    return _steps(
        model,
        rows,
        len(RAGGED),
        micro,
        padding_free=series.endswith("true"),
        max_length=max(RAGGED),
    )


def rows_point(folder: Path, number: int, series: str) -> Result:
    """Prepare a run on many short rows. The first time they are tokenized, the second time that is
    found again."""
    rows, cache = (
        write_rows(folder / f"short-{number}.jsonl", map(short_text, range(number))),
        folder / f"of-{number}",
    )
    if series == "first time":
        shutil.rmtree(cache, ignore_errors=True)
    datasets.config.HF_DATASETS_CACHE = cache
    config = _config(
        model_folder(folder, "tiny", 3072), rows, folder, max_steps=None, num_train_epochs=1.0
    )
    accelerator = make_accelerator(config)
    before, own_before = _account()
    start = time.perf_counter()
    run = prepare_run(config, accelerator)
    prepared, own = time.perf_counter() - start, own_memory() - own_before
    seconds = []
    for step in range(run.num_steps // 2, run.num_steps // 2 + 10):
        start = time.perf_counter()
        run.steps[step]
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": prepared,
        "step_ms": statistics.median(seconds[1:]) * 1e3,
        "above_mb": (peak_memory(CPU) - before) / 1e6,
        "first_step_ms": seconds[0] * 1e3,
        "own_mb": own / 1e6,
    }


def rank_point(folder: Path, rank: int, series: str) -> Result:
    """Three checkpoints of an adapter on all linear modules, each after an update."""
    rows = write_rows(folder / "rows-16.jsonl", [text_of(16)] * 16)
    config = _config(
        model_folder(folder, "deep", 4096),
        rows,
        folder,
        4,
        max_steps=3,
        lora_r=rank,
        lora_target_modules=("all-linear",),
    )
    run = prepare_run(config, make_accelerator(config))
    seconds = []
    record = open_record(run, None, {})
    with Signals() as signals:
        for number in range(3):
            optimizer_step(run, run.steps[number], config.learning_rate, signals)
            start = time.perf_counter()
            save(run, record, number + 1)
            seconds.append(time.perf_counter() - start)
    record.close()
    files = [path.stat().st_size for path in (run.folder / "checkpoints" / "step-000003").iterdir()]
    shutil.rmtree(run.folder)
    trained = sum(parameter.numel() for parameter in run.parameters.values())
    return {"seconds": statistics.median(seconds), "mb": sum(files) / 1e6, "trained": trained}


MEASURE: dict[str, Callable[[Path, int, str], Result]] = {
    "vocabulary": vocabulary_point,
    "length": length_point,
    "micro": micro_point,
    "rows": rows_point,
    "rank": rank_point,
}


def measure(part: str, folder: Path, x: int, series: str) -> Result:
    """One point. Everything is written under `folder`, the library's cache too."""
    disable_progress_bar()
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return MEASURE[part](folder, x, series)


def _config(
    model: Path, rows: Path, folder: Path, rows_a_step: int = 32, micro: int = 2048, **knobs: Any
) -> Config:
    places = {
        "model_name_or_path": str(model),
        "dataset_name": str(rows),
        "output_dir": tempfile.mkdtemp(dir=folder),
    }
    common = {
        "max_length": 2048,
        "global_batch_size": rows_a_step,
        "micro_batch_tokens": micro,
        "max_steps": 1000,
    }
    return Config(
        **{**places, **common, "lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"], **knobs}
    )


def _steps(model: Path, rows: Path, rows_a_step: int, micro: int = 2048, **knobs: Any) -> Result:
    """This loop's steps, and what they and the rehearsal, which warms up, needed above the prepared
    run."""
    config = _config(model, rows, rows.parent, rows_a_step, micro, **knobs)
    run = prepare_run(config, make_accelerator(config))
    if run.loss.padding_free != config.padding_free or run.loss.fused != config.fused_loss:
        raise RuntimeError(f"not laid out as asked: {run.packing}")
    _first_of_all(run)
    before, _ = _account()
    run = rehearse(run, None)
    seconds: list[float] = []
    with Signals() as signals:
        while sum(seconds) < TIMED_SECONDS:
            start, number = time.perf_counter(), len(seconds)
            optimizer_step(run, run.steps[number], learning_rate(number, config, 1000), signals)
            seconds.append(time.perf_counter() - start)
    return _needed(before, seconds)


def _trainer_steps(model: Path, lengths: list[int], rows_a_step: int, micro: int) -> Result:
    """The same with transformers' Trainer as it comes; its first step warms up and is left out."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer([text_of(length) + tokenizer.eos_token for length in lengths])["input_ids"]
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(causal_lm, LoraConfig(task_type="CAUSAL_LM", **LORA))
    first = torch.tensor([[5, 6]])
    adapted(input_ids=first, labels=first).loss.backward()
    adapted.zero_grad(set_to_none=True)
    _touch(adapted)
    ends: list[float] = []

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            ends.append(time.perf_counter())
            control.should_training_stop = len(ends) > 1 and ends[-1] - ends[0] > TIMED_SECONDS

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(dir=model.parent), max_steps=1000, per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows_a_step // micro, seed=SEED, use_cpu=True, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = Dataset.from_dict({"input_ids": ids})
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=data,
        data_collator=collator,
        callbacks=[Ends()],
    )
    before, _ = _account()
    trainer.train()
    return _needed(before, [after - end for end, after in itertools.pairwise(ends)])


def _first_of_all(run: Run) -> None:
    """Two tokens forward and backward: what libraries load at first use is no part of a step's
    memory."""
    batch = collate([Example([5, 6], 0)], run.loss.padding_free)
    run.accelerator.backward(run.loss(batch))
    run.optimizer.zero_grad(set_to_none=True)
    _touch(run.model)


def _touch(model: torch.nn.Module) -> None:
    """Read every weight: those that are mapped from a file count from now on."""
    for parameter in model.parameters():
        parameter.detach().sum()


def _account() -> tuple[int, int]:
    """Memory now, with and without mapped files; the peak starts from here."""
    forget_peak()
    return memory(), own_memory()


def _needed(before: int, seconds: list[float]) -> Result:
    peak = peak_memory(CPU)
    return {
        "seconds": statistics.median(seconds),
        "above_mb": (peak - before) / 1e6,
        "whole_mb": peak / 1e6,
    }
