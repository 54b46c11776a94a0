"""Fixed hashes: tokens to 63-bit ids, and records to numbers that decide their split.

The token hash has no key and depends on nothing but the table's name and the token. So ids
reveal nothing about which other tokens the data hold (a vocabulary counted on private data
does), the same token means the same row in every data set, and a table's size may change
without converting again, because the reduction modulo its rows happens in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_MASK_63 = np.uint64(2**63 - 1)
_SPLIT_PERSON = b"dist_dp.split"
_USER_PERSON = b"dist_dp.user"
_CACHE_LIMIT = 500_000


def _personalisation(table: str) -> bytes:
    name = table.encode()
    return name if len(name) <= 16 else blake2b(name, digest_size=16).digest()


def hash_tokens(table: str, tokens: Iterable[bytes]) -> NDArray[np.int64]:
    """Hashes tokens for one table: BLAKE2b of 8 bytes, personalised by the table's name.

    Args:
        table: Name of the table (longer than 16 bytes: a hash of it is used).
        tokens: Raw tokens; the empty one stands for a missing value.

    Returns:
        int64 array, one value in [0, 2**63) for each token.
    """
    person = _personalisation(table)
    digests = b"".join([blake2b(t, digest_size=8, person=person).digest() for t in tokens])
    return (np.frombuffer(digests, dtype="<u8") & _MASK_63).astype(np.int64)


class TokenHasher:
    """:func:`hash_tokens` for one table, with a bounded memory of tokens already seen."""

    def __init__(self, table: str) -> None:
        """Prepares the hash of ``table``."""
        self._person = _personalisation(table)
        self._prepare()

    @classmethod
    def of_users(cls) -> TokenHasher:
        """The hash of users' keys; it is no table's."""
        made = cls.__new__(cls)
        made._person = _USER_PERSON
        made._prepare()
        return made

    def _prepare(self) -> None:
        self._known: dict[bytes, bytes] = {}

    def __call__(self, tokens: list[bytes]) -> NDArray[np.int64]:
        """Hashes tokens as :func:`hash_tokens` does."""
        known, person = self._known, self._person
        if len(known) > _CACHE_LIMIT:
            known.clear()
        digests = []
        for token in tokens:
            digest = known.get(token)
            if digest is None:
                digest = known[token] = blake2b(token, digest_size=8, person=person).digest()
            digests.append(digest)
        return (np.frombuffer(b"".join(digests), dtype="<u8") & _MASK_63).astype(np.int64)


def record_keys(records: Iterable[bytes], split_seed: int) -> NDArray[np.uint64]:
    """One 64-bit number for each record, a function of its bytes and the seed alone.

    Equal records get equal keys, so copies of a record never lie in two splits.

    Args:
        records: Raw bytes of each record (a line, without its end).
        split_seed: Seed of the split, in [0, 2**64).

    Returns:
        uint64 array, uniform over its range.
    """
    salt = split_seed.to_bytes(8, "little")
    digests = [blake2b(r, digest_size=8, salt=salt, person=_SPLIT_PERSON).digest() for r in records]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
