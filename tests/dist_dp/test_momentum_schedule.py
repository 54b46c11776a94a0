"""Two-state gaps against 60-digit arithmetic, closed forms and the recursion itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext

import numpy as np
import pytest
import torch

from dist_dp import momentum_schedule
from dist_dp.errors import ConfigError
from dist_dp.momentum_schedule import BLOCK, MomentumSchedule

PRECISE = Context(prec=60, Emin=-(10**8), Emax=10**8)
BOUND = 2.0**-52
GAPS = (1, 2, 3, 5, 10, 30, 100, 300, 1000, 1023, 1024, 1025, 2000, 3000, 9999, 10_000)


@dataclass
class Gap:
    """One gap: transition (row-major), and the factor m = a z1, w = b z1 + c z2."""

    phi: list[Decimal]
    a: Decimal
    b: Decimal
    c: Decimal


def exact_gaps(
    rates: Sequence[float], momentum: float, decay: float, noise: Sequence[float]
) -> dict[int, Gap]:
    """Gaps that end with the last step, by length; variances as sums over the steps.

    The determinant is summed beside them (two draws i, j span (b_i x b_j)^2), so that what is
    left of the weight beside the momentum is exact however close to singular the covariance is.
    """
    found: dict[int, Gap] = {}
    with localcontext(PRECISE):
        mu, lam = Decimal(momentum), Decimal(decay)
        ww, wm, mw, mm = Decimal(1), Decimal(0), Decimal(0), Decimal(1)
        v_ww = v_wm = v_mm = determinant = Decimal(0)
        for gap in range(1, len(rates) + 1):
            eta, beta = Decimal(rates[-gap]), Decimal(noise[-gap])
            w, m = beta * (wm - eta * ww), beta * (mm - eta * mw)
            determinant += v_ww * m * m - 2 * v_wm * w * m + v_mm * w * w
            v_ww, v_wm, v_mm = v_ww + w * w, v_wm + w * m, v_mm + m * m
            ww, wm = ww * (1 - eta * lam) + wm * lam, mu * (wm - eta * ww)
            mw, mm = mw * (1 - eta * lam) + mm * lam, mu * (mm - eta * mw)
            if gap in GAPS:
                a = v_mm.sqrt()
                c = (max(determinant, Decimal(0)) / v_mm).sqrt() if gap > 1 else Decimal(0)
                found[gap] = Gap([ww, wm, mw, mm], a, v_wm / a, c)
    return found


def recorded(
    rates: Sequence[float], momentum: float, decay: float, noise: Sequence[float]
) -> MomentumSchedule:
    schedule = MomentumSchedule(momentum)
    for rate, sigma in zip(rates, noise, strict=True):
        schedule.advance(rate, sigma * 2.0, 3.0, 6.0, decay)
    return schedule


def errors(
    schedule: MomentumSchedule, exact: dict[int, Gap]
) -> dict[int, tuple[float, float, float]]:
    """By gap: error of the transition, |E| of the factor, and what the guarantee allows it."""
    gaps = sorted(exact)
    phis, factors = schedule.propagate(
        torch.tensor([schedule.step - g for g in gaps]), schedule.step
    )
    found = {}
    with localcontext(PRECISE):
        for gap, phi, factor in zip(gaps, phis.tolist(), factors.tolist(), strict=True):
            want = exact[gap]
            a, b, c = (Decimal(x) for x in factor)
            largest = max(abs(x) for x in want.phi)
            transition = max(abs(Decimal(x) - y) for x, y in zip(phi, want.phi, strict=True))
            # E = L^-1 L~ - I, column by column; a factor of rank one spans one direction only
            wrong = [abs(a / want.a - 1)]
            skew = b - want.b * a / want.a
            wrong.append(abs(skew / (want.c or want.b or 1)))
            wrong.append(abs(c / want.c - 1) if want.c else abs(c))
            kappa = abs(want.b) / want.c if want.c else Decimal(0)
            allowed = Decimal(BOUND) * gap * (1 + kappa)
            found[gap] = (float(transition / largest), float(max(wrong)), float(allowed))
    return found


STEPS = 10_000
RNG = np.random.default_rng(5)
RATES: dict[str, list[float]] = {
    "falling to 0": [0.5 * (1 - t / STEPS) for t in range(1, STEPS + 1)],
    "jumping by a million": [1e-6 if (t // 7) % 2 else 1.0 for t in range(STEPS)],
    "waking up": [1e-8 * (1 + t) if t < STEPS - 5 else 0.5 for t in range(STEPS)],
    "random": list(10.0 ** RNG.uniform(-6, 0, STEPS)),
}
SIGMAS = list(10.0 ** RNG.uniform(-3, 0, STEPS))


@pytest.mark.parametrize(
    ("rates", "momentum", "decay", "last"),
    [
        ("falling to 0", 0.9, 0.0, STEPS),
        ("jumping by a million", 0.99, 1e-4, STEPS),
        ("waking up", 0.999, 0.0, 3000),
        ("random", 0.5, 0.1, 3000),
        ("random", 0.999, 1e-4, 3000),
        ("falling to 0", 0.9, 0.9, 3000),
        ("jumping by a million", 0.5, 0.0, 3000),
        ("waking up", 0.99, 0.1, 1025),
        ("random", 0.99, 0.0, 1025),
    ],
)
def test_gaps_against_60_digits(rates: str, momentum: float, decay: float, last: int) -> None:
    chosen, noise = RATES[rates][-last:], SIGMAS[-last:] if rates == "random" else [1.0] * last
    schedule = recorded(chosen, momentum, decay, noise)
    for gap, (phi, found, allowed) in errors(
        schedule, exact_gaps(chosen, momentum, decay, noise)
    ).items():
        assert found <= allowed, (gap, found, allowed)
        assert phi < 1e-12, (gap, phi)


def test_variances_alone_would_fail_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the remainder as a difference, var(w) - cov^2 / var(m)."""
    proper = momentum_schedule._join

    def by_difference(early: np.ndarray, late: np.ndarray) -> np.ndarray:
        joined = proper(early, late)
        a, b, c = joined[4:]
        variance, covariance, own = b * b + c * c, a * b, a * a
        joined[6] = np.sqrt(np.maximum(variance - covariance**2 / own, 0.0))
        return joined

    rates = [1e-9, 1.0]
    exact = exact_gaps(rates, 0.9, 0.0, [1.0, 1.0])
    schedule = recorded(rates, 0.9, 0.0, [1.0, 1.0])
    assert all(found <= allowed for _, found, allowed in errors(schedule, exact).values())
    monkeypatch.setattr(momentum_schedule, "_join", by_difference)
    assert not all(found <= allowed for _, found, allowed in errors(schedule, exact).values())


