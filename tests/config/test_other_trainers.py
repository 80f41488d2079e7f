"""Keys of other trainers are answered, not merely refused."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from loop.config.knobs import FIELDS, Config
from loop.config.other_trainers import OTHER_TRAINERS_KEYS, answer_unknown_keys
from loop.guide_table import TRL
from loop.model.base import load_base
from loop.model.lora import adapter_parameters, add_adapter

ROOT = Path(__file__).parents[2]
KNOBS = list(FIELDS)


@pytest.mark.parametrize(
    ("given", "num_processes", "answer"),
    [
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            2,
            (
                "per_device_train_batch_size, gradient_accumulation_steps: 4 x 4 x 2 processes ="
                " global_batch_size: 32"
            ),
        ),
        ({"per_device_train_batch_size": "16"}, 1, "16 x 1 x 1 process = global_batch_size: 16"),
        (
            {"train_batch_size": 2, "gradient_accumulation_steps": "3"},
            4,
            "2 x 3 x 4 processes = global_batch_size: 24",
        ),
        (
            {"gradient_accumulation_steps": 4},
            1,
            "8 x 4 x 1 process = global_batch_size: 32",
        ),  # transformers' default
    ],
)
def test_batch_keys_are_answered_by_their_product(
    given: dict[str, Any], num_processes: int, answer: str
) -> None:
    answers = answer_unknown_keys(given, num_processes, KNOBS)
    assert len(answers) == 1
    assert answer in answers[0]


def test_the_batch_size_that_is_assumed_is_transformers_default() -> None:
    fields = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}
    assert fields["per_device_train_batch_size"].default == 8
    assert fields["gradient_accumulation_steps"].default == 1


@pytest.mark.parametrize("value", ["auto", "", None, [4], {}, float("inf"), float("nan")])
def test_a_batch_size_that_is_no_number_is_answered_without_arithmetic(value: Any) -> None:
    answers = answer_unknown_keys({"per_device_train_batch_size": value}, 2, KNOBS)
    assert answers == [
        "per_device_train_batch_size: write global_batch_size, the rows per optimizer step over all"
        " processes"
    ]


@pytest.mark.parametrize("key", OTHER_TRAINERS_KEYS)
def test_every_foreign_key_is_answered_and_none_is_a_knob(key: str) -> None:
    assert key not in KNOBS
    (answer,) = answer_unknown_keys({key: "x"}, 1, KNOBS)
    assert answer == f"{key}: {OTHER_TRAINERS_KEYS[key]}"


@pytest.mark.parametrize("library", [transformers.TrainingArguments, peft.LoraConfig])
def test_every_field_of_the_libraries_is_a_knob_or_is_answered(library: Any) -> None:
    assert not unanswered([field.name for field in dataclasses.fields(library)])


def test_every_field_that_trl_adds_is_a_knob_or_is_answered() -> None:
    """Their names are written down in guide_table.py: TRL is not installed. These are read off its
    1.16.0 once more."""
    sft = (
        "max_length packing padding_free eval_packing packing_strategy chat_template_path"
        " shuffle_dataset loss_type"
    )
    model = (
        "attn_implementation use_peft lora_task_type load_in_4bit bnb_4bit_quant_type"
        " use_bnb_nested_quant lora_r"
    )
    assert {*sft.split(), *model.split(), "dataset_streaming", "dataset_test_split"} <= {*TRL}
    assert not unanswered(list(TRL))


def unanswered(keys: list[str]) -> list[str]:
    """Those that would be told that they are unknown."""
    foreign = [key for key in keys if key not in KNOBS]
    return [key for key in foreign if ": unknown" in answer_unknown_keys({key: "x"}, 1, KNOBS)[0]]


@pytest.mark.parametrize("answer", sorted(set(OTHER_TRAINERS_KEYS.values())))
def test_an_answer_is_one_line_that_names_only_what_there_is(answer: str) -> None:
    assert 10 <= len(answer) <= 120
    assert not set(answer) & {"\n", "|", "`"}  # it is also a cell of GUIDE.md's table
    for knob in re.findall(r"(?:write|set) (\w+)", answer):
        assert knob in {*KNOBS, "nothing", "DIR", "their", "in"}
    for word in re.findall(r"(?<![\w./-])[a-z]+(?:_[a-z0-9]+)+(?![\w./(])", answer):
        assert word in {*KNOBS, *THEIRS}, word
    for file in re.findall(r"launch_configs/\w+\.yaml", answer):
        assert (ROOT / file).is_file(), file
    for file in re.findall(r"[\w/]+\.py", answer):
        assert (ROOT / "loop" / file).is_file(), file
    for command in re.findall(r"-m loop\.(\w+)", answer):
        assert {
            *(ROOT / "loop").glob(f"{command}.py"),
            *(ROOT / "loop").glob(f"{command}/__main__.py"),
        }, command


THEIRS = {"mixed_precision", "eval_loss", "target_tokens", "padded_tokens", "peak_memory_bytes"}
"""Words of the launch config, the ledger and the metrics."""


def test_a_target_module_may_name_its_layer_as_the_table_says(config: Any) -> None:
    assert "such as 0.self_attention.query_key_value" in OTHER_TRAINERS_KEYS["layers_to_transform"]
    one_layer: Config = config(lora_target_modules="0.self_attention.query_key_value")
    trained = adapter_parameters(add_adapter(load_base(one_layer, torch.device("cpu")), one_layer))
    assert [".h.0." in name for name in trained] == [True, True]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        # TrainingArguments
        ("bf16", "--mixed_precision bf16"),
        ("fp16", "--mixed_precision fp16"),
        ("fp16", "launch_configs/one_gpu_fp16.yaml"),
        ("gradient_checkpointing_kwargs", "takes no arguments"),
        ("auto_find_batch_size", "micro_batch_tokens: auto"),
        ("enable_jit_checkpoint", "SIGTERM"),
        ("warmup_ratio", "warmup_steps"),
        ("eval_strategy", "eval_steps"),
        ("push_to_hub", "Hub"),
        ("deepspeed", "--config_file"),
        ("report_to", "metrics.jsonl"),
        # SFTConfig
        ("packing", "lets no row see another"),
        ("max_seq_length", "max_length"),
        ("completion_only_loss", "completion_template"),
        ("eval_packing", "lets no row see another"),
        ("dataset_num_proc", "one process"),
        # ModelConfig and LoraConfig
        ("bnb_4bit_quant_type", "always nf4"),
        ("use_bnb_nested_quant", "always on"),
        ("bnb_4bit_compute_dtype", "write dtype"),
        ("init_lora_weights", "B zero"),
        ("layers_to_transform", "lora_target_modules"),
        ("torch_dtype", "dtype"),
        ("trust_remote_code", "never run"),
        ("r", "lora_r"),
        ("target_modules", "lora_target_modules"),
    ],
)
def test_a_key_of_another_trainer_is_answered_in_words_of_this_one(key: str, says: str) -> None:
    assert says in answer_unknown_keys({key: True}, 1, KNOBS)[0]


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("lerning_rate", "lerning_rate: unknown; did you mean learning_rate?"),
        ("lora_rank", "lora_rank: unknown; did you mean lora_r?"),
        ("global_batch", "global_batch: unknown; did you mean global_batch_size?"),
        ("xyzzy", "xyzzy: unknown; --help lists the knobs"),
    ],
)
def test_an_unknown_key_is_answered_by_the_nearest_knob(typed: str, answer: str) -> None:
    assert answer_unknown_keys({typed: 1}, 1, KNOBS) == [answer]


def test_each_key_is_answered_once() -> None:
    given = {
        "bf16": True,
        "per_device_train_batch_size": 2,
        "lr": 1,
        "train_batch_size": 2,
        "seed_": 3,
    }
    answers = answer_unknown_keys(given, 1, KNOBS)
    assert [answer.split(":")[0] for answer in answers] == [
        "per_device_train_batch_size, train_batch_size",
        "bf16",
        "lr",
        "seed_",
    ]
