"""The examples of one user in a batch, and the norm of the gradient they have together.

With users as units of privacy what is clipped is a user's gradient, the sum over its examples. Its
norm is not the sum of their norms, so dense layers and tables are asked for it as such: a layer
sees a user's examples side by side, as it sees the positions of one example.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_dp.clipping.dense_rules import Record


@dataclass(frozen=True)
class Bucket:
    """Units with about as many examples.

    Attributes:
        units: int64 ``[units]``, their numbers in the batch.
        examples: int64 ``[units, size]``, the examples of each; behind a unit's last one its first
            stands for nothing.
        is_there: bool ``[units, size]``, which of them count.
        is_full: Whether all do.
    """

    units: Tensor
    examples: Tensor
    is_there: Tensor
    is_full: bool

    def gather(self, record: Record) -> Record:
        """What a layer took in and got back, by unit.

        Returns:
            Inputs and output gradient, ``[units, size, ...]``, the gradient zero where no example
            is. The input there is another one of the same unit, so that a number that is not finite
            can spoil no other unit's norm.
        """
        inputs, delta = record
        mine = delta[self.examples]
        if not self.is_full:
            there = self.is_there.view(*self.is_there.shape, *[1] * (mine.dim() - 2))
            mine = torch.where(there, mine, 0.0)
        return tuple(x[self.examples] for x in inputs), mine


class UserGroups:
    """Whose the examples of a batch are.

    The examples of a user follow each other, user after user. Padding comes last; each of its
    examples is a unit of its own, behind the users, so that its gradient is in no user's norm.

    Guarantee:
        Every real example belongs to exactly one user, and no padding to any.

    Args:
        sizes: int64 ``[users]``, how many examples each user has, each at least 1.
        batch: Examples, padding included.

    Attributes:
        num_users: Users in the batch.
        num_units: Users and padding.
        batch: Examples.
        one_each: Whether every user has one example only.
        unit_of: int64 ``[batch]``, the unit of each example.
        buckets: The units by their numbers of examples, rounded up to powers of two: gathering
            them at most doubles their memory.
    """

    def __init__(self, sizes: Tensor, batch: int) -> None:
        real = int(sizes.sum())
        if real > batch or (sizes.numel() and int(sizes.min()) < 1):
            raise ValueError(
                f"users of {sizes.tolist()} examples in a batch of {batch}: each has at least one, "
                "and all must fit"
            )
        self.num_users = sizes.numel()
        self.num_units = self.num_users + batch - real
        self.batch = batch
        self.one_each = real == self.num_users
        sizes = torch.cat([sizes, sizes.new_ones(batch - real)])
        self.unit_of = torch.repeat_interleave(sizes, output_size=batch)
        self.buckets: list[Bucket] = []
        starts = sizes.cumsum(0) - sizes
        done, size = 0, 1
        while done < self.num_units:
            units = torch.nonzero((sizes > size // 2) & (sizes <= size)).squeeze(1)
            if units.numel():
                self.buckets.append(_bucket(units, starts[units], sizes[units], size))
            done, size = done + units.numel(), 2 * size

    def to(self, device: torch.device) -> UserGroups:
        """The same on a device; itself if it is there already."""
        if self.unit_of.device == device:
            return self
        moved = UserGroups.__new__(UserGroups)
        moved.__dict__.update(self.__dict__)
        moved.unit_of = self.unit_of.to(device)
        moved.buckets = [
            Bucket(b.units.to(device), b.examples.to(device), b.is_there.to(device), b.is_full)
            for b in self.buckets
        ]
        return moved

    def spread(self, values: Tensor) -> Tensor:
        """Each example's value from its unit's, float ``[batch]``."""
        return values[self.unit_of]


def _bucket(units: Tensor, starts: Tensor, sizes: Tensor, size: int) -> Bucket:
    places = torch.arange(size)
    is_there = places < sizes.unsqueeze(1)
    examples = starts.unsqueeze(1) + torch.where(is_there, places, 0)
    return Bucket(units, examples, is_there, bool(is_there.all()))