def test_a_single_step_has_rank_one() -> None:
    """Weight and momentum share the draw: exactly, wherever a step falls in its block."""
    schedule = MomentumSchedule(0.9)
    for rate in [0.0, 0.3, 1e-8, 1e8, 0.25] * 3 + [0.25] * BLOCK:
        t = schedule.advance(rate, 1.5, 2.0, 4.0)
        phi, chol = schedule.propagate(torch.tensor([t - 1, t]), t)
        assert chol[0, 2] == 0
        torch.testing.assert_close(
            chol[0, :2], torch.tensor([0.75, -rate * 0.75], dtype=torch.float64), rtol=1e-15, atol=0
        )
        assert phi[1].tolist() == [1, 0, 0, 1] and chol[1].tolist() == [0, 0, 0]
        if t in (2, 3):
            # after a step of rate 0 the weight has moved along the momentum alone, still
            assert (schedule.propagate(torch.tensor([0]), t)[1][0, 2] > 0) == (t == 3)


def test_definition_step_by_step() -> None:
    """A, b and their products, multiplied out in the order of the steps."""
    rates, noise, decay, momentum = [0.3, 0.0, 0.1, 0.7], [1.0, 2.0, 0.0, 0.5], 0.2, 0.8
    schedule = recorded(rates, momentum, decay, noise)
    phis, factors = schedule.propagate(torch.arange(5, dtype=torch.int32), 4)
    for start in range(5):
        phi, covariance = np.eye(2), np.zeros((2, 2))
        for rate, beta in zip(rates[start:], noise[start:], strict=True):
            a = np.array([[1 - rate * decay, -rate * momentum], [decay, momentum]])
            b = np.array([[-rate * beta], [beta]])
            phi, covariance = a @ phi, a @ covariance @ a.T + b @ b.T
        np.testing.assert_allclose(phis[start].reshape(2, 2), phi, rtol=1e-14, atol=1e-16)
        m1, w1, w2 = factors[start].tolist()
        factor = np.array([[w1, w2], [m1, 0.0]])
        np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("gap", [1, 7, BLOCK - 1, 3 * BLOCK + 5])
def test_constant_settings_have_a_closed_form(gap: int) -> None:
    """Without weight decay: geometric sums."""
    eta, mu, beta = 0.05, 0.9, 0.7
    schedule = recorded([eta] * gap, mu, 0.0, [beta] * gap)
    (phi,), (factor,) = schedule.propagate(torch.tensor([0]), gap)
    geometric = (1 - mu**gap) / (1 - mu)
    np.testing.assert_allclose(
        phi, [1.0, -eta * mu * geometric, 0.0, mu**gap], rtol=1e-12, atol=1e-300
    )
    k = np.arange(gap)
    w, m = -eta * beta * (1 - mu ** (k + 1)) / (1 - mu), beta * mu**k
    a, b, c = factor.tolist()
    for found, wanted in ((a * a, m @ m), (a * b, w @ m), (b * b + c * c, w @ w)):
        assert found == pytest.approx(wanted, rel=1e-12)


