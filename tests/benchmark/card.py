"""`python -m tests.benchmark.card`: one GPU and this loop, each case through `loop.train` in its own process.

Bases have the shapes of published models and random weights: what is measured does not depend on their values. Rows
have the lengths of Abirate/english_quotes in BLOOM's tokens. Prints a Markdown table and writes every number to --out.
A case that the card or a version does not allow says so. Without a GPU only the demo's case runs, without kernels."""

import argparse
import importlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, LlamaConfig
from transformers.utils.logging import disable_progress_bar

from tests.benchmark.work import DEMO

WARM, TIMED = 3, 10
"""Steps left out, in which kernels are chosen, and steps that are timed; one more counts syncs, a last is profiled."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_BLOOM: dict[str, Any] = {"vocab_size": 250_880, "hidden_size": 4096, "n_head": 32, **_TOKENS}
SHAPES: dict[str, Any] = {
    "bloom-7b1": BloomConfig(n_layer=30, **_BLOOM),
    "bloom-7b1, 4 layers": BloomConfig(n_layer=4, **_BLOOM),
    "llama-8b": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False, **_TOKENS,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    shape: str  # of SHAPES, or the demo's model
    rows: int  # a step
    tokens: int  # a forward, at most
    knobs: dict[str, Any] = field(default_factory=dict)


CASES = {
    "demo": Case("demo", 32, 1024),
    "bloom": Case("bloom-7b1", 128, 4096),
    "bloom, one forward": Case("bloom-7b1", 128, 8192),
    "bloom, small": Case("bloom-7b1", 32, 1024),
    "bloom, checkpointed": Case("bloom-7b1", 128, 8192, {"gradient_checkpointing": True}),
    "bloom, 4 bits": Case(
        "bloom-7b1", 128, 4096, {"load_in_4bit": True, "gradient_checkpointing": True}
    ),
    "llama": Case("llama-8b", 128, 4096),
    "same bytes": Case("bloom-7b1, 4 layers", 64, 2048, {"full_determinism": True}),
}
KINDS = {
    "attention": ("flash", "fmha", "attention", "_forward", "_backward"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "norms": ("norm",),
    "copies": ("copy", "memcpy", "memset", "cat", "fill", "index", "gather", "scatter"),
}
"""What a kernel is by a word in its name, the first that fits; the rest is elementwise."""


class Event(NamedTuple):
    """A kernel as the profiler saw it."""

    name: str
    milliseconds: float


def kinds(events: list[Event]) -> dict[str, float]:
    """Milliseconds of each of KINDS."""
    found: dict[str, float] = defaultdict(float)
    for name, milliseconds in events:
        lower = name.lower()
        found[
            next(
                (k for k, words in KINDS.items() if any(word in lower for word in words)),
                "elementwise",
            )
        ] += milliseconds
    return dict(found)


def versions() -> str:
    """The card, its driver's CUDA, and the versions of PACKAGES that are there."""
    found = []
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{card}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}, {', '.join(found)}"


def product_rate(seconds: float) -> float:
    """Floating-point operations a second of 8,192 x 8,192 bf16 products, one behind the other for so long.

    A short burst runs at clocks that the card's power limit does not hold for long."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    torch.cuda.synchronize()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()
        done += 20
    return done * 2 * 8192**3 / (time.perf_counter() - start)


def write_base(shape: str, folder: Path) -> Path:
    """Random bf16 weights in that shape and the demo's tokenizer, once."""
    if shape == "demo":
        return DEMO / "model"
    if not folder.exists():
        disable_progress_bar()
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
    return folder


def write_rows(file: Path, count: int = 2508) -> None:
    """Words of the demo's vocabulary, one token each: a median of 28 tokens, a mean of 36, 256 at most."""
    vocabulary = AutoTokenizer.from_pretrained(DEMO / "model").get_vocab()
    words = sorted(word[1:] for word in vocabulary if word[0] == "Ġ" and word[1:].isalpha())
    lengths = (
        np.exp(np.random.RandomState(0).normal(math.log(28), 0.72, count)).clip(4, 256).astype(int)
    )
    draw = random.Random(0)
    texts = (" ".join([""] + draw.choices(words, k=int(length) - 1)) for length in lengths)
    file.write_text("".join(json.dumps({"quote": text}) + "\n" for text in texts))


