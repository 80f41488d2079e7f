"""Every knob: its unit, default, range, and what it means for a resume."""

import collections
import dataclasses
import os
import string
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

ResumeRole = Literal["identity", "resolved", "announced", "free"]
"""What another value means when a run is resumed.

identity: refused. resolved: a spelling; what it resolves to is in the identity. announced: allowed,
recorded, and "not bit-exact from step N" is said. free: changes no number of the run."""


def knob(default: Any, resume: ResumeRole, help: str, **limits: float) -> Any:
    """A field: default (... for none), meaning for a resume, help text and pydantic's limits."""
    field: Any = Field  # mypy cannot match its overloads to forwarded limits
    return field(default, description=help, json_schema_extra={"resume": resume}, **limits)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Config:
    """One training run. Everything about machines and precision is in the launch config instead.

    Raises: pydantic.ValidationError, a ValueError, that lists every knob out of its range."""

    # What is trained.
    model_name_or_path: str = knob(
        ..., "resolved", "Hub id or folder of the base model (safetensors)"
    )
    model_revision: str | None = knob(
        None, "resolved", "branch, tag or commit of the base on the Hub"
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = knob(
        None,
        "resolved",
        "of the frozen base; default float32 on CPU, bfloat16 on a GPU (float16 if it has none)",
    )
    load_in_4bit: bool = knob(
        False, "identity", "quantize the base: nf4, double quantization, products in dtype"
    )
    load_in_8bit: bool = knob(False, "identity", "quantize the base: LLM.int8()")
    lora_r: int = knob(16, "identity", "rank of the update of each target module", ge=1)
    lora_alpha: int = knob(32, "identity", "the update is scaled by lora_alpha / lora_r", ge=1)
    lora_dropout: float = knob(
        0.0, "identity", "dropout on the input of each LoRA module", ge=0, lt=1
    )
    lora_target_modules: tuple[str, ...] | None = knob(
        None, "identity", "module names, or all-linear; default: PEFT's own"
    )
    use_rslora: bool = knob(False, "identity", "scale by lora_alpha / sqrt(lora_r) instead")
    use_dora: bool = knob(
        False, "identity", "DoRA: the magnitude of each weight column is trained apart"
    )
    gradient_checkpointing: bool = knob(
        False, "announced", "recompute activations in backward: less memory, more time"
    )

    # What it is trained on.
    dataset_name: str = knob(
        ...,
        "resolved",
        "Hub id, or a local .json .jsonl .csv .parquet or .txt file, or a folder of some",
    )
    dataset_config: str | None = knob(None, "resolved", "the Hub dataset's configuration")
    dataset_revision: str | None = knob(
        None, "resolved", "branch, tag or commit of the dataset on the Hub"
    )
    dataset_train_split: str = knob(
        "train", "resolved", "split to train on, such as train or train[:1000]"
    )
    dataset_test_split: str | None = knob(
        None, "resolved", "validation split, instead of eval_fraction"
    )
    eval_fraction: float = knob(
        0.0, "identity", "share of the rows held out for validation, drawn by seed", ge=0, lt=1
    )
    dataset_text_field: str = knob("text", "identity", "the column that holds the text")
    text_template: str | None = knob(
        None, "identity", "text of a row, such as '{quote} - {author}'"
    )
    prompt_template: str | None = knob(
        None, "identity", "with completion_template: context, never a target"
    )
    completion_template: str | None = knob(
        None, "identity", "with prompt_template: the only targets"
    )
    max_length: int = knob(512, "identity", "tokens per row, end-of-text included", ge=2)
    truncation: Literal["truncate", "drop", "error"] = knob(
        "truncate", "identity", "of rows longer than max_length"
    )

    # How it is trained.
    seed: int = knob(
        42, "identity", "of the split, the order, LoRA's start and dropout", ge=0, lt=2**32
    )
    global_batch_size: int = knob(
        32, "identity", "rows per optimizer step, over all processes", ge=1
    )
    micro_batch_tokens: Annotated[int, Field(ge=2)] | Literal["auto"] = knob(
        2048,
        "announced",
        "tokens in one forward of one process, padding included; auto: halved until it fits",
    )
    padding_free: bool = knob(
        True,
        "resolved",
        "rows packed end to end, none seeing another, where hidden states stay the same",
    )
    fused_loss: bool = knob(
        True, "announced", "each logit computed once, with its gradient; false: twice, in chunks"
    )
    num_train_epochs: float = knob(3.0, "identity", "epochs; fractions are allowed", gt=0)
    max_steps: int | None = knob(
        None, "identity", "optimizer steps; replaces num_train_epochs", ge=1
    )
    learning_rate: float = knob(2e-4, "identity", "peak of the schedule", gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = knob(
        "linear", "identity", "decay after warm-up"
    )
    warmup_steps: float = knob(
        0.0, "identity", "steps from 0 to the peak; below 1: a share of the run", ge=0
    )
    optim: Literal["adamw_torch", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = knob(
        "adamw_torch",
        "identity",
        "AdamW; moments in 8 bits, or paged out when the GPU's memory is short",
    )
    weight_decay: float = knob(0.0, "identity", "decoupled, on adapter tensors only", ge=0)
    adam_beta1: float = knob(0.9, "identity", "decay of the first moment", ge=0, lt=1)
    adam_beta2: float = knob(0.999, "identity", "decay of the second moment", ge=0, lt=1)
    adam_epsilon: float = knob(1e-8, "identity", "added to the root of the second moment", gt=0)
    max_grad_norm: float = knob(
        1.0, "identity", "clip the gradient norm to this; 0: no clipping", ge=0
    )
    full_determinism: bool = knob(
        False, "announced", "deterministic kernels: the same bytes on a GPU too, at some speed"
    )

    # What is written, and when.
    output_dir: str = knob(..., "free", "the run's folder")
    save_steps: int = knob(
        100, "free", "steps between checkpoints; the last step has one too", ge=1
    )
    save_total_limit: int = knob(
        2, "free", "checkpoints kept; two, so that one is always whole", ge=2
    )
    eval_steps: int | None = knob(
        None,
        "identity",
        "steps between validations; always before the first and after the last",
        ge=1,
    )
    logging_steps: int = knob(
        10, "free", "steps between lines where there is no progress bar", ge=1
    )
    stop_after_steps: int | None = knob(
        None, "free", "end this command after that many steps", ge=1
    )
    resume_from_checkpoint: str = knob("auto", "free", "auto, none, or a checkpoint of output_dir")
    sample_prompt: str | None = knob(
        None, "free", "continued by the base before, and by the adapter after training"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: Any) -> Any:
        """What a flag or YAML 1.1 can only say as text: none, a list; a YAML `yes` is no number."""
        expected = TYPES[info.field_name]
        options = typing.get_args(expected)
        says_none = isinstance(value, str) and value.lower() in ("none", "null")
        if says_none and type(None) in options:
            return None
        if tuple[str, ...] in options and isinstance(value, (str, list, tuple)):
            names = value.split(",") if isinstance(value, str) else value
            return tuple(sorted({str(name).strip() for name in names}))
        may_be_path = info.field_name in ("model_name_or_path", "dataset_name")
        if may_be_path and str(value).startswith(("./", "../")):
            return os.path.abspath(value)  # in RUN/config.yaml it would be relative to RUN
        if info.field_name == "output_dir" and str(value).strip()[:1] in ("", "~"):
            raise ValueError("expected a folder, its ~ replaced")
        if isinstance(value, bool) and expected is not bool:
            raise ValueError("a true or false of YAML; quote it if it is text")
        return value

    @field_validator("text_template", "prompt_template", "completion_template")
    @classmethod
    def _check_template(cls, template: str | None, info: Any) -> str | None:
        try:
            (template or "").format_map(collections.defaultdict(str))
            parsed = string.Formatter().parse(template or "")
            columns = [(name, spec or "") for _, name, spec, _ in parsed if name is not None]
            if any(name.isdigit() or set(".[{") & {*name, *spec} for name, spec in columns):
                raise ValueError
        except (ValueError, LookupError, AttributeError) as error:
            raise ValueError("expected plain columns such as {quote}") from error
        if template is not None and not columns and info.field_name != "prompt_template":
            raise ValueError("expected a column such as {quote}")
        return template

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        errors = list(_contradictions(self))
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def base_bits(self) -> int:
        """Bits a weight of the base's linear modules: 4, 8, or 16 for whatever `dtype` says."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 16

    def knobs(self, *roles: ResumeRole) -> dict[str, Any]:
        """The knobs whose meaning for a resume is one of `roles`, as JSON values."""
        wanted = {name for name in FIELDS if FIELDS[name].json_schema_extra["resume"] in roles}
        return {name: value for name, value in knob_values(self).items() if name in wanted}


TYPES = typing.get_type_hints(Config)
FIELDS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Config)}
"""Name -> pydantic's FieldInfo: default, description, limits, meaning for a resume."""


def _contradictions(config: Config) -> Iterator[str]:
    """What is wrong between knobs that are each in range."""
    if config.max_steps is not None and config.warmup_steps > config.max_steps:
        run = f"the run, max_steps {config.max_steps}"
        yield f"warmup_steps: {config.warmup_steps:g} is longer than {run}"
    if (config.prompt_template is None) != (config.completion_template is None):
        yield "prompt_template, completion_template: one is given, both are needed"
    if config.prompt_template is not None and config.text_template is not None:
        yield "text_template: given together with prompt_template; choose one"
    if config.dataset_test_split is not None and config.eval_fraction > 0:
        yield "eval_fraction: given together with dataset_test_split; choose one"
    if config.load_in_4bit and config.load_in_8bit:
        yield "load_in_4bit, load_in_8bit: both are given; choose one"
    if config.use_dora and config.load_in_8bit:
        reason = "with load_in_8bit PEFT 0.21 loses the scales of the base"
        yield f"use_dora: {reason}; write load_in_4bit"
    if config.dtype == "float64" and config.base_bits < 16:
        yield "dtype: float64 with a quantized base, which computes in float32 or less"


def knob_values(config: Config) -> dict[str, Any]:
    """Knobs as JSON and YAML values."""
    values = {name: getattr(config, name) for name in FIELDS}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
