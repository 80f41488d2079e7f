"""The loss scale of fp16: gradients computed so much larger that small ones do not round to 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loop.errors import CheckpointError

START, GROW_AFTER = 2.0**16, 2000
"""Source: torch 2.13, amp/grad_scaler.py, defaults of GradScaler; it skips what this repeats."""
MAX_HALVINGS = 20


@dataclass
class LossScale:
    """A power of two, which rounds nothing by itself.

    Equal on every process: it follows the summed gradient."""

    dynamic: bool  # fp16; else the value stays
    value: float = 1.0
    finite_steps: int = 0  # since it last changed
    halvings: int = 0  # of the step that is being repeated

    @property
    def can_halve(self) -> bool:
        """Is there a smaller scale to compute this step with once more?"""
        return self.dynamic and self.halvings < MAX_HALVINGS

    def halve(self) -> None:
        """Half the scale, for the same step once more."""
        self.value, self.finite_steps, self.halvings = self.value / 2, 0, self.halvings + 1

    def count_step(self) -> None:
        """One more step with a finite gradient; after GROW_AFTER of them twice the scale."""
        self.finite_steps, self.halvings = self.finite_steps + 1, 0
        can_grow = self.dynamic and self.value < 2.0**127  # float32 ends there
        if can_grow and self.finite_steps >= GROW_AFTER:
            self.value, self.finite_steps = self.value * 2, 0

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, beside the optimizer's moments: nothing unless dynamic."""
        state = torch.tensor([self.value, self.finite_steps], dtype=torch.float64)
        return {"loss_scale": state} if self.dynamic else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take `loss_scale` out of a checkpoint's tensors.

        Raises: CheckpointError where it is missing."""
        if self.dynamic:
            if "loss_scale" not in tensors:
                raise CheckpointError("optimizer.safetensors: loss_scale is missing")
            value, finite_steps = tensors.pop("loss_scale").tolist()
            self.value, self.finite_steps = value, int(finite_steps)
