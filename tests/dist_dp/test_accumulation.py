"""A batch in parts: clipped sums, norms, noise and model are those of the batch in one piece.

Against the unsharded reference (1e-5) and the run in one piece (2e-6), for one and two workers
whose parts are of unequal size and may be empty; and in distribution, against the exact law of
DP-SGD and eager runs in one piece (level 1e-3 for all comparisons together, fixed keys).
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from dist_dp import kernels
from dist_dp.errors import ConfigError, DistDpError, ModelError
from dist_dp.step_state import StepState
from tests.dist_dp import accumulation_runs, group_runs, unsharded
from tests.dist_dp.accumulation_runs import COLUMNS, FAULTS, KINDS, READINGS, SIZES
from tests.dist_dp.gradients import build
from tests.dist_dp.sharding_runs import STEPS, loader_of, together
from tests.dist_dp.worlds import run_world

TOLERANCE = 1e-5
SAME = 2e-6
LEVEL = 1e-3
CASES = [("lazydp", kind) for kind in KINDS] + [(m, "mixed") for m in ("dpsgd", "none", "momentum")]


@cache
def wanted(what: str) -> unsharded.Run:
    if what == "momentum":
        return unsharded.plain(STEPS, group_runs.with_momentum)
    return unsharded.reference(STEPS)


@pytest.fixture(scope="module")
def runs() -> dict[int, dict[Any, list[dict[str, Any]]]]:
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size in (1, 2):
            ranks = run_world(accumulation_runs.all_runs, size, list(FAULTS) if size == 1 else [])
            found[size] = {key: [r[key] for r in ranks] for key in ranks[0]}
    finally:
        torch.set_num_threads(threads)
    return found


def far(state: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert state.keys() == exact.keys()
    return max(float((state[n] - w).abs().max() / w.abs().max()) for n, w in exact.items())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("what", "kind"), [c for c in CASES if c[0] in ("lazydp", "momentum")])
def test_parts_equal_the_reference(
    runs: Any, what: str, kind: str, size: int | None, workers: int
) -> None:
    ranks = runs[workers][what, kind, size]
    assert far(together(ranks), wanted(what).state) <= TOLERANCE
    for step, norms in enumerate(wanted(what).norms):
        # Each rank's records are in the order of the parts, so in their own.
        seen = torch.cat([r["norms"][step] for r in ranks]).double()
        assert float(((seen - norms) / norms).abs().max()) <= TOLERANCE
    assert all(r["steps"] == STEPS for r in ranks)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", [s for s in SIZES if s])
@pytest.mark.parametrize(("what", "kind"), CASES)
def test_parts_equal_the_whole(runs: Any, what: str, kind: str, size: int, workers: int) -> None:
    whole, parts = (runs[workers][what, kind, s] for s in (None, size))
    assert far(together(parts), together(whole)) <= SAME
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(torch.cat(other["norms"]), torch.cat(one["norms"]))


@pytest.mark.parametrize("workers", [1, 2])
def test_looking_ahead_changes_no_bit(runs: Any, workers: int) -> None:
    """Rows of the next step alone are settled ahead, beside the last part."""
    plain = together(runs[workers]["lazydp", "mixed", 4])
    ahead = together(runs[workers]["look ahead", "mixed", 4])
    assert all(torch.equal(ahead[name], value) for name, value in plain.items())


def test_parts_are_unequal_and_some_are_empty(runs: Any) -> None:
    real = [r["real"] for r in runs[2]["lazydp", "row_wise", 1]]
    assert len(real[0]) == len(real[1]) > STEPS and real[0] != real[1]
    assert any(0 in r for r in real) and {*real[0], *real[1]} == {0, 1}
    assert all(max(r["real"]) <= 4 for r in runs[2]["lazydp", "row_wise", 4])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(runs: Any, fault: str) -> None:
    state = together(runs[1][fault, "row_wise", 4])
    assert far(state, wanted("lazydp").state) > 100 * TOLERANCE


def exact_law() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of the readings: rows are linear forms in (1, Z of each row and step)."""
    a = accumulation_runs
    forms = np.zeros((3, 1 + 3 * a.STEPS))
    forms[:, 0] = a.START
    read: list[NDArray[np.float64]] = []
    for step, rows in enumerate(a.BATCHES):
        if step == 2:
            read = [forms[rows[3]].copy(), forms[rows[1]].copy()]
        counts = np.bincount(rows, minlength=3)[:, None]
        gradient = counts * a.FEEDBACK * forms
        gradient[:, :1] += counts
        for row in range(3):
            gradient[row, 1 + row * a.STEPS + step] += a.SIGMA * a.CLIP
        rate = a.RATES[step]
        forms = (1 - rate * a.DECAY) * forms - rate / a.EXPECTED * gradient
    table = np.stack([*read, *forms])
    return table[:, 0], table[:, 1:] @ table[:, 1:].T


def rejected(found: NDArray[np.float64], eager: NDArray[np.float64]) -> set[str]:
    """The comparisons with the exact law and with eager runs that reject."""
    mean, covariance = exact_law()
    n = len(found)
    p: dict[str, float] = {}
    with np.errstate(all="ignore"):
        white = np.linalg.solve(np.linalg.cholesky(covariance), (found - mean).T).T
        for i, name in enumerate(READINGS):
            x, variance = found[:, i], covariance[i, i]
            p[f"mean of {name}"] = 2 * stats.norm.sf(
                abs(x.mean() - mean[i]) * (n / variance) ** 0.5
            )
            law = stats.chi2(n - 1)
            value = (n - 1) * x.var(ddof=1) / variance
            p[f"variance of {name}"] = 2 * min(law.cdf(value), law.sf(value))
            p[f"law of {name}"] = stats.kstest(white[:, i], "norm").pvalue
            p[f"law of {name}, eager"] = stats.ks_2samp(x, eager[:, i]).pvalue
            for j in range(i):
                z = np.arctanh(np.corrcoef(white[:, i], white[:, j])[0, 1])
                p[f"correlation of {READINGS[j]} and {name}"] = 2 * stats.norm.sf(
                    abs(z) * (n - 3) ** 0.5
                )
    return {name for name, value in p.items() if not value > LEVEL / len(p)}


