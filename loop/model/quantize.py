"""A base in 4 or 8 bits through bitsandbytes: how it is loaded, counted, and kept trainable."""

import math

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import BitsAndBytesConfig


def quantization_config(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """For `from_pretrained`: 4 is nf4 with double quantization, 8 is LLM.int8(), 16 is None.

    Weights of linear modules are quantized while they load, the head, embeddings, norms and biases
    stay in `dtype`.
    Source: Dettmers et al. 2023 (QLoRA), section 3; Dettmers et al. 2022 (LLM.int8())."""
    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else None


def keep_trainable(model: nn.Module) -> None:
    """Stop quantized modules from changing in a forward, as those of bitsandbytes 0.50 do.

    4 bits, on CPUs with avx512_bf16: the first forward without gradients repacks the weights into a
    form that backward cannot read. After an evaluation Llama would train without any gradient, and
    without an error. 8 bits: each forward casts the bias, for good, to the dtype of its input,
    which under autocast is another."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt) and module.bias is not None:
            module.register_forward_pre_hook(lambda own, inputs: (inputs[0].to(own.bias.dtype),))


def num_parameters(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for; two of them share a byte in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def dtype_name(parameter: nn.Parameter) -> str:
    """float32, bfloat16, int8, ..., or nf4."""
    state = getattr(parameter, "quant_state", None)
    return str(parameter.dtype).removeprefix("torch.") if state is None else str(state.quant_type)
