"""What the loader tells the optimizer about the batch in flight."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dp.clipping.user_groups import UserGroups
from dist_dp.errors import DistDpError


class StepState:
    """Couples a drawn batch, micro-batch by micro-batch, to exactly one optimizer step.

    A Poisson batch that is drawn is charged; stepping twice on a part of it, leaving one out, or
    drawing the next batch before the step, would make the accounting wrong, so all are errors.
    So is to go on after a step that failed: what failed may be one record's doing (a gradient
    that is not finite), and leaving its batch out would tell of it.

    Attributes:
        step: Number of the step in flight, from 1; 0 before the first.
        part: Number of its micro-batch, from 0.
        is_last: Whether that is the step's last one.
        batch_size: How many real examples it has on this rank.
        is_real: Mask of the real examples in flight, bool ``[batch]``; None once they are taken.
        users: Which of them belong to one user; None where the unit of privacy is a record.
    """

    def __init__(self) -> None:
        self.step = 0
        self.part = 0
        self.is_last = True
        self.batch_size = 0
        self.is_real: Tensor | None = None
        self.users: UserGroups | None = None
        self._unfinished = False

    def begin(
        self,
        step: int,
        num_real: int,
        padded_size: int,
        part: int = 0,
        is_last: bool = True,
        users: UserGroups | None = None,
    ) -> None:
        """A micro-batch was drawn for ``step``: the first ``num_real`` examples count.

        Args:
            step: Number of the step, from 1.
            num_real: Records sampled on this rank that are in this micro-batch.
            padded_size: Examples in it, padding included; equal on all ranks.
            part: Number of the micro-batch in its step, from 0.
            is_last: Whether no other follows in this step.
            users: Whose the examples are, with users as units of privacy.

        Raises:
            DistDpError: The micro-batch before was never stepped, or this is not the next one, or
                the step before failed.
        """
        self.check_nothing_failed()
        if self.is_real is not None:
            raise DistDpError(
                f"the batch of step {self.step} was drawn but never stepped: call "
                "optimizer.step() once for every batch of the private loader (no read-ahead)"
            )
        expected = 0 if self.is_last else self.part + 1
        if part != expected or (part > 0 and step != self.step):
            raise DistDpError(
                f"step {self.step} was left after {self.part + 1} of its micro-batches: its "
                "clipped sums are not whole, and nothing can be trained after it. Draw every batch "
                "of the private loader (loader.stop() ends after a whole step), or resume from "
                "the last checkpoint"
            )
        self.step, self.part, self.is_last = step, part, is_last
        self.batch_size = num_real
        self.users = users
        self.is_real = torch.arange(padded_size) < num_real

    def take(self, batch: int | None) -> Tensor:
        """The mask of real examples of the micro-batch in flight, bool ``[batch]``; ends it.

        From here to :meth:`finish` the step is unfinished: if it fails, nothing follows it.

        Raises:
            DistDpError: No batch is in flight, the model saw another number of examples, or the
                step before failed.
        """
        self.check_nothing_failed()
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
        self._unfinished = True
        return mask

    def finish(self) -> None:
        """The micro-batch that was taken has had its effect."""
        self._unfinished = False

    def check_nothing_failed(self) -> None:
        """Refuses to go on, or to publish, after a step that failed.

        Raises:
            DistDpError: One did.
        """
        if self._unfinished:
            raise DistDpError(
                f"step {self.step} failed in optimizer.step(), perhaps because of what its records "
                "hold: going on without them, or publishing what was trained until then, would "
                "tell of them. Resume from the last checkpoint with the cause removed (a lower "
                "learning rate, other features), or start a new run"
            )
