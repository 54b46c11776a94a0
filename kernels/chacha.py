"""The ChaCha block function in NumPy, over many blocks at a time.

Source: RFC 8439, section 2.3 (ChaCha20); with 12 or 8 rounds the same function stops earlier.
The four words 12..15, which the RFC splits into a counter and a nonce, are free for the caller:
two blocks are independent whenever the key or any of the four words differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt32Array = NDArray[np.uint32]

ROUNDS = (20, 12, 8)
"""The numbers of rounds on offer; 20 is the standard's."""

KEY_BYTES = 32
WORDS_PER_BLOCK = 16

CHUNK_BLOCKS = 8192
"""Blocks worked on together: 16 words each, 512 KiB, so that the rounds stay in the L2 cache."""

CONSTANTS = np.frombuffer(b"expand 32-byte k", dtype="<u4").astype(np.uint32)


def blocks(key: bytes, inputs: UInt32Array, rounds: int = 20) -> UInt32Array:
    """Compute ChaCha blocks.

    Args:
        key: 32 bytes.
        inputs: uint32 [4, n]; column i holds the words 12..15 of block i.
        rounds: 20, 12 or 8.

    Returns:
        uint32 [16, n]; column i holds the words 0..15 of block i (the RFC's key stream is their
        little-endian bytes).

    Raises:
        ValueError: the key has another length, or `rounds` is not on offer.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: {KEY_BYTES} bytes expected, {len(key)} given")
    if rounds not in ROUNDS:
        raise ValueError(f"rounds: one of {ROUNDS} expected, {rounds} given")
    count = inputs.shape[1]
    fixed = np.concatenate([CONSTANTS, np.frombuffer(key, dtype="<u4").astype(np.uint32)])
    output = np.empty((WORDS_PER_BLOCK, count), np.uint32)
    size = min(count, CHUNK_BLOCKS)
    state = np.empty((WORDS_PER_BLOCK, size), np.uint32)
    scratch = np.empty((4, size), np.uint32)
    for first in range(0, count, CHUNK_BLOCKS):
        part = inputs[:, first : first + CHUNK_BLOCKS]
        width = part.shape[1]
        x, spare = state[:, :width], scratch[:, :width]
        x[:12] = fixed[:, None]
        x[12:] = part
        for _ in range(rounds // 2):
            _double_round(x[0:4], x[4:8], x[8:12], x[12:16], spare)
        x[:12] += fixed[:, None]
        x[12:] += part
        output[:, first : first + width] = x
    return output


def _rotate(x: Any, bits: int, spare: Any) -> None:
    np.left_shift(x, bits, out=spare)
    np.right_shift(x, 32 - bits, out=x)
    np.bitwise_or(x, spare, out=x)


def _double_round(a: Any, b: Any, c: Any, d: Any, spare: Any) -> None:
    """One column round and one diagonal round on the four rows of the state, each [4, n].

    The diagonal round pairs row entry i of `a` with entry i+1 of `b`, i+2 of `c`, i+3 of `d`
    (modulo 4). Slices express that without moving a word.
    """
    for turn_d, turn_b in ((16, 12), (8, 7)):
        a += b
        d ^= a
        _rotate(d, turn_d, spare)
        c += d
        b ^= c
        _rotate(b, turn_b, spare)
    for turn_d, turn_b in ((16, 12), (8, 7)):
        a[0:3] += b[1:4]
        a[3] += b[0]
        d[0:3] ^= a[1:4]
        d[3] ^= a[0]
        _rotate(d, turn_d, spare)
        c[0:2] += d[1:3]
        c[2] += d[3]
        c[3] += d[0]
        b[1:3] ^= c[2:4]
        b[3] ^= c[0]
        b[0] ^= c[1]
        _rotate(b, turn_b, spare)
