"""The frozen base, the adapter on it, the census of what is trained, and the base's checksum."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, extract_commit_hash

from loop.config import Config
from loop.errors import CheckpointError, ConfigError, HubError, NonFiniteError
from loop.quantise import dtype_name, keep_trainable, num_parameters, quantization_config

_EXPECTED = "expected a folder with config.json, tokenizer.json and *.safetensors (pytorch_model.bin is never opened)"
_HINTS = {
    "deserializing header": "a Git LFS pointer or an error page? download it again: hf download NAME --local-dir DIR",
    "custom code": "code from a model repository is never run; use a model that transformers has",
}
"""What helps, by words in what transformers and safetensors say."""


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The base's own tokenizer, as it is. Raises: ConfigError for a folder, HubError for a Hub id."""
    with _clear_errors(config, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=False, token=False
        )


def base_commit(config: Config) -> str | None:
    """The commit that the base's revision is on the Hub, or was when it was downloaded; None for a folder.

    Raises: ConfigError where an absolute path is not there, HubError."""
    path = Path(config.model_name_or_path)
    if path.is_absolute() and not path.exists():
        raise ConfigError(f"model_name_or_path: found no folder {path}; expected one with safetensors")
    if path.exists():
        return None
    with _clear_errors(config, "config.json"):
        file = cached_file(config.model_name_or_path, "config.json", revision=config.model_revision, token=False)
    return extract_commit_hash(file, None)


def base_dtype(device: torch.device, precision: str = "no") -> Literal["float32", "bfloat16", "float16"]:
    """Where the config names none: float32 on CPU; on a GPU bfloat16, or float16 if that is its precision."""
    if device.type != "cuda":
        return "float32"
    bf16 = precision != "fp16" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if bf16 else "float16"


def load_base(config: Config, device: torch.device) -> PreTrainedModel:
    """The base in one dtype on one device, quantised if asked: safetensors only, no code of its repository, no token.

    Raises: ConfigError for a folder, HubError for a Hub id."""
    dtype: torch.dtype = getattr(torch, config.dtype or base_dtype(device))
    bits = 4 if config.load_in_4bit else 8 if config.load_in_8bit else 16
    with _clear_errors(config, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path,
            revision=config.model_revision,
            dtype=dtype,
            quantization_config=quantization_config(bits, dtype),
            device_map={"": device} if device.type == "cuda" or bits < 16 else None,
            use_safetensors=True,
            trust_remote_code=False,
            token=False,
            output_loading_info=True,
        )
        model: PreTrainedModel = loaded[0]
        loading: dict[str, Any] = loaded[1]
        if loading["missing_keys"] or loading["mismatched_keys"]:  # transformers would make them up, with a warning
            missing = sorted(str(key) for key in [*loading["missing_keys"], *loading["mismatched_keys"]])
            raise ValueError(f"no fitting tensor for {', '.join(missing[:3])}")
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError("it is an adapter (adapter_config.json), which transformers put on its base")
    keep_trainable(model)
    model.generation_config = GenerationConfig()  # its own defaults would fill what a sample leaves open
    return model


def base_config(config: Config) -> dict[str, Any]:
    """The base's `config.json`, as far as it decides what the model computes."""
    with _clear_errors(config, "config.json"):
        values, _ = PretrainedConfig.get_config_dict(
            config.model_name_or_path, revision=config.model_revision, token=False
        )
    return without_volatile(values)


