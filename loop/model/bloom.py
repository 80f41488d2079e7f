"""BLOOM's body on packed rows: the modules are the model's own, only their order is written here.

transformers 5.23 has one attention for BLOOM, on padded rows. Here linear modules and norms see no
padding, attention is torch's, on all rows at once or on each group of them, and GELU is torch's:
transformers' is Python, one pass over memory a sign. Before step 0
`model/body.py::check_padding_free` compares it with the model's own forward, on rows of the run."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BloomModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from loop.data.batch import Batch
from loop.model.attention import (
    alibi_columns,
    attention_dtype,
    biased_attention,
    can_pack,
    packed_alibi_attention,
)


def is_plain(model: BloomModel) -> bool:
    """Is there nothing in its config that `bloom_hidden` does not do?

    Without this check dropout in the base would not show."""
    config = model.config
    return not (
        config.hidden_dropout
        or config.attention_dropout
        or config.apply_residual_connection_post_layernorm
    )


def bloom_hidden(model: BloomModel, batch: Batch) -> Tensor:
    """The hidden states below the head. Shapes: (T, hidden size).

    Source: transformers 5.23, models/bloom/modeling_bloom.py, BloomModel.forward."""
    hidden = model.word_embeddings_layernorm(model.word_embeddings(batch.input_ids))
    # In the dtype of attention, else autocast would make every layer a copy of its own.
    attend = attention_of(model, batch, attention_dtype(hidden))
    for block in model.h:
        if model.training and block.gradient_checkpointing:
            hidden = checkpoint(bloom_block, block, hidden, attend, use_reentrant=False)
        else:
            hidden = bloom_block(block, hidden, attend)
    last: Tensor = model.ln_f(hidden)
    return last


def attention_of(model: BloomModel, batch: Batch, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What mixes the tokens of each row, the same in every layer.

    Shapes: (T, heads, 3, head size) -> (T, heads, head size)."""
    device, size = batch.input_ids.device, model.config.hidden_size // model.num_heads
    if can_pack(device, dtype, {size}):
        two = torch.ones(1, 2, dtype=torch.int64, device=device)
        slopes = build_alibi_tensor(two, model.num_heads, torch.float32)[:, 0, 1]  # of position 1
        columns = alibi_columns(batch, slopes, dtype, size)
        return lambda qkv: packed_alibi_attention(
            qkv.to(dtype), columns, batch.starts, batch.longest
        )
    width = 8 * math.ceil(batch.longest / 8)  # else CUDA's kernel copies it for each layer
    bias = causal_alibi(width, model.num_heads, dtype, device)
    return lambda qkv: biased_attention(qkv, bias, batch.grids)


def bloom_block(block: Any, hidden: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """A BloomBlock: attention and MLP, each behind a norm and added to what it was given.

    Shapes: (T, hidden size)."""
    attention, mlp = block.self_attention, block.mlp
    fused = attention.query_key_value(norm(block.input_layernorm, hidden))
    qkv = fused.unflatten(-1, (attention.num_heads, 3, attention.head_dim))
    hidden = hidden + attention.dense(attend(qkv).flatten(1))
    widened = mlp.dense_h_to_4h(norm(block.post_attention_layernorm, hidden))
    added: Tensor = hidden + mlp.dense_4h_to_h(F.gelu(widened, approximate="tanh"))
    return added


def norm(module: nn.LayerNorm, hidden: Tensor) -> Tensor:
    """The norm before a product: under bf16 autocast on CUDA in bfloat16, elsewhere as it comes.

    Autocast on CUDA would read and write float32, which the product behind it rounds to bfloat16
    anyway. Mean and variance are float32 inside the kernel, and what is added from layer to layer
    stays float32. It costs the rounding of the input, and saves a ninth of what a layer keeps."""
    low = torch.bfloat16  # float16 would overflow on what BLOOM's layers add up
    autocast = hidden.is_cuda and torch.is_autocast_enabled("cuda")
    if not autocast or torch.get_autocast_dtype("cuda") != low:
        normed: Tensor = module(hidden)
        return normed
    with torch.autocast("cuda", enabled=False):
        weight, bias = module.weight.to(low), module.bias.to(low)
        return F.layer_norm(hidden.to(low), module.normalized_shape, weight, bias, module.eps)


def causal_alibi(width: int, num_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """transformers' ALiBi of the keys' positions in their row, -inf on the future.

    Shapes: (1, heads, width, width)."""
    row = torch.ones(1, width, dtype=torch.int64, device=device)
    alibi: Tensor = build_alibi_tensor(row, num_heads, dtype)
    future = torch.ones(width, width, dtype=torch.bool, device=device).triu(1)
    return alibi.masked_fill(future, float("-inf"))[None]
