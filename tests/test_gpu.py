"""What a GPU will be given, seen without one: `train` itself on the stand-in for CUDA, each case in a process of its own.

What is asserted of memory was measured on one H200 (2026-11-28), or by the allocator of the CUDA wheel where that is said.
The stand-in's own limits stand in `stand_in_gpu.py`."""

import contextlib
import importlib
import json
import math
import os
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
)

from loop.config.knobs import Config
from loop.model.loss import GPU_VOCABULARY_BLOCK
from loop.run.prepare import Run
from loop.state.checkpoint import Checkpoint
from loop.state.ledger import LedgerPosition
from tests.conftest import DEMO_MODEL, QUOTES
from tests.processes import SERVER
from tests.stand_in_gpu import OTHER_TORCH, gpu, install

pytestmark = [
    pytest.mark.runs,
    pytest.mark.skipif(OTHER_TORCH is not None, reason=OTHER_TORCH or ""),
]

THE_SYNC = "tolist at train.py: norm, loss, *heard = numbers.tolist()  # the one sync"
LAYERS = 2
_SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_HEADS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
BLOOM = BloomConfig(hidden_size=64, n_layer=LAYERS, n_head=8, **_SHAPE)
LLAMA = LlamaConfig(**_HEADS, **_SHAPE)
GPT2 = GPT2Config(
    n_embd=64, n_layer=LAYERS, n_head=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_SHAPE
)
GEMMA2 = Gemma2Config(final_logit_softcapping=None, attn_logit_softcapping=50.0, **_HEADS, **_SHAPE)


@dataclass(frozen=True)
class Case:
    """Knobs and the card that a run is rehearsed on."""

    knobs: dict[str, Any]
    capability: tuple[int, int] = (8, 0)
    precision: str = "bf16"
    resumed: bool = False


@dataclass
class Report:
    """What the watch saw of a run of two steps."""

    packing: str = ""
    waits: list[list[str]] = field(default_factory=list)  # of the host, in each step
    attention: dict[str, int] = field(default_factory=dict)  # SDPA's kernels in the last step
    operations: dict[str, int] = field(default_factory=dict)  # on the device in the last step
    rehearsal: int = 0  # bytes, at the peak
    forgotten: bool = False  # did the peak begin anew behind it?
    peak: int = 0  # bytes, at the peak of evaluation and steps
    gradients: list[str] = field(default_factory=list)  # dtypes
    moments: list[str] = field(default_factory=list)  # devices
    pinned: bool = True  # was all that the steps copied to the device?
    error: str = ""


def rehearsed(folder: Path, model: PretrainedConfig, rows: Path = QUOTES, /, **case: Any) -> Report:
    """A run of a model of this shape with the demo's tokenizer, in a process of its own."""
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder / "model")
    knobs = {
        "model_name_or_path": str(folder / "model"), "output_dir": str(folder / "run"), "dataset_name": str(rows),
        "dataset_text_field": "quote", "eval_fraction": 0.05, "max_length": 256, "micro_batch_tokens": 1024,
        "lora_target_modules": ("all-linear",), "max_steps": 4, "stop_after_steps": 2, **case.pop("knobs", {}),
    }  # fmt: skip
    process = SERVER.Process(target=_report, args=(Case(knobs, **case), folder))
    process.start()
    process.join(120)
    log = (folder / "log").read_text(errors="replace")
    assert process.exitcode == 0, log
    report = Report(**json.loads((folder / "report.json").read_text()))
    if report.error:
        pytest.fail(report.error, pytrace=False)
    # What holds for every run on a GPU:
    assert report.waits == [[THE_SYNC], [THE_SYNC]]
    assert report.gradients == ["torch.float32"]
    assert report.moments == ["cuda"]
    assert report.operations["_fused_adamw_"] == 1
    assert report.pinned
    assert report.forgotten
    return report


def _report(case: Case, folder: Path) -> None:
    output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["ACCELERATE_MIXED_PRECISION"] = case.precision
    install()
    report = Report()
    try:
        _train(case, report)
    except Exception:
        report.error = traceback.format_exc()
    (folder / "report.json").write_text(json.dumps(asdict(report)))


