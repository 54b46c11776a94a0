"""A bound that people read is not below the bound."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest

from dist_dp.cluster.console import ProgressLine
from dist_dp.cluster.report.text import bound
from dist_dp.figures import round_up


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1.0001, 3, "1.01"),
        (0.004, 3, "0.00401"),  # the float is above 0.004
        (0.25, 3, "0.25"),
        (7.99991, 4, "8"),
        (1.2341, 4, "1.235"),
        (5475.34, 3, "5480"),
        (1.00001e-7, 3, "1.01e-7"),
        (0.0, 4, "0"),
        (math.inf, 4, "∞"),
        (math.nan, 4, "not a number"),
    ],
)
def test_rounds_up(value: float, digits: int, text: str) -> None:
    assert round_up(value, digits) == text


def test_what_is_read_is_never_less() -> None:
    values = np.exp(np.random.default_rng(0).uniform(-30, 30, 2000))
    for value in values:
        for digits in (2, 4, 6):
            text = round_up(float(value), digits)
            assert Decimal(text) >= Decimal(float(value))
            assert float(text) <= value * (1 + 10.0 ** (1 - digits))
    assert bound(1.00001) == "1.001" and bound(None) == bound("nothing")


def test_the_line_of_a_run_states_a_bound() -> None:
    """Two decimals, rounded to the nearest, said ε ≤ 0.00 of a run that had spent 0.004."""
    from rich.console import Console

    line = ProgressLine(Console())
    shown = line.line(
        {"phase": "training", "step": 1, "steps": 2, "loss": 0.5, "epsilon": 0.00412,
         "examples_per_second": 1.0}
    )  # fmt: skip
    assert "ε ≤ 0.00413" in shown  # the float is above 0.00412
