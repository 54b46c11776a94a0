"""Keyed Gaussian noise and in-place row updates: the face of the kernels.

Every random number is a function of a key and its own coordinates alone: (global row, column,
from-step, to-step). It does not depend on where a table is placed, in which order rows are
visited, on chunks, threads or processes, nor on the processor: the same bits come out everywhere
(promised for a GPU: the same random words, and normals within 2 units in the last place). So a
run on one worker and a run on eight add the same noise, and a replayed step is the same release.

Guarantee:
    To anyone without the key, the numbers are indistinguishable from independent draws as long
    as ChaCha with the chosen rounds is a pseudorandom function. That holds for one use of each
    (key, row, column, from-step, to-step): derive one key for each run, stream and table with
    `derive_key`, and never settle one interval of a row onto two different values that both
    leave the system. |z| reaches 9.42, the mass lost beyond is 2^-64 for each pair of normals.
    Normals and weights are rounded to float32: without a `grid`, attacks on the low-order bits
    of floating-point noise are not defended against (docs/kernels.md).

Arithmetic. A normal is the float32 that `dist_dp.kernels.box_muller` defines, within 5.3 units
in the last place of real arithmetic (99.9 % within 2.3). Updates are float32: `decay` is rounded
to nearest and `scale` up to float32 (noise is never weakened), then
w <- fl(fl(decay * w) + fl(scale * z)), each operation rounded by itself. A row whose scale is 0
draws nothing. bfloat16 and float16 tables are rounded once at the end: at random by default, up
with the probability of the part cut off, so that noise below half a unit in the last place does
not vanish; or to nearest.

Limits: steps below 2^31, rows below 2^48, 131072 columns.

Errors: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value,
IndexError for a row that does not exist. Every check is made before the first write, so a refused
call leaves the weight as it was.
"""

from __future__ import annotations

from dist_dp.kernels import operators as _operators  # noqa: F401 (registers torch.ops.dist_dp)
from dist_dp.kernels.dispatch import (
    SlowKernelsWarning,
    implementation,
    slow_reason,
    warn_if_slow,
)
from dist_dp.kernels.draws import derive_key, normal, normal_like, uniform_rows, uniforms
from dist_dp.kernels.lookups import bag_repeats
from dist_dp.kernels.states import (
    StateTableSet,
    compiled_for,
    momentum_keys,
    settle_state_range,
)
from dist_dp.kernels.tables import ShardSet, Stale, TableSet
from dist_dp.kernels.updates import add_normal, settle_range, settle_rows

__all__ = [
    "ShardSet",
    "SlowKernelsWarning",
    "Stale",
    "StateTableSet",
    "TableSet",
    "add_normal",
    "bag_repeats",
    "compiled_for",
    "derive_key",
    "implementation",
    "momentum_keys",
    "normal",
    "normal_like",
    "settle_range",
    "settle_rows",
    "settle_state_range",
    "slow_reason",
    "uniform_rows",
    "uniforms",
    "warn_if_slow",
]
