"""The block function against published vectors, and against a scalar one written from the RFC."""

from __future__ import annotations

import numpy as np
import pytest

from dist_dp.kernels import chacha


def block_bytes(key: bytes, words: list[int], rounds: int = 20) -> bytes:
    inputs = np.array(words, np.uint32).reshape(4, 1)
    return chacha.blocks(key, inputs, rounds)[:, 0].astype("<u4").tobytes()


def scalar_block(key: bytes, words: list[int], rounds: int) -> list[int]:
    mask = 0xFFFFFFFF
    start = [
        *np.frombuffer(b"expand 32-byte k", "<u4").tolist(),
        *np.frombuffer(key, "<u4").tolist(),
        *words,
    ]
    x = list(start)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for i, j, k, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[i] = (x[i] + x[j]) & mask
            x[k] ^= x[i]
            x[k] = ((x[k] << turn) | (x[k] >> (32 - turn))) & mask

    for _ in range(rounds // 2):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(a + b) & mask for a, b in zip(x, start, strict=True)]


def test_rfc8439_section_2_3_2() -> None:
    words = [1, 0x09000000, 0x4A000000, 0]
    expected = (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    assert block_bytes(bytes(range(32)), words).hex() == expected


@pytest.mark.parametrize(
    ("last_key_byte", "words", "expected"),
    [
        (
            0,
            [0, 0, 0, 0],
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
        ),
        (
            0,
            [1, 0, 0, 0],
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
            "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
        ),
    ],
)
def test_rfc8439_appendix_a_1(last_key_byte: int, words: list[int], expected: str) -> None:
    assert block_bytes(bytes(31) + bytes([last_key_byte]), words).hex() == expected


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (8, "3e00ef2f895f40d67f5bb8e81f09a5a12c840ec3ce9a7f3b181be188ef711a1e"),
        (12, "9bf49a6a0755f953811fce125f2683d50429c3bb49e074147e0089a52eae155f"),
    ],
)
def test_reduced_rounds_vectors(rounds: int, expected: str) -> None:
    assert block_bytes(bytes(32), [0, 0, 0, 0], rounds)[:32].hex() == expected


@pytest.mark.parametrize("rounds", chacha.ROUNDS)
def test_many_blocks_equal_the_scalar_function(rounds: int) -> None:
    random = np.random.default_rng(1)
    key = random.bytes(32)
    count = chacha.CHUNK_BLOCKS + 3  # crosses a chunk
    inputs = random.integers(0, 2**32, (4, count), dtype=np.uint32)
    before = inputs.copy()
    output = chacha.blocks(key, inputs, rounds)
    assert np.array_equal(inputs, before)
    for i in (0, 1, chacha.CHUNK_BLOCKS - 1, chacha.CHUNK_BLOCKS, count - 1):
        assert output[:, i].tolist() == scalar_block(key, inputs[:, i].tolist(), rounds)


def test_no_blocks() -> None:
    assert chacha.blocks(bytes(32), np.empty((4, 0), np.uint32)).shape == (16, 0)


def test_refusals() -> None:
    inputs = np.zeros((4, 1), np.uint32)
    with pytest.raises(ValueError, match="key"):
        chacha.blocks(bytes(16), inputs)
    with pytest.raises(ValueError, match="rounds"):
        chacha.blocks(bytes(32), inputs, 10)