def without_volatile(values: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` without what says where the model lay or which version of a library wrote it."""
    volatile = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")
    return {key: value for key, value in values.items() if key not in volatile}


def add_adapter(base: PreTrainedModel, config: Config) -> PeftModel:
    """Freeze the base and put LoRA on it: A random from `seed`, B zero, so that step 0 starts at the base.

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
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that it has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        model = get_peft_model(base, lora)
    lora.target_modules = sorted(lora.target_modules or [])  # a set's order changes with Python's hash seed
    if config.gradient_checkpointing:
        base.activation_checkpointing_enable()
    return model


def causal_lm_of(model: PeftModel) -> PreTrainedModel:
    """The transformers model that the adapter was put into; its forward runs the adapter too."""
    causal_lm = model.get_base_model()
    assert isinstance(causal_lm, PreTrainedModel)
    return causal_lm


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Every tensor that is trained, by its name in `adapter_model.safetensors`, sorted by name.

    This is the order of the census, of the flat gradient, of the optimizer and of the checkpoint.
    Raises: ConfigError if nothing is trainable; AssertionError if something outside the adapter is."""
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    names = {tensor.data_ptr(): name for name, tensor in saved.items()}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    strangers = [name for name, parameter in trainable.items() if parameter.data_ptr() not in names]
    assert not strangers, f"trainable, but not part of the adapter: {strangers}"
    assert all(parameter.dtype.itemsize >= 4 for parameter in trainable.values()), "trained below float32"
    if not trainable:
        raise ConfigError("lora_target_modules: nothing is trainable")
    return dict(sorted((names[parameter.data_ptr()], parameter) for parameter in trainable.values()))


def gradients(parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    """What backward left in each, flattened. Raises: NonFiniteError by name where it left nothing, silently."""
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    if missing:
        raise NonFiniteError(f"{missing[0]}: is trained but got no gradient, like {len(missing) - 1} others")
    return [parameter.grad.flatten() for parameter in parameters.values() if parameter.grad is not None]


def frozen_layout(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every frozen tensor: what no forward may change, and a quantised module might."""
    return {name: (p.shape, p.dtype) for name, p in model.named_parameters() if not p.requires_grad}


def restore_adapter(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copy saved tensors into the adapter, all or none. Raises: CheckpointError by name."""
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in parameters.items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if found != shapes:
        odd = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
        raise CheckpointError(f"adapter_model.safetensors: missing, unexpected or of another shape: {odd[:3]}")
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
    """`adapter_config.json` with sorted keys; the base by its Hub id, or null where it is a local folder."""
    values: dict[str, Any] = model.peft_config["default"].to_dict()
    local = Path(config.model_name_or_path).exists()
    values |= {
        "base_model_name_or_path": None if local else config.model_name_or_path,
        "revision": None if local else config.model_revision,
        "inference_mode": True,
    }
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def base_checksum(model: PeftModel) -> str:
    """One sha256 over name, shape, dtype and content of every frozen tensor: the base's identity.

    Taken again after training it proves that no byte of the base moved. Each tensor of a GPU is copied to memory for
    it, one per thread; a processor's core hashes about a gigabyte a second."""
    trained = {parameter.data_ptr() for parameter in adapter_parameters(model).values()}
    tensors, seen = {}, set()
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.data_ptr() not in trained and place not in seen:  # a tied tensor counts once
            seen.add(place)
            tensors[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    with ThreadPoolExecutor() as pool:
        lines = pool.map(_checksum_line, tensors, tensors.values())
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _checksum_line(name: str, tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return f"{name} {list(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()}\n"


def _target_modules(base: PreTrainedModel, asked: tuple[str, ...] | None) -> list[str]:
    """The modules to adapt. PEFT itself is silent about a name that matches nothing beside one that does."""
    head = base.get_output_embeddings()
    linear = {name: module for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    if asked == ("all-linear",):  # PEFT's own rule: every linear module but the head
        return sorted({name.rsplit(".", 1)[-1] for name, module in linear.items() if module is not head})
    candidates = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    names = asked if asked is not None else DEFAULT_TARGETS.get(base.config.model_type)
    if names is None:
        raise ConfigError(f"lora_target_modules: no default for {base.config.model_type}; choose of {candidates}")
    missing = [name for name in names if not any(m == name or m.endswith("." + name) for m in linear)]
    if missing:
        raise ConfigError(f"lora_target_modules: {', '.join(missing)} is not in this model; it has {candidates}")
    return list(names)


@contextmanager
def _clear_errors(config: Config, what: str) -> Iterator[None]:
    """What transformers raises while it loads, as one sentence."""
    name = config.model_name_or_path
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        found = str(error).strip().split("\n")[0].rstrip(".")
        hint = next((hint for words, hint in _HINTS.items() if words in found), _EXPECTED)
        if Path(name).exists():
            raise ConfigError(f"model_name_or_path: no {what} in {name}: {found}; {hint}") from error
        download = f"hf download {name}, then HF_HUB_OFFLINE=1"
        ways = f"expected a folder, or a Hub id that is online or downloaded before: {download}"
        raise HubError(f"model_name_or_path: {name}: {found}; {ways if hint == _EXPECTED else hint}") from error
