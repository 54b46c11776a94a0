"""What the loader tells the optimizer about the batch in flight."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dp.errors import DistDpError


class StepState:
    """Couples a drawn batch to exactly one optimizer step.

    A Poisson batch that is drawn is charged; stepping twice on it, or drawing the next before
    the step, would make the accounting wrong, so both are errors.
    """

    def __init__(self) -> None:
        self.step = 0
        self.batch_size = 0
        self.is_real: Tensor | None = None

    def begin(self, step: int, num_real: int, padded_size: int) -> None:
        """A batch was drawn for ``step``: the first ``num_real`` examples count.

        Args:
            step: Number of the step, from 1.
            num_real: Records sampled on this rank.
            padded_size: Examples in the batch, padding included; equal on all ranks.

        Raises:
            DistDpError: The batch before was never stepped.
        """
        if self.is_real is not None:
            raise DistDpError(
                f"the batch of step {self.step} was drawn but never stepped: call "
                "optimizer.step() once for every batch of the private loader (no read-ahead)"
            )
        self.step = step
        self.batch_size = num_real
        self.is_real = torch.arange(padded_size) < num_real

    def take(self, batch: int | None) -> Tensor:
        """The mask of real examples of the batch in flight, bool ``[batch]``; ends the step.

        Raises:
            DistDpError: No batch is in flight, or the model saw another number of examples.
        """
        if self.is_real is None:
            raise DistDpError(
                "optimizer.step() without a new batch: draw one batch from the private loader "
                "for every step"
            )
        if batch is not None and batch != self.is_real.numel():
            raise DistDpError(
                f"the model saw {batch} examples, the private loader gave "
                f"{self.is_real.numel()}: pass each batch to the model whole and once"
            )
        mask, self.is_real = self.is_real, None
        return mask
