from __future__ import annotations

from hashlib import blake2b

import numpy as np

from dist_dp.datasets.convert import assign_splits
from dist_dp.datasets.hashing import TokenHasher, hash_tokens, record_keys


def test_token_hash_is_the_documented_one() -> None:
    digest = blake2b(b"68fd1e64", digest_size=8, person=b"C1").digest()
    expected = int.from_bytes(digest, "little") % 2**63
    assert hash_tokens("C1", [b"68fd1e64", b""])[0] == expected
    long = "a table with a name longer than sixteen bytes"
    person = blake2b(long.encode(), digest_size=16).digest()
    digest = blake2b(b"x", digest_size=8, person=person).digest()
    assert hash_tokens(long, [b"x"])[0] == int.from_bytes(digest, "little") % 2**63


def test_token_hash_depends_on_table_and_token_only() -> None:
    tokens = [b"a", b"b", b"a", b""]
    ids = hash_tokens("t", tokens)
    assert ids.dtype == np.int64
    assert (ids >= 0).all()
    assert ids[0] == ids[2]
    assert len(set(ids.tolist())) == 3
    assert not np.array_equal(ids, hash_tokens("u", tokens))
    hasher = TokenHasher("t")
    for _ in range(2):  # the second time from memory
        assert np.array_equal(hasher(tokens), ids)
    assert len(hasher([])) == 0


def test_splits_have_the_asked_shares() -> None:
    # Binomial with n = 100,000: 5 standard deviations, a level below 1e-6 a share; fixed keys.
    keys = record_keys([str(i).encode() for i in range(100_000)], 3)
    shares = {"train": 0.8, "valid": 0.15, "test": 0.05}
    counts = np.bincount(assign_splits(keys, shares), minlength=3)
    for count, share in zip(counts, shares.values(), strict=True):
        assert abs(count - 1e5 * share) < 5 * np.sqrt(1e5 * share * (1 - share))


def test_record_keys_depend_on_content_and_seed() -> None:
    keys = record_keys([b"x", b"y", b"x"], 0)
    assert keys[0] == keys[2] != keys[1]
    assert record_keys([b"x"], 1)[0] != keys[0]


def test_splits_cover_the_whole_range() -> None:
    edge = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert assign_splits(edge, {"a": 0.1, "b": 0.2, "c": 0.7}).tolist() == [0, 2]
