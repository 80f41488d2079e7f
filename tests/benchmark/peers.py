"""The peers, each as its own documentation shows it, and this loop. Run one: `python -m
tests.benchmark.peers ...`."""

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    DataCollatorForLanguageModeling,
    TrainerCallback,
)

from loop.process.memory import peak_memory
from tests.benchmark.work import DEMO, LEARNING_RATE, LORA, MAX_LENGTH, PROXIES, ROWS_PER_STEP, SEED

STARTED = psutil.Process().create_time()


@dataclass
class Clock:
    """Seconds since the process began at the end of each step, and what the forwards of each step
    were given."""

    ends: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    padded: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    _given: list[tuple[int, int, int]] = field(default_factory=list)

    def saw(self, targets: int, tokens: int, padded: int) -> None:
        self._given.append((targets, tokens, padded))

    def step(self) -> None:
        """The end of an optimizer step."""
        self.ends.append(time.time() - STARTED)
        for total, values in zip((self.targets, self.tokens, self.padded), zip(*self._given)):
            total.append(sum(values))
        self._given.clear()

    def watch(self, model: torch.nn.Module) -> None:
        """Count at each forward of training."""

        def count(_module: object, _positional: object, given: dict[str, Any]) -> None:
            ids, labels, mask = given["input_ids"], given.get("labels"), given.get("attention_mask")
            if model.training and labels is not None:
                tokens = int(mask.sum()) if mask is not None and mask.dim() == 2 else ids.numel()
                self.saw(int((labels[..., 1:] != -100).sum()), tokens, ids.numel())

        model.register_forward_pre_hook(count, with_kwargs=True)


class StepEnds(TrainerCallback):
    """Tells the clock of a Trainer's steps."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._clock.step()


def rows() -> Dataset:
    return load_dataset(
        "json", data_files=str(DEMO / "quotes.jsonl"), split="train"
    ).select_columns("quote")


def tokenized(tokenizer: Any) -> Dataset:
    """Each row's tokens with an end-of-text, cut at MAX_LENGTH, and its length."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        texts = [text + tokenizer.eos_token for text in batch["quote"]]
        ids = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        return {"input_ids": ids, "length": [len(row) for row in ids]}

    return rows().map(encode, batched=True, remove_columns="quote")


def lora(proxy: str) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", target_modules=list(PROXIES[proxy].target_modules), **LORA
    )


def adapted(proxy: str, folder: Path) -> Any:
    torch.manual_seed(SEED)
    return get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora(proxy)
    )


def arguments(
    steps: int, micro: int, output: str, a_step: int = ROWS_PER_STEP, **more: Any
) -> dict[str, Any]:
    """What transformers' and TRL's trainers share; `a_step` sequences make a step."""
    common = {
        "output_dir": output,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
        "use_cpu": True,
    }
    common |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": a_step // micro}
    common |= {
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return {**common, "optim": "adamw_torch", "gradient_checkpointing": False, **more}


def trainer(
    clock: Clock, proxy: str, folder: Path, steps: int, micro: int, sampling: str = "random"
) -> None:
    from transformers import Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = adapted(proxy, folder)
    clock.watch(model.get_base_model())
    with tempfile.TemporaryDirectory() as output:
        Trainer(
            model=model,
            args=TrainingArguments(
                **arguments(steps, micro, output, train_sampling_strategy=sampling)
            ),
            train_dataset=tokenized(tokenizer),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[StepEnds(clock)],
        ).train()


def trl(
    clock: Clock,
    proxy: str,
    folder: Path,
    steps: int,
    micro: int,
    a_step: int = ROWS_PER_STEP,
    **how: Any,
) -> None:
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    clock.watch(model)
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            **{
                **arguments(steps, micro, output, a_step),
                "dataset_text_field": "quote",
                "bf16": False,
                **how,
            }
        )
        SFTTrainer(
            model=model,
            args=config,
            train_dataset=rows(),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora(proxy),
            callbacks=[StepEnds(clock)],
        ).train()


