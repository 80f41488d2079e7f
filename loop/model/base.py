"""The frozen base: its commit, its dtype, its config, and how it is loaded."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from loop.config.knobs import Config
from loop.data.tokenizer import clear_errors
from loop.errors import ConfigError
from loop.model.quantize import keep_trainable, quantization_config

_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth"}


def base_commit(config: Config) -> str | None:
    """The commit of the base's revision on the Hub, or at its download; None for a folder.

    Raises: ConfigError where an absolute path is not there, HubError."""
    path = Path(config.model_name_or_path)
    if path.is_absolute() and not path.exists():
        raise ConfigError(
            f"model_name_or_path: found no folder {path}; expected one with safetensors"
        )
    if path.is_file() or (path.suffix in _WEIGHTS and not path.exists()):
        hint = "expected the folder that holds config.json, tokenizer.json and *.safetensors"
        raise ConfigError(f"model_name_or_path: {path} is a file's name; {hint}")
    if path.exists():
        return None
    with clear_errors(config, "config.json"):
        file = cached_file(
            config.model_name_or_path, "config.json", revision=config.model_revision, token=False
        )
    return extract_commit_hash(file, None)


def base_dtype(
    device: torch.device, precision: str = "no"
) -> Literal["float32", "bfloat16", "float16"]:
    """Where the config names none: float32 on CPU; on a GPU bfloat16, or float16 for fp16."""
    if device.type != "cuda":
        return "float32"
    bf16 = precision != "fp16" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if bf16 else "float16"


def load_base(config: Config, device: torch.device) -> PreTrainedModel:
    """The base in one dtype on one device, quantized where the config says so.

    From safetensors only, with no code of its repository and no token.
    Raises: ConfigError for a folder, HubError for a Hub id."""
    dtype: torch.dtype = getattr(torch, config.dtype or base_dtype(device))
    with clear_errors(config, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path,
            revision=config.model_revision,
            dtype=dtype,
            quantization_config=quantization_config(config.base_bits, dtype),
            device_map={"": device} if device.type == "cuda" or config.base_bits < 16 else None,
            use_safetensors=True,
            trust_remote_code=False,
            token=False,
            output_loading_info=True,
        )
        model: PreTrainedModel = loaded[0]
        loading: dict[str, Any] = loaded[1]
        keys = [*loading["missing_keys"], *loading["mismatched_keys"]]
        if keys:  # transformers would make them up, with a warning
            missing = sorted(str(key) for key in keys)
            raise ValueError(f"no fitting tensor for {', '.join(missing[:3])}")
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "it is an adapter (adapter_config.json), which transformers put on its base"
            )
    keep_trainable(model)
    model.generation_config = GenerationConfig()  # its own would fill what a sample leaves open
    return model


def base_config(config: Config) -> dict[str, Any]:
    """The base's `config.json`, as far as it decides what the model computes."""
    with clear_errors(config, "config.json"):
        values, _ = PretrainedConfig.get_config_dict(
            config.model_name_or_path, revision=config.model_revision, token=False
        )
    return without_volatile(values)


def without_volatile(values: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` without where the model lay and which version of a library wrote it."""
    volatile = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")
    return {key: value for key, value in values.items() if key not in volatile}
