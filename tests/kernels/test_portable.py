"""The portable functions against mpmath at 40 digits."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from dist_dp.kernels import portable


def worst_ulps(values: np.ndarray, exact: list[mpmath.mpf]) -> float:
    errors = (
        abs(mpmath.mpf(float(v)) - e) / mpmath.mpf(float(np.spacing(abs(float(e)))))
        for v, e in zip(values, exact, strict=True)
    )
    return float(max(errors))


def test_log() -> None:
    random = np.random.default_rng(2)
    near_one = 1.0 - np.ldexp(1.0, -np.arange(1, 54))
    x = np.concatenate(
        [
            random.random(3000),
            np.ldexp(random.random(500) + 0.5, -random.integers(0, 66, 500)),
            near_one,
            [2.0**-65, 2.0**-64, 0.5, math.sqrt(0.5), np.nextafter(math.sqrt(0.5), 0), 0.25],
        ]
    )
    with mpmath.workdps(40):
        exact = [mpmath.log(mpmath.mpf(float(v))) for v in x]
        assert worst_ulps(portable.log(x), exact) < 2.0
    assert portable.log(np.array([1.0]))[0] == 0.0


def test_sin_cos() -> None:
    random = np.random.default_rng(3)
    t = (random.random(3000) - 0.5) * math.pi / 2
    t[:4] = [math.pi / 4, -math.pi / 4, 1e-18, -1e-9]
    sine, cosine = portable.sin_cos(t)
    with mpmath.workdps(40):
        assert worst_ulps(sine, [mpmath.sin(mpmath.mpf(float(v))) for v in t]) < 2.0
        assert worst_ulps(cosine, [mpmath.cos(mpmath.mpf(float(v))) for v in t]) < 2.0


@pytest.mark.parametrize("p", [1e-300, 1e-17, 1e-9, 0.001, 0.2499, 0.25, 0.5, 0.9, 1 - 2**-50])
def test_log_complement(p: float) -> None:
    with mpmath.workdps(400):
        exact = mpmath.log(1 - mpmath.mpf(p))
        assert abs(portable.log_complement(p) / exact - 1) < 1e-15


def test_log_complements_are_those_of_each() -> None:
    """Many at once, on both sides of where the way of computing changes: bit for bit the same."""
    many = np.concatenate([np.random.default_rng(4).random(500), [2.0**-65, 0.25, 1 - 2.0**-53]])
    each = [portable.log_complement(float(p)) for p in many]
    assert portable.log_complements(many).tolist() == each
