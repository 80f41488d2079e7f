"""What the keys of other trainers are called here; the table is other_trainers.yaml."""

import difflib
from importlib import resources
from typing import Any

import yaml

LAUNCH_FILE_KEYS = {
    "compute_environment",
    "distributed_type",
    "num_machines",
    "main_training_function",
}
"""Any of these makes a YAML file a launch file: it goes to `accelerate launch --config_file`."""
_TABLE = resources.files("loop.config").joinpath("other_trainers.yaml")
OTHER_TRAINERS_KEYS: dict[str, str] = yaml.safe_load(_TABLE.read_text("utf-8"))
_BATCH_KEYS = ("per_device_train_batch_size", "train_batch_size", "gradient_accumulation_steps")


def answer_unknown_keys(given: dict[str, Any], num_processes: int, knobs: list[str]) -> list[str]:
    """One line for each key that is no knob: what it is called here, or the knob it resembles."""
    batch_keys = [key for key in _BATCH_KEYS if key in given]
    answers = []
    if batch_keys:
        answers.append(f"{', '.join(batch_keys)}: {_batch_answer(given, num_processes)}")
    for key in given:
        near = difflib.get_close_matches(key, knobs, n=1)
        unknown = f"unknown; did you mean {near[0]}?" if near else "unknown; --help lists the knobs"
        if key not in _BATCH_KEYS:
            answers.append(f"{key}: {OTHER_TRAINERS_KEYS.get(key, unknown)}")
    return answers


def _batch_answer(given: dict[str, Any], num_processes: int) -> str:
    """The arithmetic that three keys of other trainers stand for, done."""
    default = given.get("train_batch_size", 8)  # 8 is transformers' own
    rows = given.get("per_device_train_batch_size", default)
    accumulation = given.get("gradient_accumulation_steps", 1)
    try:
        total = int(rows) * int(accumulation) * num_processes
    except (TypeError, ValueError, OverflowError):
        return "write global_batch_size, the rows per optimizer step over all processes"
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    product = f"{rows} x {accumulation} x {processes} = global_batch_size: {total}"
    return f"{product}; one forward holds micro_batch_tokens"
