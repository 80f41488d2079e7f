"""`python -m loop.guide_table` prints GUIDE.md's table of the keys of other trainers."""

import dataclasses
from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments

from loop.config.knobs import FIELDS
from loop.config.other_trainers import OTHER_TRAINERS_KEYS, answer_unknown_keys

_NAMES = """
model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path dataset_kwargs
dataset_num_proc pad_token eos_token truncation_mode shuffle_dataset packing packing_strategy
padding_free eval_packing pad_to_multiple_of completion_only_loss assistant_only_loss loss_type
activation_offloading model_name_or_path attn_implementation use_peft lora_target_modules
lora_target_parameters lora_modules_to_save lora_task_type bnb_4bit_quant_type
use_bnb_nested_quant bnb_4bit_quant_storage dataset_name dataset_config dataset_streaming
ignore_bias_buffers"""
_DEFAULTS = {"dataset_text_field": "text", "max_length": 1024, "learning_rate": 2e-5}
_DEFAULTS |= {"logging_steps": 10, "lora_r": 16, "gradient_checkpointing": True}
_DEFAULTS |= {"model_revision": "main", "dtype": "float32", "lora_alpha": 32}
_DEFAULTS |= {"lora_dropout": 0.05, "dataset_train_split": "train", "dataset_test_split": "test"}
_DEFAULTS |= dict.fromkeys(("use_rslora", "use_dora", "load_in_4bit", "load_in_8bit"), False)
TRL: dict[str, Any] = {**dict.fromkeys(_NAMES.split()), **_DEFAULTS}
"""Field -> default, of what TRL 1.16.0 adds or changes; written down, as it is not installed.

Source: SFTConfig, its _BaseConfig and ModelConfig in trl/trainer/;
ScriptArguments in trl/scripts/utils.py."""


def table() -> str:
    """A row for each answer and its keys: knobs of the same name, then other_trainers.yaml."""
    classes = (TrainingArguments, LoraConfig)
    libraries = {c.__name__: {f.name: f.default for f in dataclasses.fields(c)} for c in classes}
    libraries["TRL"] = TRL
    names = dict.fromkeys(
        key for fields in libraries.values() for key in fields if key not in OTHER_TRAINERS_KEYS
    )
    rows: dict[tuple[str, ...], tuple[list[str], dict[str, None]]] = {}
    for key in [*sorted(names, key=lambda key: key not in FIELDS), *OTHER_TRAINERS_KEYS]:
        there = {name: fields[key] for name, fields in libraries.items() if key in fields}
        answer = _answer(key, there)
        keys, where = rows.setdefault((answer, *there) if key in FIELDS else (answer,), ([], {}))
        keys.append(f"`{key}`")
        where.update(dict.fromkeys(there or ["other"]))
    lines = [
        f"| {', '.join(keys)} | {', '.join(where)} | {answer} |"
        for (answer, *_), (keys, where) in rows.items()
    ]
    return "\n".join(["| key | known to | here |", "|---|---|---|", *lines])


def _answer(key: str, there: dict[str, Any]) -> str:
    """What to write here; for a knob of the same name its default, where another's differs."""
    if key not in FIELDS:
        return answer_unknown_keys({key: "N"}, 1, [])[0].removeprefix(f"{key}: ")
    if FIELDS[key].is_required():
        return "the same, and must be given"
    other = [f"{value} in {name}" for name, value in there.items() if value != FIELDS[key].default]
    if not other:
        return "the same"
    return f"the same; the default is {FIELDS[key].default}, {', '.join(other)}"


if __name__ == "__main__":
    print(table())
