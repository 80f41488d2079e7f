"""The one module that is prepared and called: a batch in, the summed loss of its targets out."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from loop.data.batch import Batch
from loop.model.body import hidden_states, own_logits

VOCABULARY_BLOCK, GPU_VOCABULARY_BLOCK = 4096, 16_384
"""Tokens of the vocabulary whose logits are alive at once. 2,048 to 8,192 were alike on two CPUs'
caches. A GPU's holds no block either way, and each is 20 launches: four times as large, they cost
0.4 GB at 4,000 targets and gave 9 % on an H200."""
CHUNK_TARGETS = 256
"""Targets whose logits are alive at once where the loss is not fused.

For BLOOM's vocabulary of 250,880 that is 257 MB of float32."""


class SummedLoss(nn.Module):
    """`forward(batch)` -> negative log-likelihood of all its targets, in nats, summed.

    A sum, not a mean: the divisor belongs to the whole step, and only `train.py` knows it."""

    def __init__(self, model: nn.Module, causal_lm: PreTrainedModel) -> None:
        """`model` owns all parameters, the adapter's too; `causal_lm` is transformers' in it."""
        super().__init__()
        self.model = model
        self._causal_lm = (causal_lm,)  # in a tuple: registered once, through `model`
        self.padding_free = False  # else each batch has to be one grid
        self.fused = True  # where the head is a frozen linear module
        self.own_logits = False
        """Set by `check_head` where logits are not head(hidden): the model's, at their memory."""

    def forward(self, batch: Batch) -> Tensor:
        """Shapes: scalar, float32 (float64 for float64), with a gradient even without a target."""
        (causal_lm,) = self._causal_lm
        if self.own_logits:
            logits = own_logits(causal_lm, batch).index_select(0, batch.target_positions)
            return _nll(logits, batch.targets)
        hidden = hidden_states(causal_lm, batch, self.padding_free)
        hidden = hidden.index_select(0, batch.target_positions)
        head = causal_lm.get_output_embeddings()
        if self.fused and type(head) is nn.Linear and not head.weight.requires_grad:
            return fused_loss(hidden, head.weight, head.bias, batch.targets)
        loss_sum: Tensor = hidden.new_zeros((), dtype=_loss_dtype(hidden))
        for rows, wanted in zip(hidden.split(CHUNK_TARGETS), batch.targets.split(CHUNK_TARGETS)):
            # Checkpointed: backward computes these logits again rather than keep them.
            loss_sum = loss_sum + checkpoint(
                lambda h, t: _nll(head(h), t), rows, wanted, use_reentrant=False
            )
        return loss_sum


class _FusedLoss(torch.autograd.Function):
    """A frozen linear head's summed loss and its inputs' gradient, in one pass over the vocabulary.

    Logits are never whole: for each block of the vocabulary exp(logit - largest yet) is summed, and
    multiplied with the block's own rows of the head, which gives the gradient of log-sum-exp; what
    an older, smaller maximum was used for is shrunk to the new one. So each logit is computed once,
    and a block of them fits the cache. The target's own weight is kept out of these sums: where it
    is nearly all of the probability, its row of the head, rounded to bf16 in one product and
    subtracted exact, would leave more rounding than gradient. Source: Milakov and Gimelshein 2018,
    "Online normalizer calculation for softmax"; Dao et al. 2022 (FlashAttention), algorithm 1,
    whose keys and values are both the head's rows here."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        with_gradient: bool,
    ) -> Tensor:
        """Shapes: hidden (N, H), weight (V, H), bias (V,), targets (N,) -> scalar."""
        dtype = _loss_dtype(hidden)
        largest = hidden.new_full((len(hidden), 1), -math.inf, dtype=dtype)
        # `others` sums exp(logit - largest), but not the target's; `wanted` is the target's logit;
        # `pulled` sums what `others` does, each times the head's row.
        others, wanted = torch.zeros_like(largest), torch.zeros_like(largest)
        pulled = torch.zeros_like(hidden, dtype=dtype)
        size = GPU_VOCABULARY_BLOCK if hidden.is_cuda else VOCABULARY_BLOCK
        for start in range(0, len(weight), size):
            part = slice(start, start + size)
            block = weight[part]
            product = F.linear(hidden, block, None if bias is None else bias[part])
            logits, column = product.to(dtype), (targets - start)[:, None]
            inside, column = (column >= 0) & (column < len(block)), column.clamp(0, len(block) - 1)
            wanted = torch.where(inside, logits.gather(1, column), wanted)
            before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
            # exp, at a third of its price on a CPU.
            weights = logits.sub_(largest).mul_(math.log2(math.e)).exp2_()
            weights.scatter_(1, column, weights.gather(1, column).masked_fill_(inside, 0.0))
            shrink = (before - largest).exp_()
            others.mul_(shrink).add_(weights.sum(1, keepdim=True))
            if with_gradient:
                pulled.mul_(shrink).add_(weights.to(product.dtype) @ block)
            del product, logits, weights  # else they would be alive beside the next block's
        total = others + (wanted - largest).exp()
        gradient = pulled.sub_(others * weight[targets]).div_(total) if with_gradient else None
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return (largest + total.log() - wanted).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (pulled,) = ctx.saved_tensors
        return (pulled * gradient).to(ctx.dtype), None, None, None, None


def fused_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """-log softmax(hidden @ weight.T + bias)[targets], summed; only `hidden` gets a gradient."""
    loss_sum: Tensor = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, torch.is_grad_enabled()
    )
    return loss_sum


def check_head(loss: SummedLoss, padded: Batch, tolerance: float) -> float:
    """Compare head(hidden) with the model's own logits on a real batch; use these if they differ.

    Some models (Granite, Cohere, Gemma 2) scale or cap logits after the head.
    Returns the relative difference."""
    (causal_lm,) = loss._causal_lm
    with torch.no_grad():
        own = own_logits(causal_lm, padded)
        hidden = hidden_states(causal_lm, padded, padding_free=False)
        ours = causal_lm.get_output_embeddings()(hidden)
    difference = float((ours - own).norm() / own.norm())
    loss.own_logits = not difference < tolerance
    return difference


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over targets, with log-softmax in float32 whatever the dtype of the head."""
    loss_sum: Tensor = F.cross_entropy(logits.to(_loss_dtype(logits)), targets, reduction="sum")
    return loss_sum


def _loss_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
