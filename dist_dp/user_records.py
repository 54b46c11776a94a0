"""Which records each user has."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_dp.errors import ConfigError

Int64Array = NDArray[np.int64]


class UserRecords:
    """The users of a data set, numbered, and the records of each.

    Users are numbered in the order of their keys, a user's records in the order of the data set. It
    holds 8 bytes for each record and 8 for each user; making it takes about 16 bytes more a record.

    Guarantee:
        Every record belongs to exactly one user, and all records with equal keys to the same one,
        wherever they lie in the data set. Two users whose keys are equal (hashes that collide) are
        one unit: both are protected, together. Every rank must be given the same keys.

    Args:
        keys: The key of each record's user, integers ``[records]``, of any kind and order.

    Raises:
        ConfigError: ``keys`` are no integers in one dimension, or there are none.
    """

    def __init__(self, keys: Any) -> None:
        found = np.asarray(keys.cpu() if isinstance(keys, torch.Tensor) else keys)
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise ConfigError(
                f"users: {found.dtype} of shape {list(found.shape)} given; give one integer for "
                "each record of the data set, equal for the records of one user"
            )
        if found.size == 0:
            raise ConfigError("users: empty; give one integer for each record of the data set")
        # Stable: a user's records stay in the order of the data set.
        self._records: Int64Array = np.argsort(found, kind="stable")
        ordered = found[self._records]
        ends = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        self._starts: Int64Array = np.concatenate([[0], ends, [found.size]]).astype(np.int64)

    @property
    def num_users(self) -> int:
        """Users with at least one record."""
        return len(self._starts) - 1

    @property
    def num_records(self) -> int:
        """Records of all users together."""
        return len(self._records)

    def counts(self, users: Int64Array) -> Int64Array:
        """How many records users have, int64 ``[users]``."""
        counts: Int64Array = self._starts[users + 1] - self._starts[users]
        return counts

    def mean_records(self, most: int) -> float:
        """Mean over users of how many records take part in a step of theirs."""
        return float(np.minimum(np.diff(self._starts), most).mean())

    def windows(self, users: Int64Array, first: Int64Array, sizes: Int64Array) -> Int64Array:
        """Some records of users, user after user.

        Args:
            users: Numbers of users, int64 ``[users]``.
            first: The place of the first record to take among each user's, int64 ``[users]``.
            sizes: How many to take, at most all of them, int64 ``[users]``; after a user's last
                record its first follows.

        Returns:
            Record numbers, int64 ``[sizes.sum()]``.
        """
        before = np.cumsum(sizes) - sizes
        within = np.arange(int(sizes.sum()), dtype=np.int64) - np.repeat(before, sizes)
        within += np.repeat(first, sizes)
        within %= np.repeat(self.counts(users), sizes)
        found: Int64Array = self._records[np.repeat(self._starts[users], sizes) + within]
        return found


def users_of(data: Any, users: Any = None) -> UserRecords:
    """The users of a data set.

    Args:
        data: What batches are drawn from.
        users: The user of each record, integers ``[records]``, or None for those that a data set of
            :mod:`dist_dp.datasets` was converted with.

    Raises:
        ConfigError: It is not known whose the records are, or for another number of records.
    """
    if isinstance(users, UserRecords):
        found = users
    elif users is not None:
        found = UserRecords(users)
    elif getattr(data, "user_keys", None) is None:
        raise ConfigError(
            f"users: a {type(data).__name__} does not say whose its records are: give "
            "users=, one integer for each record"
        )
    else:
        found = UserRecords(data.user_keys())
    total = len(getattr(data, "dataset", data))
    if found.num_records != total:
        raise ConfigError(
            f"users: {found.num_records} numbers given for {total} records; give one for each "
            "record, in the order of the data set"
        )
    return found