def plain(
    clock: Clock,
    proxy: str,
    folder: Path,
    steps: int,
    micro: int,
    a_step: int = ROWS_PER_STEP,
    block: int = 0,
) -> None:
    """The accelerate loop of transformers' no-Trainer examples: padded rows, or all rows joined and
    cut into blocks."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=a_step // micro)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = adapted(proxy, folder)
    clock.watch(model.get_base_model())
    data = tokenized(tokenizer).remove_columns("length")
    if block:
        joined = [token for row in data["input_ids"] for token in row]
        pieces = [joined[i : i + block] for i in range(0, len(joined) - block + 1, block)]
        data = Dataset.from_dict({"input_ids": pieces})
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    torch.manual_seed(SEED)
    loader = DataLoader(data, shuffle=True, batch_size=micro, collate_fn=collator)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    while True:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                clock.step()
                if len(clock.ends) == steps:
                    return


def this_loop(clock: Clock, proxy: str, folder: Path, steps: int, micro: int) -> None:
    """`loop.train` without its files: the rehearsal and the steps, as `train_run` calls them.
    `micro` is in tokens."""
    from loop.config.knobs import Config
    from loop.process.launch import make_accelerator
    from loop.process.signals import Signals
    from loop.run.prepare import prepare_run
    from loop.run.rehearsal import rehearse
    from loop.train import optimizer_step
    from loop.update.optim import learning_rate

    with tempfile.TemporaryDirectory() as output:
        config = Config(
            model_name_or_path=str(folder), dataset_name=str(DEMO / "quotes.jsonl"), dataset_text_field="quote",
            output_dir=output, lora_target_modules=PROXIES[proxy].target_modules, max_length=MAX_LENGTH,
            micro_batch_tokens=micro, global_batch_size=ROWS_PER_STEP, max_steps=steps, learning_rate=LEARNING_RATE,
            lora_r=LORA["r"], lora_alpha=LORA["lora_alpha"],
        )  # fmt: skip
        run = rehearse(prepare_run(config, make_accelerator(config)), None)
        with Signals() as signals:
            for number in range(steps):
                step = run.steps[number]
                optimizer_step(run, step, learning_rate(number, config, steps), signals)
                clock.saw(step.target_tokens, step.tokens, step.padded_tokens)
                clock.step()


@dataclass(frozen=True)
class Peer:
    about: str
    measure: Callable[..., None]
    micro: tuple[int, ...]  # sizes that are tried, in `unit`; the best is taken
    how: dict[str, Any] = field(default_factory=dict)
    other_update: str = ""  # how what it trains on differs from the rows one by one
    unit: str = "rows"
    resets_positions: bool = (
        False  # of which every proxy but BLOOM, that has none, makes a mask between the rows
    )

    def differs(self, proxy: str) -> str:
        """`other_update`, on this proxy."""
        is_bloom = isinstance(PROXIES[proxy].config, BloomConfig)
        return self.other_update if is_bloom or not self.resets_positions else ""


_LEAK = "rows in one sequence see each other"
ROWS = (1, 2, 4, 8)
PEERS = {
    "trainer": Peer("transformers Trainer, as it comes", trainer, ROWS),
    "trainer, default size": Peer("the same, at its default of 8 rows", trainer, (8,)),
    "trainer, grouped": Peer("Trainer, rows grouped by length", trainer, ROWS, {"sampling": "group_by_length"}),
    "trl": Peer("TRL SFTTrainer, padded", trl, ROWS, {"max_length": MAX_LENGTH}),
    "trl, padding-free": Peer(
        "TRL SFTTrainer, padding-free", trl, (2, 4, 8, 16), {"padding_free": True, "max_length": None}, _LEAK,
        resets_positions=True,
    ),
    "trl, packed": Peer(
        "TRL SFTTrainer, packed", trl, (1, 2, 4), {"packing": True, "max_length": MAX_LENGTH, "a_step": 4}, _LEAK,
        unit=f"sequences of {MAX_LENGTH} tokens", resets_positions=True,
    ),
    "plain": Peer("accelerate loop of the examples, padded", plain, ROWS),
    "plain, blocks": Peer(
        "the same on blocks of 128 tokens", plain, (2, 4, 6, 12), {"block": 128, "a_step": 12},
        f"{_LEAK}, and are cut", unit="blocks",
    ),
    "this loop": Peer("this loop", this_loop, (512, 1024, 2048), unit="tokens"),
}  # fmt: skip


def main(argv: list[str]) -> None:
    """PEER PROXY FOLDER STEPS MICRO: one JSON object on stdout."""
    name, proxy, folder, steps, micro = argv[0], argv[1], Path(argv[2]), int(argv[3]), int(argv[4])
    warnings.simplefilter("ignore")
    clock, peer = Clock(), PEERS[name]
    stdout = os.dup(1)
    os.dup2(2, 1)  # what the libraries print is not the result
    peer.measure(clock, proxy, folder, steps, micro, **peer.how)
    found = {name: value for name, value in vars(clock).items() if not name.startswith("_")}
    os.write(
        stdout,
        json.dumps({**found, "peak_memory_bytes": peak_memory(torch.device("cpu"))}).encode()
        + b"\n",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
