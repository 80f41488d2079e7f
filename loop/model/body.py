"""The model below its head: a batch in, the hidden state of each token out, in two layouts."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BloomModel, PreTrainedModel

from loop.data.batch import Batch
from loop.model.attention import ROWS
from loop.model.bloom import bloom_hidden, is_plain


class PackedBody(NamedTuple):
    """How the body of one kind of model computes packed rows, each seeing itself alone."""

    is_possible: Callable[[Any], bool]  # of the body: does its config ask for nothing beyond this?
    hidden_states: Callable[[Any, Batch], Tensor]  # of the body: (T, hidden size)
    attention: str | None = None  # transformers' name of the attention to switch the model to


def _through_attention_interface(body: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's own forward on one sequence; its keywords carry `batch` to `attention.py`.

    transformers' layers hand what they do not know to the attention function, `rows_attention`."""
    ids, positions = batch.input_ids[None], batch.position_ids[None]
    output = body(input_ids=ids, position_ids=positions, batch=batch, use_cache=False)
    last: Tensor = output.last_hidden_state
    return last[0]


PACKED_BODIES = {BloomModel: PackedBody(is_plain, bloom_hidden)}
"""Kinds whose forward is written out here: transformers has but one attention for them."""
_ANY_OTHER = PackedBody(
    lambda body: body._supports_attention_backend, _through_attention_interface, ROWS
)


def packed_body(causal_lm: PreTrainedModel) -> PackedBody:
    """The entry of PACKED_BODIES for this model, else through transformers' attention interface."""
    body = causal_lm.base_model
    kinds = (packed for kind, packed in PACKED_BODIES.items() if isinstance(body, kind))
    return next(kinds, _ANY_OTHER)


def hidden_states(causal_lm: PreTrainedModel, batch: Batch, padding_free: bool) -> Tensor:
    """Packed, by `packed_body`; padded, by the model's own forward. Shapes: (T, hidden size)."""
    if padding_free:
        return packed_body(causal_lm).hidden_states(causal_lm.base_model, batch)
    (grid,) = batch.grids
    return grid.unpad(causal_lm.base_model(**padded_inputs(batch)).last_hidden_state)


def own_logits(causal_lm: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's own, head and all, of padded rows. Shapes: (T, vocabulary)."""
    (grid,) = batch.grids
    return grid.unpad(causal_lm(**padded_inputs(batch)).logits)


def padded_inputs(batch: Batch) -> dict[str, Tensor | bool]:
    """For a model of transformers: (rows, width) ids, and a mask of their lengths."""
    (grid,) = batch.grids
    mask = grid.pad(torch.ones_like(batch.input_ids))
    return {"input_ids": grid.pad(batch.input_ids), "attention_mask": mask, "use_cache": False}


def check_padding_free(
    causal_lm: PreTrainedModel, padded: Batch, free: Batch, tolerance: float
) -> float:
    """Compare the layouts on real rows, without gradients; if they agree, ready the model to pack.

    The padded one in float32, the packed one as training runs it: so what is measured is the error
    of the second alone. (transformers' own bf16 forward of BLOOM is 5e-2 off its float32.)

    Returns the relative difference of the hidden states of the row where it is largest, so that a
    long row does not hide what leaked into a short one; infinite where the model has no packing."""
    packed, before = packed_body(causal_lm), causal_lm.config._attn_implementation
    # Some models keep a window in their mask alone: it is not made here, and would show little.
    text = causal_lm.config.get_text_config()
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    is_narrow = any(window is not None and window < free.longest for window in windows)
    if is_narrow or not packed.is_possible(causal_lm.base_model):
        return math.inf
    with torch.no_grad():
        with _in_float32(causal_lm.base_model, padded.input_ids.device.type):
            own = hidden_states(causal_lm, padded, padding_free=False)
        if packed.attention is not None:
            causal_lm.set_attn_implementation(packed.attention)
        try:
            packed_rows = hidden_states(causal_lm, free, padding_free=True)
            difference = _of_the_worst_row(packed_rows - own, own, free)
        except ValueError:  # transformers' refusal of an option that its SDPA does not have
            difference = math.inf
    if not difference < tolerance:
        causal_lm.set_attn_implementation(before)
    return difference


@contextmanager
def _in_float32(body: nn.Module, device: str) -> Iterator[None]:
    """Without autocast, each layer's weights widened while it runs, one layer of them at a time.

    A quantized model stays as training runs it: it has no other weights to be compared with."""
    if not all(parameter.is_floating_point() for parameter in body.parameters()):
        yield
        return
    narrow: dict[nn.Parameter, torch.dtype] = {}

    def widen(layer: nn.Module, _inputs: object) -> None:
        for parameter in layer.parameters():
            if parameter.dtype.itemsize < 4:
                narrow[parameter] = parameter.dtype
                parameter.data = parameter.data.float()

    def restore(layer: nn.Module, _inputs: object, _outputs: object) -> None:
        for parameter in layer.parameters():
            if parameter in narrow:
                parameter.data = parameter.data.to(narrow.pop(parameter))

    children = [child if isinstance(child, nn.ModuleList) else [child] for child in body.children()]
    layers = [layer for child in children for layer in child]
    hooks = [layer.register_forward_pre_hook(widen) for layer in layers]
    hooks += [layer.register_forward_hook(restore) for layer in layers]
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        restore(body, None, None)


def _of_the_worst_row(difference: Tensor, values: Tensor, batch: Batch) -> float:
    """The largest ratio of the norms of a row. Shapes: (T, hidden size) both."""
    row = (batch.position_ids == 0).cumsum(0)
    lengths = row.unique_consecutive(return_counts=True)[1].tolist()
    above, below = (
        torch.stack([part.norm() for part in tensor.split(lengths)])
        for tensor in (difference, values)
    )
    return float((above / below).max())
