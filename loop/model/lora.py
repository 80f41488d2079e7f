"""The adapter on the frozen base: what is trained, by name, and the census of it."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loop.config.knobs import Config
from loop.errors import CheckpointError, ConfigError, TrainingStateError
from loop.model.quantize import dtype_name, num_parameters


def add_adapter(base: PreTrainedModel, config: Config) -> PeftModel:
    """Freeze the base and put LoRA on it: A random from `seed`, B zero, so step 0 is at the base.

    Raises: ConfigError that lists the candidates where a target module names nothing."""
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_target_modules(base, config.lora_target_modules),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
    )
    torch.manual_seed(config.seed)
    with warnings.catch_warnings():
        # PEFT 0.21 uses a name that transformers 5.23 has deprecated.
        deprecated = ".*is_gradient_checkpointing.*"
        warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
        model = get_peft_model(base, lora, autocast_adapter_dtype=True)  # float32 on a bf16 base
    # A set's order changes with Python's hash seed.
    lora.target_modules = sorted(lora.target_modules or [])
    if config.gradient_checkpointing:
        base.activation_checkpointing_enable()
    return model


def leave_inputs_to_autocast(model: PeftModel) -> None:
    """Keep PEFT from copying each LoRA input to float32, which autocast would only undo.

    In a Llama-8B step that is 0.8 of 7.7 GB (simulated); the bits were the same (measured)."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def causal_lm_of(model: PeftModel) -> PreTrainedModel:
    """The transformers model that the adapter was put into; its forward runs the adapter too."""
    causal_lm = model.get_base_model()
    assert isinstance(causal_lm, PreTrainedModel)
    return causal_lm


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Every tensor that is trained, by its name in `adapter_model.safetensors`, sorted by name.

    This is the order of the census, of the flat gradient, of the optimizer and of the checkpoint.
    Raises: ConfigError if nothing is trainable; AssertionError if more than the adapter is."""
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    names = {tensor.data_ptr(): name for name, tensor in saved.items()}
    trainable = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    strangers = [name for name, parameter in trainable.items() if parameter.data_ptr() not in names]
    assert not strangers, f"trainable, but not part of the adapter: {strangers}"
    is_wide = all(parameter.dtype.itemsize >= 4 for parameter in trainable.values())
    assert is_wide, "trained below float32"
    if not trainable:
        raise ConfigError("lora_target_modules: nothing is trainable")
    named = ((names[parameter.data_ptr()], parameter) for parameter in trainable.values())
    return dict(sorted(named))


def gradients(parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    """What backward left in each, flattened.

    Raises: TrainingStateError by name where it silently left nothing."""
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    if missing:
        raise TrainingStateError(
            f"{missing[0]}: is trained but got no gradient, like {len(missing) - 1} others"
        )
    return [
        parameter.grad.flatten() for parameter in parameters.values() if parameter.grad is not None
    ]


def restore_adapter(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copy saved tensors into the adapter, all or none. Raises: CheckpointError by name."""
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in parameters.items()}
    saved = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if saved != shapes:
        mismatched = sorted(
            name for name in {*shapes, *saved} if shapes.get(name) != saved.get(name)
        )
        raise CheckpointError(
            f"adapter_model.safetensors: missing, unexpected or of another shape: {mismatched[:3]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def census(model: PeftModel) -> dict[str, Any]:
    """What is trained and what is not: counts, and name, shape and dtype of each trained tensor."""
    trained = adapter_parameters(model)
    adapter_config = model.peft_config["default"].to_dict()
    return {
        "target_modules": adapter_config["target_modules"],
        "trained_parameters": sum(parameter.numel() for parameter in trained.values()),
        "all_parameters": sum(num_parameters(parameter) for parameter in model.parameters()),
        "base_dtypes": sorted({dtype_name(p) for p in model.parameters() if not p.requires_grad}),
        "tensors": {name: [list(p.shape), dtype_name(p)] for name, p in trained.items()},
    }


def adapter_config_json(model: PeftModel, config: Config) -> bytes:
    """`adapter_config.json` with sorted keys; the base by its Hub id, null for a local folder."""
    values: dict[str, Any] = model.peft_config["default"].to_dict()
    local = Path(config.model_name_or_path).exists()
    values |= {
        "base_model_name_or_path": None if local else config.model_name_or_path,
        "revision": None if local else config.model_revision,
        "inference_mode": True,
    }
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _target_modules(base: PreTrainedModel, requested: tuple[str, ...] | None) -> list[str]:
    """The modules to adapt.

    PEFT itself is silent about a name that matches nothing beside one that does."""
    head = base.get_output_embeddings()
    linear = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    if requested == ("all-linear",):  # PEFT's own rule: every linear module but the head
        return sorted(
            {name.rsplit(".", 1)[-1] for name, module in linear.items() if module is not head}
        )
    candidates = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    names = requested if requested is not None else DEFAULT_TARGETS.get(base.config.model_type)
    if names is None:
        raise ConfigError(
            f"lora_target_modules: no default for {base.config.model_type}; choose of {candidates}"
        )
    missing = [
        name for name in names if not any(m == name or m.endswith("." + name) for m in linear)
    ]
    if missing:
        raise ConfigError(
            f"lora_target_modules: {', '.join(missing)} is not in this model; it has {candidates}"
        )
    return list(names)
