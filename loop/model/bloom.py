"""BLOOM's body on packed rows: the modules are the model's own, only their order is written here.

transformers 5.23 has one attention for BLOOM, on padded rows. Here linear modules and norms see no
padding, attention is torch's SDPA on each group of rows, and GELU is torch's: transformers' is
Python, one pass over memory a sign. Before step 0 `model/body.py::check_padding_free` compares it
with the model's own forward, on rows of the run."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import BloomModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from loop.data.batch import Batch, Grid
from loop.model.attention import biased_attention


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
    device = hidden.device.type
    # In the dtype of attention, else autocast would make every layer a copy of its own.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # A multiple of 8, else CUDA's kernel copies it for each layer.
    width = 8 * math.ceil(max(grid.width for grid in batch.grids) / 8)
    bias = causal_alibi(width, model.num_heads, dtype, hidden.device)
    for block in model.h:
        if model.training and block.gradient_checkpointing:
            hidden = checkpoint(bloom_block, block, hidden, bias, batch.grids, use_reentrant=False)
        else:
            hidden = bloom_block(block, hidden, bias, batch.grids)
    last: Tensor = model.ln_f(hidden)
    return last


def bloom_block(block: Any, hidden: Tensor, bias: Tensor, grids: list[Grid]) -> Tensor:
    """A BloomBlock: attention and MLP, each behind a norm and added to what it was given.

    Shapes: (T, hidden size)."""
    attention, mlp = block.self_attention, block.mlp
    fused = attention.query_key_value(block.input_layernorm(hidden))
    qkv = fused.unflatten(-1, (attention.num_heads, 3, attention.head_dim))
    hidden = hidden + attention.dense(biased_attention(qkv, bias, grids).flatten(1))
    widened = mlp.dense_h_to_4h(block.post_attention_layernorm(hidden))
    added: Tensor = hidden + mlp.dense_4h_to_h(F.gelu(widened, approximate="tanh"))
    return added


def causal_alibi(width: int, num_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """transformers' ALiBi of the keys' positions in their row, -inf on the future.

    Shapes: (1, heads, width, width)."""
    row = torch.ones(1, width, dtype=torch.int64, device=device)
    alibi: Tensor = build_alibi_tensor(row, num_heads, dtype)
    future = torch.ones(width, width, dtype=torch.bool, device=device).triu(1)
    return alibi.masked_fill(future, float("-inf"))[None]
