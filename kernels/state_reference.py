"""How a row with a momentum or of half precision moves: in plain torch, slow and obviously right.

The compiled kernels make the same operations in the same order, so the same bits come out. It works
on float32 values and on any device; `dist_dp.mechanisms.row_states` uses it for tables that the
compiled kernels do not serve.
"""

from __future__ import annotations

import torch

_NUMBERS = 1 << 14
"""Numbers worked on at a time: what stays in cache (and below what torch would split up)."""


def move(
    values: torch.Tensor,
    momentum: torch.Tensor | None,
    transition: torch.Tensor,
    noise: torch.Tensor,
    first: torch.Tensor | None,
    second: torch.Tensor | None,
) -> None:
    """In place: the transition of rows, and their noise.

    With a momentum m, weight and momentum move together:
    w <- ((ww w + wm m) + b z_1) + c z_2 and m <- (mw w + mm m) + a z_1. Without, w <- d w + s z_1.
    All in float64, each operation rounded by itself, and the result rounded to float32 once. A row
    whose factors are all 0 gets no z_1, and one whose c is 0 no z_2 (adding a zero would turn -0
    into 0).

    Args:
        values: float32 [n, D], the weights' float32 values.
        momentum: float32 [n, D], or None.
        transition: float64 [n, 4], (ww, wm, mw, mm); without a momentum [n], the decay d.
        noise: float64 [n, 3], (a, b, c); without a momentum [n], the standard deviation s.
        first: float32 [n, D], z_1, or None where no row has noise.
        second: float32 [n, D], z_2, or None where c is 0 in all rows.
    """
    for start in range(0, len(values), max(1, _NUMBERS // max(1, values.shape[1]))):
        some = slice(start, start + max(1, _NUMBERS // max(1, values.shape[1])))
        z = None if first is None else first[some].double()
        own = None if second is None else second[some].double()
        if momentum is None:
            scale = noise[some].unsqueeze(1)
            kept = transition[some].unsqueeze(1) * values[some].double()
            values[some] = _plus(kept, scale, z, scale != 0)
            continue
        ww, wm, mw, mm = transition[some].unsqueeze(2).unbind(1)
        a, b, c = noise[some].unsqueeze(2).unbind(1)
        noisy = (a != 0) | (b != 0) | (c != 0)
        w, m = values[some].double(), momentum[some].double()
        values[some] = _plus(_plus(ww * w + wm * m, b, z, noisy), c, own, c != 0)
        momentum[some] = _plus(mw * w + mm * m, a, z, noisy)


def _plus(
    kept: torch.Tensor, factor: torch.Tensor, z: torch.Tensor | None, there: torch.Tensor
) -> torch.Tensor:
    # a product and a sum, not torch.addcmul: a fused multiply-add would round differently
    return kept if z is None else torch.where(there, kept + factor * z, kept)
