"""Proof that the base did not move: a sha256 of every frozen tensor, and the shape of each."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from peft import PeftModel
from torch import Tensor, nn

from loop.model.lora import adapter_parameters


def frozen_tensors(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every frozen tensor: no forward may change them, a quantized one might."""
    return {name: (p.shape, p.dtype) for name, p in model.named_parameters() if not p.requires_grad}


def base_checksum(model: PeftModel) -> str:
    """One sha256 over name, shape, dtype and content of every frozen tensor: the base's identity.

    Taken again after training it proves that no byte of the base moved. Each tensor of a GPU is
    copied to memory for it, one per thread; a processor's core hashes about a gigabyte a second."""
    trained = {parameter.data_ptr() for parameter in adapter_parameters(model).values()}
    tensors, seen = {}, set()
    for name, tensor in sorted(model.state_dict().items()):
        storage = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.data_ptr() not in trained and storage not in seen:  # a tied tensor counts once
            seen.add(storage)
            tensors[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    with ThreadPoolExecutor() as pool:
        lines = pool.map(_checksum_line, tensors, tensors.values())
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _checksum_line(name: str, tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return f"{name} {list(tensor.shape)} {tensor.dtype} {hashlib.sha256(content).hexdigest()}\n"