def test_noise_that_stopped_long_ago() -> None:
    """The momentum's noise underflows; the weight keeps all of its own."""
    quiet = 9000
    schedule = recorded([0.1] * (50 + quiet), 0.9, 0.0, [1.0] * 50 + [0.0] * quiet)
    before = recorded([0.1] * 50, 0.9, 0.0, [1.0] * 50)
    _, factor = schedule.propagate(torch.tensor([0]), 50 + quiet)
    assert factor[0, 0] == 0 and torch.isfinite(factor).all()
    m1, w1, w2 = before.propagate(torch.tensor([0]), 50)[1][0].tolist()
    carried = -0.1 * 0.9 / 0.1 * m1 + w1  # all the momentum there was has reached the weight
    assert float(factor[0, 1:].norm()) == pytest.approx(np.hypot(carried, w2), rel=1e-12)
    silent = recorded([0.1] * 5, 0.9, 0.0, [0.0] * 5)
    assert not silent.propagate(torch.arange(6), 5)[1].any()


def test_many_rows_and_few_give_the_same() -> None:
    steps = 2 * BLOCK + 100
    schedule = recorded([0.1] * steps, 0.9, 1e-3, [1.0] * steps)
    every = torch.arange(steps + 1)
    all_phi, all_factors = schedule.propagate(every.repeat(2), steps)
    for some in (every[:: BLOCK // 3], every[-3:]):
        phi, factors = schedule.propagate(some, steps)
        assert torch.equal(all_phi[some], phi) and torch.equal(all_factors[some], factors)


def test_state_goes_on_bit_for_bit() -> None:
    rates = RATES["random"][: 2 * BLOCK + 50]
    whole = recorded(rates, 0.9, 1e-3, [1.0] * len(rates))
    for cut in (0, 3, BLOCK, 2 * BLOCK - 1):
        part = recorded(rates[:cut], 0.9, 1e-3, [1.0] * cut)
        other = MomentumSchedule(0.9)
        other.load_state_dict(part.state_dict())
        assert other.step == cut
        for rate in rates[cut:]:
            other.advance(rate, 2.0, 3.0, 6.0, 1e-3)
        rows = torch.arange(len(rates) + 1)
        for found, wanted in zip(
            other.propagate(rows, other.step), whole.propagate(rows, whole.step), strict=True
        ):
            assert torch.equal(found, wanted)
    state = whole.state_dict()
    with pytest.raises(ValueError, match=r"this run's 0\.5"):
        MomentumSchedule(0.5).load_state_dict(state)
    with pytest.raises(ValueError, match="inner"):
        MomentumSchedule(0.9).load_state_dict(state | {"inner": state["inner"][:, 1:]})
    with pytest.raises(ValueError, match="entries"):
        MomentumSchedule(0.9).load_state_dict({"step": 0})


def test_what_is_refused() -> None:
    for momentum in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ConfigError, match="momentum"):
            MomentumSchedule(momentum)
    schedule = MomentumSchedule(0.9)
    with pytest.raises(ConfigError, match="learning_rate"):
        schedule.advance(-1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="on the momentum"):
        schedule.advance(0.0, 2.0**120, 1.0, 1.0)
    assert schedule.step == 0
    schedule.advance(0.1, 1.0, 1.0, 1.0)
    assert schedule.gradient_learning_rate(1) == 1 / 0.9
    with pytest.raises(ValueError, match="step: 2"):
        schedule.gradient_learning_rate(2)
    for rows, step, word in (([0], 0, "to_step"), ([2], 1, "from_steps"), ([-1], 1, "from_steps")):
        with pytest.raises(ValueError, match=word):
            schedule.propagate(torch.tensor(rows), step)
    with pytest.raises(TypeError, match="from_steps"):
        schedule.propagate(torch.tensor([0.0]), 1)
    phi, factor = schedule.propagate(torch.empty(0, dtype=torch.int64), 1)
    assert phi.shape == (0, 4) and factor.shape == (0, 3)


def test_settings_that_diverge_are_refused() -> None:
    """Rates that jump in step with the oscillation blow it up (parametric resonance)."""
    rates = [1e-6 if (t // 7) % 2 else 1.0 for t in range(20_000)]
    schedule = recorded(rates, 0.999, 0.9, [1.0] * len(rates))
    with pytest.raises(ConfigError, match="diverges"):
        schedule.propagate(torch.tensor([0]), len(rates))
