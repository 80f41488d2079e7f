"""The one module that is prepared and called: a batch in, the summed loss of its targets out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from loop.batch import IGNORE_INDEX, Batch

CHUNK_TARGETS = 256
"""Targets whose logits are alive at once: 256 x 250,880 float32 logits of BLOOM are 257 MB, for any batch."""


class SummedLoss(nn.Module):
    """`forward(batch)` -> negative log-likelihood of all its targets, in nats, summed.

    A sum, not a mean: the divisor belongs to the whole step, and only `train.py` knows it."""

    def __init__(self, model: nn.Module, causal_lm: PreTrainedModel) -> None:
        """`model` holds the adapter and owns all parameters; `causal_lm` is the transformers model inside it."""
        super().__init__()
        self.model = model
        self._causal_lm = (causal_lm,)  # in a tuple: registered once, through `model`
        self.whole_model = False
        """Set by `check_head` where logits are not head(hidden): then the model's own are used, at their memory."""

    def forward(self, batch: Batch) -> Tensor:
        """Shapes: scalar, float32 (float64 for a float64 model), with a gradient even if there is no target."""
        (causal_lm,) = self._causal_lm
        is_target = batch.targets != IGNORE_INDEX
        targets = batch.targets[is_target]
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        if self.whole_model:
            return _nll(causal_lm(**inputs).logits[is_target], targets)
        hidden = causal_lm.base_model(**inputs).last_hidden_state[is_target]  # (targets of the batch, hidden size)
        head = causal_lm.get_output_embeddings()
        loss_sum: Tensor = hidden.new_zeros((), dtype=_loss_dtype(hidden))
        for rows, wanted in zip(hidden.split(CHUNK_TARGETS), targets.split(CHUNK_TARGETS)):
            # Checkpointed: backward computes these logits again rather than keep them, for constant memory.
            loss_sum = loss_sum + checkpoint(lambda h, t: _nll(head(h), t), rows, wanted, use_reentrant=False)
        return loss_sum


def check_head(loss: SummedLoss, batch: Batch, tolerance: float) -> float:
    """Compare head(hidden) with the model's own logits on a real batch; where they differ, use the model's own.

    Some models scale or cap their logits after the head (Granite, Cohere, Gemma 2). Returns the relative difference."""
    loss.whole_model = False
    with torch.no_grad():
        ours = loss(batch)
        loss.whole_model = True
        own = loss(batch)
    difference = float((ours - own).abs() / own.abs().clamp(min=1e-6))
    loss.whole_model = not difference < tolerance
    return difference


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over targets, with log-softmax in float32 whatever the dtype of the head."""
    loss_sum: Tensor = F.cross_entropy(logits.to(_loss_dtype(logits)), targets, reduction="sum")
    return loss_sum


def _loss_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