def samples(mechanism: str, family: str, parts: int) -> NDArray[np.float64]:
    run_world(int, 1)
    keys = [kernels.derive_key(bytes(32), family, str(i)) for i in range(4)]
    found = [accumulation_runs.experiment(mechanism, key, parts) for key in keys]
    return torch.cat(found).numpy()


@cache
def eager_samples() -> NDArray[np.float64]:
    return samples("dpsgd", "eager", parts=1)


def test_parts_have_the_law_of_eager_steps() -> None:
    found = samples("lazydp", "parts", parts=2)
    assert found.shape == (4 * COLUMNS, len(READINGS))
    assert not rejected(found, eager_samples())


def test_eager_steps_have_the_exact_law() -> None:
    assert not rejected(eager_samples(), samples("dpsgd", "eager again", parts=4))


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("noise each time", "variance of 2"),
        ("update at once", "mean of row 0, third step, last part"),
        ("last alone", "mean of 0"),
    ],
)
def test_a_fault_changes_the_law(fault: str, seen: str) -> None:
    with FAULTS[fault]():
        assert seen in rejected(samples("lazydp", fault, parts=2), eager_samples())


def test_no_part_is_left_out_or_taken_twice() -> None:
    state = StepState()
    state.begin(1, 2, 2, part=0, is_last=False)
    with pytest.raises(DistDpError, match="never stepped"):
        state.begin(1, 2, 2, part=1, is_last=True)
    state.take(2)
    state.finish()
    with pytest.raises(DistDpError, match="without a new batch"):
        state.take(2)
    state.finish()
    with pytest.raises(DistDpError, match="step 1 was left after 1 of its micro-batches"):
        state.begin(2, 2, 2)
    with pytest.raises(DistDpError, match="step 1 was left"):
        state.begin(1, 2, 2, part=2, is_last=True)
    state.begin(1, 2, 2, part=1, is_last=True)
    state.take(2)
    state.finish()
    with pytest.raises(DistDpError, match="step 1 was left after 2"):
        state.begin(2, 2, 2, part=1, is_last=True)
    state.begin(2, 2, 2)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_failed_part_stops_the_step(bad: int) -> None:
    """Going on without it would leave out other records because of one: no longer clipped.

    Nor may gradients held for the step go with the next one, should the last part be the bad one.
    """
    run_world(int, 1)
    whole = unsharded.model()
    private = build(whole, clip=1.0, sigma=1.0, expected=unsharded.EXPECTED)
    losses = unsharded.LOSSES
    refused = 0
    with pytest.raises(DistDpError, match=r"step 1 failed in optimizer\.step"):
        for number, batch in enumerate(loader_of(private, 2, micro_batch_size=4)):
            loss = losses(whole(*batch.inputs), batch.labels)
            bad_one = number == 0 if bad == 0 else private.state.is_last
            (loss * (float("nan") if bad_one else 1.0)).backward()
            try:
                private.optimizer.step()
            except ModelError as error:
                assert "not finite" in str(error)
                refused += 1
            private.optimizer.zero_grad()
    assert refused == 1
    assert private.mechanism.schedule.step == 0


def test_a_part_that_waits_keeps_its_gradients_and_no_values() -> None:
    run_world(int, 1)
    whole = unsharded.model()
    private = build(whole, clip=1.0, sigma=1.0, expected=unsharded.EXPECTED)
    looked_up: list[Any] = []
    whole.pooled.register_forward_hook(
        lambda _m, _a, output: looked_up.append(weakref.ref(output.values()))
    )
    for batch in loader_of(private, 1, micro_batch_size=4):
        unsharded.LOSSES(whole(*batch.inputs), batch.labels).backward()
        private.optimizer.step()
        if not private.optimizer.is_accumulating:
            break
        (cut,) = (c for c in private.cuts if c.path == "pooled")
        kept = [g.shape for back in cut._held for g in back.gradients]
        columns = 6 * unsharded.DIM  # f0, f1 of a; f2 of b; f3 of c; f0, f2 of d
        assert kept == [(rows, columns) for rows, _ in kept] and len(kept) == private.state.part + 1
        assert sum(rows for rows, _ in kept) <= 4 * len(kept)
        assert looked_up[-1]() is None
    assert not cut._held


def test_a_stop_comes_after_a_whole_step() -> None:
    run_world(int, 1)
    whole = unsharded.model()
    private = build(whole, clip=1.0, sigma=1.0, expected=unsharded.EXPECTED)
    loader = loader_of(private, 3, micro_batch_size=3)
    parts = 0
    for batch in loader:
        loader.stop()
        parts += 1
        assert len(batch) <= 3
        unsharded.LOSSES(whole(*batch.inputs), batch.labels).backward()
        private.optimizer.step()
        private.optimizer.zero_grad()
        assert (private.optimizer.last_stats is None) == private.optimizer.is_accumulating
    assert parts > 1 and private.mechanism.schedule.step == loader.steps_drawn == 1
    assert len(loader) == 3


def test_a_size_that_makes_no_sense() -> None:
    run_world(int, 1)
    private = build(unsharded.model(), sigma=1.0)
    with pytest.raises(ConfigError, match="micro_batch_size is 0"):
        loader_of(private, 2, micro_batch_size=0)