def _load_base(config: Config, device: torch.device) -> Any:
    """Made on the device: the real one reads values, which a fake tensor has not."""
    with torch.device(device):
        settings = AutoConfig.from_pretrained(config.model_name_or_path)
        made: Any = AutoModelForCausalLM.from_config(
            settings, dtype=getattr(torch, str(config.dtype))
        )
    made.generation_config = GenerationConfig()
    return made.eval()


def _train(case: Case, report: Report) -> None:
    """`loop.train.train`; what would need a value is replaced: loading, hashing, the files of a run."""
    train, prepare = (importlib.import_module(f"loop.{name}") for name in ("train", "run.prepare"))
    names = ("prepare_run", "rehearse", "forget_peak", "optimizer_step")
    own: dict[str, Callable[..., Any]] = {name: getattr(train, name) for name in names}
    checkpoint: list[Checkpoint] = []
    with gpu(case.capability) as (watch, mode), contextlib.ExitStack() as stack:

        def prepare_run(*given: Any) -> Run:
            run: Run = own["prepare_run"](*given)
            report.packing = run.packing
            checkpoint.extend([_checkpoint(run)] if case.resumed else [])
            # From here on a process without files: nothing that it could write has a value.
            kind = type(run.accelerator)
            stack.enter_context(
                mock.patch.object(kind, "is_main_process", property(lambda _: False))
            )
            return run

        def rehearse(*given: Any) -> Run:
            torch.cuda.reset_peak_memory_stats()
            run: Run = own["rehearse"](*given)
            report.rehearsal = watch.peak
            return run

        def forget_peak(device: torch.device) -> None:
            own["forget_peak"](device)
            report.forgotten = watch.peak == watch.alive

        def optimizer_step(run: Run, step: Any, *more: Any) -> Any:
            watch.waits, watch.attention, watch.operations = [], Counter(), Counter()
            given = [leaf for _, batch in step.micro_batches for leaf in tree_leaves(batch)]
            unpinned = [
                leaf for leaf in given if isinstance(leaf, Tensor) and not hasattr(leaf, "pinned")
            ]
            report.pinned &= not unpinned
            update = own["optimizer_step"](run, step, *more)
            report.waits.append(watch.waits)
            report.attention, report.operations = dict(watch.attention), dict(watch.operations)
            report.gradients = sorted(
                {str(p.grad.dtype) for p in run.parameters.values() if p.grad is not None}
            )
            moments = [
                leaf
                for leaf in tree_leaves([*run.optimizer.state.values()])
                if isinstance(leaf, Tensor)
            ]
            report.moments = sorted({leaf.device.type for leaf in moments})
            report.peak = watch.peak
            return update

        replaced: dict[Any, dict[str, Any]] = {
            train: {
                "prepare_run": prepare_run, "rehearse": rehearse, "forget_peak": forget_peak,
                "optimizer_step": optimizer_step, "stop": lambda *_: None,
                "find_checkpoint": lambda *_: (checkpoint[0] if checkpoint else None, []),
            },
            prepare: {"load_base": _load_base, "base_checksum": lambda _: "0" * 64, "serialize": lambda _: b""},
            # The lengths of rows on the device are values; all else of this check runs.
            importlib.import_module("loop.model.body"): {"_of_the_worst_row": lambda *_: 0.0},
            importlib.import_module("weakref"): {"getweakrefs": lambda _: []},  # nn.Module.to swaps fake parameters
        }  # fmt: skip
        for module, functions in replaced.items():
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(module, name, function))
        stack.enter_context(mode)
        stack.enter_context(watch)
        train.train(Config(**case.knobs))


def _checkpoint(run: Run) -> Checkpoint:
    """After the first step, as it is read from a disk: on the CPU."""
    moments: dict[str, Tensor] = {}
    for name, parameter in run.parameters.items():
        moments |= {
            f"{name}.{key}": torch.zeros(parameter.shape) for key in ("exp_avg", "exp_avg_sq")
        }
        moments[f"{name}.step"] = torch.ones(())
    moments |= run.loss_scale.tensors()
    adapter = {name: torch.zeros(parameter.shape) for name, parameter in run.parameters.items()}
    return Checkpoint(1, run.identity, LedgerPosition(0, 0, ""), b"", adapter, moments)


