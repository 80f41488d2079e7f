"""Is this the adapter that the run trained? Its tensors and config, held against `run.json`."""

import json
import re
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from loop.errors import CheckpointError

_TENSOR = re.compile(
    r"base_model\.model\.(?:.+\.)?(?P<module>[^.]+)\."
    r"(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?"
)


def check_adapter(files: dict[str, bytes], run: dict[str, Any]) -> None:
    """Raises: CheckpointError that names the first tensor or key that is not as `run.json` says."""
    content = files["adapter_model.safetensors"]
    try:
        tensors = load_safetensors(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise CheckpointError(f"adapter_model.safetensors: not safetensors: {error}") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    if header.get("__metadata__", {}) not in ({}, {"format": "pt"}):
        raise CheckpointError("adapter_model.safetensors: holds other metadata than its format")
    config = _check_config(files["adapter_config.json"], run)
    for name, tensor in tensors.items():
        parts = _TENSOR.fullmatch(name)
        if parts is None or parts["module"] not in config["target_modules"]:
            raise CheckpointError(
                f"adapter_model.safetensors: {name} is no tensor of this adapter; a base's weight?"
            )
        ranks = {"lora_A": tensor.shape[:1], "lora_B": tensor.shape[1:2]}
        rank = ranks.get(parts["part"], (config["r"],))
        if tuple(rank) != (config["r"],):
            raise CheckpointError(
                f"adapter_model.safetensors: {name} is {list(tensor.shape)}, r is {config['r']}"
            )
    actual = {
        name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in tensors.items()
    }
    stated: dict[str, Any] = run["census"]["tensors"]
    mismatched = sorted(name for name in {*actual, *stated} if actual.get(name) != stated.get(name))
    if mismatched:
        there, recorded = (facts.get(mismatched[0], "nothing") for facts in (actual, stated))
        both = f"found {there}, run.json states {recorded}"
        raise CheckpointError(f"adapter_model.safetensors: {mismatched[0]}: {both}")
    for name, tensor in tensors.items():  # whose dtype is the run's, and so one that can be asked
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"adapter_model.safetensors: {name} holds NaN or infinity")
    if not any(_moved(name, tensor) for name, tensor in tensors.items()):
        raise CheckpointError(
            "adapter_model.safetensors: lora_B is zero everywhere: nothing was trained"
        )


def _moved(name: str, tensor: Tensor) -> bool:
    return ".lora_B" in name and bool(tensor.any())


def read_adapter_config(content: bytes) -> dict[str, Any]:
    """Raises: CheckpointError unless it is a JSON object."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"adapter_config.json: not JSON: {error}") from error
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise CheckpointError(f"adapter_config.json: found a {kind}, expected an object")
    return config


def _check_config(content: bytes, run: dict[str, Any]) -> dict[str, Any]:
    """`adapter_config.json`, if its values follow from the run; another PEFT's keys are empty."""
    actual = read_adapter_config(content)
    identity, base = run["identity"], run["base"]
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=identity["lora_r"],
        lora_alpha=identity["lora_alpha"],
        lora_dropout=identity["lora_dropout"],
        use_rslora=identity["use_rslora"],
        use_dora=identity["use_dora"],
        inference_mode=True,
        base_model_name_or_path=base["commit"] and base["name"],
        revision=base["commit"],
    ).to_dict()
    expected: dict[str, Any] = {**lora, "target_modules": identity["lora_target_modules"]}
    expected["peft_version"] = actual.get("peft_version")
    for key in sorted({*actual, *expected}):
        value, wanted = actual.get(key), expected.get(key)
        is_empty = key not in expected and value in (None, False, {}, [])
        if value != wanted and not is_empty:
            both = f"{key} is {value!r}, the run's is {wanted!r}"
            raise CheckpointError(f"adapter_config.json: {both}")
    return actual