def measure(file: Path, argv: list[str]) -> None:
    """`loop.train` with these arguments; into `file`, what its steps took."""
    train, run = importlib.import_module("loop.train"), importlib.import_module("loop.run.prepare")
    own_step, on_gpu, took, ends = train.optimizer_step, torch.cuda.is_available(), {}, []
    found: dict[str, Any] = {"targets": [], "seconds": took, "ends": ends}

    def timed(module: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(module, name)

        def wrapper(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*given, **named)
            torch.cuda.synchronize() if on_gpu else None
            took[name] = took.get(name, 0.0) + time.perf_counter() - start
            return result

        setattr(module, name, wrapper)

    def step(run: Any, step: Any, *more: Any) -> Any:
        number = len(ends)
        if number < WARM + TIMED or not on_gpu:
            result = own_step(run, step, *more)
        elif number == WARM + TIMED:
            found["peak"] = torch.cuda.max_memory_allocated()
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                result = own_step(run, step, *more)
            torch.cuda.set_sync_debug_mode("default")
            found["syncs"] = sum("synchroniz" in str(warning.message) for warning in heard)
        else:
            with profile(
                activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True
            ) as profiled:
                result = own_step(run, step, *more)
                torch.cuda.synchronize()
            kernels = [
                event for event in profiled.events() if str(event.device_type).endswith("CUDA")
            ]
            events = [Event(event.name, event.time_range.elapsed_us() / 1e3) for event in kernels]
            found["launches"], found["kinds"], found["profiled_targets"] = (
                len(events),
                kinds(events),
                step.target_tokens,
            )
        ends.append(time.time() - psutil.Process().create_time())
        found["targets"].append(step.target_tokens)
        return result

    for module, names in (
        (run, ["load_base", "base_checksum"]),
        (train, ["prepare_run", "rehearse", "finish"]),
    ):
        for name in names:
            timed(module, name)
    with mock.patch.object(train, "optimizer_step", step):
        train.main(argv)
    file.write_text(json.dumps(found))


def arguments(case: Case, base: Path, rows: Path, output: Path, steps: int) -> list[str]:
    """The command line of `loop.train` for a case."""
    adapted = "q_proj,v_proj" if case.shape == "llama-8b" else "query_key_value"
    knobs = {
        "model_name_or_path": base, "dataset_name": rows, "dataset_text_field": "quote", "max_length": 256,
        "lora_target_modules": adapted, "lora_r": 16, "lora_alpha": 32, "global_batch_size": case.rows,
        "micro_batch_tokens": case.tokens, "max_steps": steps, "output_dir": output, "save_steps": 1000, **case.knobs,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in knobs.items()]


def python(*words: Any, **more: str) -> str:
    """A process of its own under bf16; the last line of what it said where it failed, else nothing."""
    precision = {"ACCELERATE_MIXED_PRECISION": "bf16"} if torch.cuda.is_available() else {}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *map(str, words)], capture_output=True, text=True,
        env={**os.environ, **precision, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **more},
    )  # fmt: skip
    return (
        ""
        if done.returncode == 0
        else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    )


def same_bytes(case: Case, base: Path, rows: Path, folder: Path) -> str:
    """Two whole runs, and one that is stopped after 4 of 8 steps and resumed: are ledger and adapter the same files?"""
    for name, stops in (("one", [[]]), ("two", [[]]), ("resumed", [["--stop_after_steps=4"], []])):
        for stop in stops:
            error = python("loop.train", *arguments(case, base, rows, folder / name, 8), *stop)
            if error:
                return error
    files = ("ledger.jsonl", "adapter/adapter_model.safetensors")
    odd = [f"{name}/{file}" for name in ("two", "resumed") for file in files
           if (folder / name / file).read_bytes() != (folder / "one" / file).read_bytes()]  # fmt: skip
    return (
        f"differ from one/: {', '.join(odd)}"
        if odd
        else "two runs and a resumed one: the same ledger and adapter"
    )


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table. The speed is the median of the timed steps'."""
    seconds = [after - before for before, after in zip(found["ends"], found["ends"][1:])]
    speeds = [targets / took for targets, took in zip(found["targets"][1:], seconds)][
        WARM - 1 : WARM + TIMED - 1
    ]
    total = sum(found.get("kinds", {}).values())
    parts = ", ".join(
        f"{k} {v:.0f}" for k, v in sorted(found.get("kinds", {}).items(), key=lambda item: -item[1])
    )
    took = ", ".join(f"{k} {v:.1f}" for k, v in found["seconds"].items())
    return (
        f"| {name} | {statistics.median(speeds):,.0f} | {found.get('peak', 0) / 1e9:.2f} | {found['ends'][0]:.1f} | "
        f"{found.get('syncs', '')} | {found.get('launches', '')} | {total:.0f}: {parts} | {took} |"
    )


def main(only: list[str], out: Path) -> None:
    print(versions(), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        burst, lasting = (product_rate(seconds) / 1e12 for seconds in (0.05, 5.0))
        print(
            f"8,192 bf16 product: {burst:.0f} TFLOP/s in a burst, {lasting:.0f} over 5 s",
            flush=True,
        )
        torch.cuda.empty_cache()
    head = "| case | target tokens/s | peak GB | first step s | syncs | launches | kernels ms | seconds of |"
    print(f"{head}\n|{'---|' * 8}", flush=True)
    with tempfile.TemporaryDirectory(prefix="card-") as place:
        folder = Path(place)
        write_rows(folder / "rows.jsonl")
        for name, case in CASES.items():
            if (only and name not in only) or (not on_gpu and case.shape != "demo"):
                continue
            base, given, file = (
                write_base(case.shape, folder / case.shape),
                folder / "rows.jsonl",
                out / f"{name}.json",
            )
            if name == "same bytes":
                print(f"| {name} | {same_bytes(case, base, given, folder / 'same')} |", flush=True)
                continue
            rows = DEMO / "quotes.jsonl" if case.shape == "demo" else given
            argv = arguments(case, base, rows, folder / name, WARM + TIMED + 2)
            error = python("tests.benchmark.card", "--measure", file, *argv)
            print(
                f"| {name} | skipped: {error} |"
                if error
                else row(name, json.loads(file.read_text())),
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), sys.argv[3:])
    else:
        parser = argparse.ArgumentParser(prog="tests.benchmark.card", description=__doc__)
        parser.add_argument(
            "--only",
            nargs="+",
            default=[],
            choices=list(CASES),
            metavar="NAME",
            help=", ".join(CASES),
        )
        parser.add_argument("--out", type=Path, default=Path("runs/card"))
        options = parser.parse_args()
        main(options.only, options.out)
