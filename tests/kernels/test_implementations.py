"""Every implementation gives the same bits: AVX-512, AVX2, portable C++ and the reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_dp import kernels
from dist_dp.kernels import chacha, dispatch, native, reference
from dist_dp.kernels.request import Update

KEY = bytes(range(7, 39))
ISAS = native.isas() if native.available() else ()

pytestmark = pytest.mark.skipif(not ISAS, reason="no C++ compiler: there are no compiled kernels")


def make_update(
    rows: int = 301,
    columns: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    listed: bool = True,
    **other: object,
) -> Update:
    """A random update: rows in random order, some without noise, columns strided."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 2 * columns, generator=generator).to(dtype)[:, :columns]
    count = rows - 40
    scale = torch.rand(count, generator=generator, dtype=torch.float64)
    scale[::9] = 0.0
    made = Update(
        weight=weight,
        rows=torch.randperm(rows, generator=generator)[:count] if listed else None,
        first_row=0 if listed else 17,
        count=count,
        key=KEY,
        row_offset=2**33 - 100,
        column_offset=5,
        from_steps=torch.randint(0, 9, (count,), generator=generator, dtype=torch.int32),
        to_step=9,
        decay=torch.rand(count, generator=generator),
        scale=scale,
        rounds=12,
        stochastic=False,
        grid=0.0,
    )
    return replace(made, **other)  # type: ignore[arg-type]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def result(update: Update, isa: str | None, threads: int = 1) -> torch.Tensor:
    weight = update.weight.clone(memory_format=torch.preserve_format)
    copy = replace(update, weight=weight)
    if isa is None:
        reference.settle(copy)
    else:
        native.settle(copy, isa=isa, threads=threads)
    return bits(weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rounds", [8, 12, 20])
def test_words(isa: str, rounds: int) -> None:
    counters = np.random.default_rng(3).integers(0, 2**32, (4, 1003), dtype=np.uint32)
    assert np.array_equal(
        native.blocks(KEY, counters, rounds, isa=isa), chacha.blocks(KEY, counters, rounds)
    )


@pytest.mark.parametrize("isa", ISAS)
def test_published_vector(isa: str) -> None:
    """RFC 8439, section 2.3.2."""
    key = bytes(range(32))
    counters = np.array([[1], [0x09000000], [0x4A000000], [0]], np.uint32)
    made = native.blocks(key, counters, 20, isa=isa)
    assert made[:, 0].astype("<u4").tobytes().hex() == (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )


@pytest.mark.parametrize("isa", ISAS)
def test_normals(isa: str) -> None:
    """A million normals with hundreds of far-tail words, at unaligned columns."""
    rows = torch.from_numpy(np.random.default_rng(4).integers(0, 2**48, 8000))
    steps = (rows % 5).int()
    for offset, columns in ((0, 128), (3, 21), (16, 1), (0, 16), (31, 2), (2**17 - 9, 9)):
        expected = reference.normals(KEY, rows.numpy(), steps.numpy(), 5, offset, columns, 20)
        made = native.normals(KEY, rows, steps, 5, offset, columns, 20, isa=isa, threads=2)
        assert np.array_equal(made.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (torch.float32, {}),
        (torch.float32, {"grid": 2.0**-12}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"stochastic": True}),
        (torch.float16, {}),
        (torch.float16, {"stochastic": True}),
    ],
)
def test_updates(isa: str, listed: bool, dtype: torch.dtype, other: dict[str, object]) -> None:
    for columns in (1, 5, 16, 37, 130):
        update = make_update(columns=columns, dtype=dtype, listed=listed, **other)
        expected = result(update, None)
        assert not torch.equal(expected, bits(update.weight))
        for threads in (1, 3):
            assert torch.equal(result(update, isa, threads), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_strides(isa: str) -> None:
    """Rows apart, columns apart, both, and transposed."""
    update = make_update(64, 64)
    expected = result(update, None)
    count = update.count
    for shape, view in (
        ((128, 64), lambda w: w[::2]),
        ((64, 192), lambda w: w[:, ::3]),
        ((192, 128), lambda w: w[::3, ::2]),
        ((64, 64), lambda w: w.t()),
        ((1, 64, 2, 64), lambda w: w[0, :, 1]),
    ):
        weight = view(torch.full(shape, math.nan))
        weight.copy_(update.weight)
        native.settle(replace(update, weight=weight), isa=isa, threads=2)
        assert torch.equal(bits(weight), expected)
    for name in ("rows", "from_steps", "decay", "scale"):
        apart = getattr(update, name).repeat_interleave(2)[::2]
        assert apart.stride(0) == 2 and apart.numel() == count
        assert torch.equal(result(replace(update, **{name: apart}), isa), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_weights(isa: str, dtype: torch.dtype) -> None:
    """Zeros, subnormals, the largest numbers, infinities and NaN come out as in the reference."""
    special = torch.tensor(
        [0.0, -0.0, 1e-40, -1e-45, 6e-8, -3e-5, 65504.0, -65519.0, 65520.0, 3e38, -3.4e38,
         math.inf, -math.inf, math.nan, 1.0, -1.0]
    )  # fmt: skip
    for stochastic in (False, True):
        for grid in (0.0, 2.0**-10) if dtype == torch.float32 else (0.0,):
            for scale in (0.0, 1e-30, 1e-3, 50.0):
                update = make_update(
                    special.numel() + 40,
                    16,
                    dtype=dtype,
                    listed=False,
                    first_row=0,
                    stochastic=stochastic and dtype != torch.float32,
                    grid=grid,
                    scale=torch.full((special.numel(),), scale),
                    decay=torch.ones(special.numel()),
                )
                update.weight[: special.numel()] = special[:, None].to(dtype)
                got, expected = result(update, isa), result(update, None)
                # NaN has many patterns; which one is not promised
                other = got != expected
                kind = torch.float32 if dtype == torch.float32 else dtype
                assert got.view(kind)[other].isnan().all()
                assert expected.view(kind)[other].isnan().all()


def test_stochastic_rounding_is_unbiased() -> None:
    """Means over 2^16 roundings, each within 6 standard errors (level below 1e-6 together)."""
    value = torch.tensor([1.003, -0.3337, 2.0**-20 * 1.7, 7.0e-6, 300.17])
    random = torch.arange(2**16, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        for x in value:
            rounded = reference.stochastically(x.expand(2**16), random, dtype).double()
            unit = float(rounded.max() - rounded.min())
            # every random number once: exact but for the 16-bit cut
            assert abs(float(rounded.mean() - x)) <= max(unit, 1e-12) * 2.0**-16
            assert rounded.unique().numel() <= 2


def test_noise_below_half_a_unit_survives_random_rounding() -> None:
    weight = torch.ones(2000, 64, dtype=torch.bfloat16)
    nearest = weight.clone()
    options = {"key": KEY, "from_steps": 0, "to_step": 1, "decay": 1.0, "scale": 2.0**-13}
    kernels.settle_range(weight, **options)  # type: ignore[arg-type]
    kernels.settle_range(nearest, rounding="nearest", **options)  # type: ignore[arg-type]
    assert torch.equal(nearest, torch.ones_like(nearest))  # the noise vanished
    noise = weight.double() - 1.0
    # E (up - down) = E z = 0; 6 standard errors of the mean of +-2^-7 and -2^-8 steps
    assert float(noise.mean().abs()) < 6 * float(noise.std()) / math.sqrt(noise.numel())
    assert float((noise != 0).double().mean()) == pytest.approx(0.0187, rel=0.1)


def test_environment_chooses() -> None:
    code = (
        "from dist_dp import kernels; import torch; print(kernels.implementation());"
        "print(kernels.normal(bytes(32), torch.arange(3), 0, 1, num_columns=2).tolist())"
    )
    seen = {}
    for wanted in ("reference", *ISAS):
        done = subprocess.run(
            [sys.executable, "-c", code],
            # another test of the same process may have silenced warnings
            env={**os.environ, dispatch.VARIABLE: wanted, "PYTHONWARNINGS": "default"},
            capture_output=True,
            text=True,
            check=True,
        )
        name, numbers = done.stdout.splitlines()
        seen[name] = numbers
        assert ("SlowKernelsWarning" in done.stderr) == (wanted == "reference")
    assert len(seen) == 1 + len(ISAS) and len(set(seen.values())) == 1
    wrong = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, dispatch.VARIABLE: "avx1024"},
        capture_output=True,
        text=True,
    )
    assert "avx1024: this machine has" in wrong.stderr


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler at installation: the reference runs, with the same numbers and one warning."""
    rows = torch.arange(10)
    expected = kernels.normal(KEY, rows, 0, 1, num_columns=20)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(dispatch, "_warned", set())
    assert kernels.implementation() == "reference (NumPy)"
    reason = kernels.slow_reason()
    assert reason is not None and "C++ compiler" in reason and "make setup" in reason
    with pytest.warns(kernels.SlowKernelsWarning, match="C\\+\\+ compiler"):
        assert torch.equal(kernels.normal(KEY, rows, 0, 1, num_columns=20), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.settle_range(torch.zeros(3, 3), key=KEY, from_steps=0, to_step=1, decay=1, scale=1)


def test_a_library_of_another_version_is_refused(tmp_path: object) -> None:
    from pathlib import Path

    broken = Path(str(tmp_path)) / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(ImportError, match="make setup"):
        native.library(broken)


def test_the_key_is_not_shown() -> None:
    shown = repr(make_update())
    assert "key" not in shown and str(KEY) not in shown


@pytest.mark.parametrize("isa", ISAS)
def test_the_threads_arithmetic_does_not_matter(isa: str) -> None:
    """A process that flushes subnormal numbers to zero gets the same bits."""
    update = make_update(64, 16, listed=False, first_row=0, scale=torch.full((24,), 1e-39))
    update.weight[:] = 1e-39
    expected = result(update, isa, threads=1)
    assert (expected != 0).any()
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormal numbers")
        assert torch.equal(result(update, isa, threads=1), expected)
        assert torch.tensor(1e-39).mul(1.0) == 0  # the caller's setting is as it was
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("isa", [*ISAS, None])
def test_zeros_of_the_grid_have_one_sign(isa: str | None) -> None:
    """The sign of a stored zero would tell on which side of 0 the unnoised weight was."""
    update = make_update(400, 64, listed=False, grid=2.0**-10, scale=torch.full((360,), 2.0**-7))
    update = replace(update, decay=torch.ones(360))
    for value in (-1e-9, 1e-9, -0.0):
        update.weight.fill_(value)
        settled = result(update, isa)[17:377]
        assert (settled == 0).sum() > 100
        assert not (settled == bits(torch.tensor([-0.0]))).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (torch.float32, {}),
        (torch.float32, {"grid": 2.0**-9}),
        (torch.float16, {"stochastic": True}),
    ],
)
def test_rows_without_noise_at_the_end(
    isa: str, dtype: torch.dtype, other: dict[str, object]
) -> None:
    """They are decayed once, also where a thread's share of the rows ends with them."""
    for rows, quiet in ((3, 1), (50, 7), (50, 50), (2000, 300), (2000, 1999)):
        scale = torch.ones(rows)
        scale[-quiet:] = 0.0
        scale[250:256] = 0.0  # the end of a chunk of 256 rows
        update = make_update(
            rows + 40, 128, dtype=dtype, listed=False, first_row=0, scale=scale, **other
        )
        for threads in (1, 2):
            assert torch.equal(result(update, isa, threads), result(update, None))


@pytest.mark.parametrize("isa", [*ISAS, None])
def test_halves_of_the_grid_go_to_the_even_side(isa: str | None) -> None:
    update = make_update(41, 8, listed=False, first_row=0, grid=1.0, scale=torch.zeros(1))
    update = replace(update, decay=torch.ones(1))
    update.weight[0] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, 2.0**24 + 2])
    settled = result(update, isa)[0].view(torch.float32)
    assert settled.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 4.0, 2.0**24]
