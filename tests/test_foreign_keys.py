"""Keys of other trainers are answered, not merely refused."""

import dataclasses
from typing import Any

import pytest
import transformers

from loop.config import FIELDS
from loop.foreign_keys import FOREIGN_KEYS, answer_foreign_keys

KNOBS = list(FIELDS)


@pytest.mark.parametrize(
    ("given", "num_processes", "answer"),
    [
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            2,
            "per_device_train_batch_size, gradient_accumulation_steps: 4 x 4 x 2 processes = global_batch_size: 32",
        ),
        ({"per_device_train_batch_size": "16"}, 1, "16 x 1 x 1 process = global_batch_size: 16"),
        ({"train_batch_size": 2, "gradient_accumulation_steps": "3"}, 4, "2 x 3 x 4 processes = global_batch_size: 24"),
        ({"gradient_accumulation_steps": 4}, 1, "8 x 4 x 1 process = global_batch_size: 32"),  # transformers' default
    ],
)
def test_batch_keys_are_answered_by_their_product(given: dict[str, Any], num_processes: int, answer: str) -> None:
    answers = answer_foreign_keys(given, num_processes, KNOBS)
    assert len(answers) == 1
    assert answer in answers[0]


def test_the_batch_size_that_is_assumed_is_transformers_default() -> None:
    fields = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}
    assert fields["per_device_train_batch_size"].default == 8
    assert fields["gradient_accumulation_steps"].default == 1


@pytest.mark.parametrize("value", ["auto", "", None, [4], {}, float("inf"), float("nan")])
def test_a_batch_size_that_is_no_number_is_answered_without_arithmetic(value: Any) -> None:
    answers = answer_foreign_keys({"per_device_train_batch_size": value}, 2, KNOBS)
    assert answers == [
        "per_device_train_batch_size: write global_batch_size, the rows per optimizer step over all processes"
    ]


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_every_foreign_key_is_answered_and_none_is_a_knob(key: str) -> None:
    assert key not in KNOBS
    (answer,) = answer_foreign_keys({key: "x"}, 1, KNOBS)
    assert answer == f"{key}: {FOREIGN_KEYS[key]}"


@pytest.mark.parametrize("knob", [answer.split()[1] for answer in FOREIGN_KEYS.values() if answer.startswith("write ")])
def test_an_answer_that_names_a_knob_names_one_there_is(knob: str) -> None:
    assert knob.strip(";,") in [*KNOBS, "nothing"]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        # TrainingArguments
        ("bf16", "--mixed_precision bf16"),
        ("warmup_ratio", "warmup_steps"),
        ("eval_strategy", "eval_steps"),
        ("push_to_hub", "Hub"),
        ("deepspeed", "--config_file"),
        ("report_to", "metrics.jsonl"),
        # SFTConfig
        ("packing", "never packed"),
        ("max_seq_length", "max_length"),
        ("completion_only_loss", "completion_template"),
        # ModelConfig and LoraConfig
        ("load_in_4bit", "not supported"),
        ("torch_dtype", "dtype"),
        ("trust_remote_code", "never run"),
        ("r", "lora_r"),
        ("target_modules", "lora_target_modules"),
    ],
)
def test_a_key_of_another_trainer_is_answered_in_words_of_this_one(key: str, says: str) -> None:
    assert says in answer_foreign_keys({key: True}, 1, KNOBS)[0]


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
    assert answer_foreign_keys({typed: 1}, 1, KNOBS) == [answer]


def test_each_key_is_answered_once() -> None:
    given = {"bf16": True, "per_device_train_batch_size": 2, "lr": 1, "train_batch_size": 2, "seed_": 3}
    answers = answer_foreign_keys(given, 1, KNOBS)
    assert [answer.split(":")[0] for answer in answers] == [
        "per_device_train_batch_size, train_batch_size",
        "bf16",
        "lr",
        "seed_",
    ]