def bloom_7b1(folder: Path, layers: int, rows: Path, **knobs: Any) -> Report:
    shape = BloomConfig(
        **{**_SHAPE, "vocab_size": 250_880}, hidden_size=4096, n_layer=layers, n_head=32
    )
    usual = {
        "lora_target_modules": ("query_key_value",),
        "global_batch_size": 128,
        "eval_fraction": 0.0,
    }
    (folder / str(layers)).mkdir()
    return rehearsed(folder / str(layers), shape, rows, knobs={**usual, **knobs})


def of_30_layers(two: int, four: int) -> float:
    """Bytes grow by the same with every layer: the peak stands behind the last of them."""
    return two + 28 * (four - two) / 2


def rows_of(folder: Path, lengths: list[int]) -> Path:
    """Rows of so many of the demo's tokens, the end of text included."""
    lines = [json.dumps({"quote": " the" * (length - 1)}) + "\n" for length in lengths]
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


def test_4096_tokens_of_bloom_7b1_take_the_memory_that_a_card_showed(tmp_path: Path) -> None:
    # A step is 128 rows of 31 or 32: one forward of 4,027 tokens or so, the card's fullest; the longest is rehearsed.
    rows = rows_of(tmp_path, [31, 32] * 400 + [256])
    two, four = (bloom_7b1(tmp_path, layers, rows, micro_batch_tokens=4096) for layers in (2, 4))
    assert two.packing.startswith("rows end to end, no padding")
    assert two.operations["exp2_"] == math.ceil(250_880 / GPU_VOCABULARY_BLOCK)
    assert two.attention == {"packed, 32 and 32 heads": 2}  # one forward of two layers
    assert of_30_layers(two.rehearsal, four.rehearsal) == pytest.approx(26.56e9, rel=0.02)
    assert of_30_layers(two.peak, four.peak) == pytest.approx(26.4e9, rel=0.02)


def test_1024_tokens_with_checkpointing_take_what_the_allocator_of_the_cuda_wheel_showed(
    tmp_path: Path,
) -> None:
    rows = rows_of(tmp_path, [31, 32] * 400 + [256])
    knobs = {"micro_batch_tokens": 1024, "global_batch_size": 32, "gradient_checkpointing": True}
    two, four = (bloom_7b1(tmp_path, layers, rows, **knobs) for layers in (2, 4))
    assert of_30_layers(two.rehearsal, four.rehearsal) == pytest.approx(14.92e9, rel=0.02)


def test_a_loss_that_is_not_fused_goes_through_the_models_own_head(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, BLOOM, knobs={"fused_loss": False})
    assert report.operations["_log_softmax"] > 0
    assert "exp2_" not in report.operations  # of the fused loss


def test_padded_rows_of_bloom_as_asked(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, BLOOM, knobs={"padding_free": False})
    assert report.packing == "padded rows, as asked"


def test_llama_gives_the_packed_kernel_its_own_few_heads(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, LLAMA)
    assert report.packing.startswith("rows end to end, no padding")
    assert report.attention.keys() == {"packed, 8 and 2 heads"}


def test_fp16_on_an_older_card_takes_grids_and_never_the_kernel_that_keeps_all_scores(
    tmp_path: Path,
) -> None:
    report = rehearsed(tmp_path, LLAMA, capability=(7, 5), precision="fp16")
    assert report.packing.startswith("rows end to end, no padding")
    assert report.attention.keys() == {"efficient, 8 and 8 heads"}


def test_gpt2_with_checkpointing_computes_each_layer_twice(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, GPT2, knobs={"gradient_checkpointing": True})
    backward = report.operations["torch_attn::_varlen_attn_backward"]
    assert report.attention == {"packed, 8 and 8 heads": 2 * backward}


def test_a_soft_cap_keeps_the_models_own_path(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, GEMMA2)
    assert report.packing.startswith("padded rows: ")
    assert report.attention == {}
    assert report.operations["tanh"] > 0


def test_a_resume_puts_the_moments_on_the_device(tmp_path: Path) -> None:
    report = rehearsed(tmp_path, BLOOM, resumed=True)
    assert report.packing.startswith("rows end to end, no padding")
