"""How much noise a row and its momentum owe for the steps since they were last settled.

SGD with momentum moves a row's weight and momentum together: a linear recursion in two states,
driven by one Gaussian a step. Over a gap of any length it is one 2x2 matrix and one 2x2
covariance, and this schedule knows both for every step a row may have been settled to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_dp.errors import ConfigError
from dist_dp.noise_schedule import Float64Array, check_step, is_representable, step_deviation

BLOCK = 1024
"""Steps of a block: a step costs O(BLOCK + steps / BLOCK)."""

_QUERY = 2048
# Noise below this, on weights that are float32 (smallest number 2^-149), is none.
_NO_NOISE = 2.0**-400

# Rows of a gap's array: the transition Phi of (weight, momentum), then the noise's factor.
_WW, _WM, _MW, _MM, _A, _B, _C = range(7)
_DET = 7  # of Phi, for whole blocks
_IDENTITY = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])


class MomentumSchedule:
    """Transition and covariance of (weight, momentum) between any step and the current one.

    SGD as PyTorch and TorchRec write it (coupled weight decay lambda, no dampening, not Nesterov)
    moves a row that no example touches, for i = s+1, ..., t, by

        m_i = mu m_{i-1} + lambda_i w_{i-1} + beta_i Z_i,   w_i = w_{i-1} - eta_i m_i,

    with beta_i = sigma_i C_i / B and Z_i standard normal: x_i = A_i x_{i-1} + b_i Z_i for
    x = (w, m). Hence x_t = Phi x_s + N(0, Sigma) with Phi = A_t ... A_{s+1} and Sigma the sum of
    the b_i b_i' carried on to t: two normals a coordinate, however long the gap.

    Exactness. Phi^-1 grows as mu^-k, so no prefix product can be divided out, and Sigma is nearly
    singular in short gaps (of rank one after a step: weight and momentum share the draw), so it
    cannot be kept as variances and covariance. Kept instead, for every s, are Phi and the factor
    of Sigma with the momentum first: m = a z_1, w = b z_1 + c z_2. A step turns a, b, c into the
    next ones by a 2x3 orthogonalisation in which c comes from the sum of the squares of the 2x2
    minors (Lagrange's identity):

        c'^2 a'^2 = (mu a c)^2 + (beta c)^2 + (beta b)^2,

    so nothing is subtracted where Sigma is nearly singular, and c is exactly 0 where it is.

    Cost. Gaps are kept from each s to the end of its block of `BLOCK` steps, and from the end of
    each block to now; a query joins the two. A step updates one block and one number a block;
    56 bytes a step are kept.

    Guarantee:
        For every s <= t the returned factor is L = L_exact (I + E), so that no direction of the
        plane gets less than (1 - |E|)^2 of its variance. E is rounding error: tests against
        60-digit arithmetic hold it below 2^-52 (1 + |b| / c) a step of the gap (|b| / c taken as
        0 where c = 0), for gaps up to 10^4 steps, learning rates that fall to 0 or jump by 10^6,
        and weight decay. A momentum whose noise fell below 2^-400 counts as 0. A row settled with
        L has the same joint distribution of weight and momentum as under eager DP-SGD with
        momentum, in real arithmetic, for any neighbouring relation, as long as it is settled
        before every read and no step is recorded twice. The settings must be chosen without
        looking at the private data.

    Args:
        momentum: mu, above 0 and below 1, the same for all steps.
    """

    def __init__(self, momentum: float) -> None:
        """Start at step 0: nothing recorded."""
        if not 0.0 < momentum < 1.0:
            raise ConfigError(
                f"momentum is {momentum}; give a number above 0 and below 1 (0 is plain SGD)"
            )
        self.momentum = float(momentum)
        self._step = 0
        self._inner = np.empty((7, BLOCK))  # s to the end of its block, or to now
        self._inner[:, 0] = _IDENTITY[:7]
        self._outer = np.tile(_IDENTITY[:, None], (1, 16))  # end of a block to now

    @property
    def step(self) -> int:
        """The number of steps recorded; the first one is step 1."""
        return self._step

    def advance(
        self,
        learning_rate: float,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        weight_decay: float = 0.0,
    ) -> int:
        """Record the next step.

        Args:
            learning_rate: eta_t, at least 0.
            noise_multiplier: sigma_t, the noise's standard deviation over `max_grad_norm`; >= 0.
            max_grad_norm: C_t, the clipping norm of the summed gradient's noise; above 0.
            expected_batch_size: B, the expected (never the actual) number of examples; above 0.
            weight_decay: lambda_t, with 0 < 1 - eta_t lambda_t <= 1.

        Returns:
            The step recorded.

        Raises:
            ConfigError: a value is out of range. Nothing is recorded then.
        """
        check_step(
            self._step + 1,
            learning_rate,
            noise_multiplier,
            max_grad_norm,
            expected_batch_size,
            weight_decay,
        )
        deviation = step_deviation(1.0, noise_multiplier, max_grad_norm, expected_batch_size)
        if not is_representable(deviation):
            raise ConfigError(
                f"step {self._step + 1}: noise of standard deviation {deviation} on the momentum "
                "cannot be represented; check noise_multiplier and max_grad_norm"
            )
        block, position = divmod(self._step, BLOCK)
        start = block * BLOCK
        for gaps in (self._inner[:, start : start + position + 1], self._outer[:, :block]):
            _advance(gaps, float(learning_rate), self.momentum, float(weight_decay), deviation)
        self._step += 1
        self._reserve(self._step + 1)
        self._inner[:, self._step] = _IDENTITY[:7]
        return self._step

    def propagate(
        self, from_steps: torch.Tensor, to_step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What brings rows last settled at `from_steps` to the current step.

        With (phi, chol) of a row and z_1, z_2 standard normal for each of its coordinates:
        m <- phi[2] w + phi[3] m + chol[0] z_1 and w <- phi[0] w + phi[1] m + chol[1] z_1 +
        chol[2] z_2.

        Args:
            from_steps: int32 or int64 [n], each in [0, to_step].
            to_step: must be `step`; older steps can no longer be settled to.

        Returns:
            phi, float64 [n, 4], and chol, float64 [n, 3], on the device of `from_steps`;
            (1, 0, 0, 1) and zeros where from-step and to-step are equal, chol[2] = 0 where they
            are one step apart.

        Raises:
            TypeError: `from_steps` is no integer tensor.
            ValueError: a step is out of range.
            ConfigError: with the settings recorded, the recursion itself diverges.
        """
        if not isinstance(from_steps, torch.Tensor) or from_steps.dtype not in (
            torch.int32,
            torch.int64,
        ):
            raise TypeError("from_steps: a tensor of dtype int32 or int64 expected")
        if to_step != self._step:
            raise ValueError(
                f"to_step: {to_step} is not {self._step}, the last step recorded; with momentum "
                "rows are settled to that one only"
            )
        steps = from_steps.detach().cpu().numpy().astype(np.int64)
        if steps.size and (steps.min() < 0 or steps.max() > to_step):
            wrong = steps.min() if steps.min() < 0 else steps.max()
            raise ValueError(f"from_steps: step {wrong} is outside [0, to_step = {to_step}]")
        if steps.size > to_step + 1:  # fewer distinct steps than rows: compute each once
            gaps = self._gaps(np.arange(to_step + 1))[steps]
        else:
            gaps = self._gaps(steps)
        if not np.isfinite(gaps).all():
            raise ConfigError(
                f"by step {to_step} momentum {self.momentum} with these learning rates and this "
                "weight decay diverges, whatever the data: lower the learning rate or the weight "
                "decay"
            )
        found = torch.from_numpy(gaps).to(from_steps.device)
        return found[:, :_A], found[:, _A:]

    def _gaps(self, steps: NDArray[np.int64]) -> Float64Array:
        """Transition and factor [n, 7] from each step to now, in pieces that stay in cache."""
        gaps = np.empty((len(steps), 7))
        for start in range(0, len(steps), _QUERY):
            some = steps[start : start + _QUERY]
            joined = _join(self._inner[:, some], self._outer[:, some // BLOCK])
            gaps[start : start + _QUERY] = joined.T
        return gaps

    @property
    def without_decay(self) -> bool:
        """False: rows move by their momentum in every step, so they always have a history."""
        return False

    def gradient_learning_rate(self, step: int) -> float:
        """The factor at which step's gradient is put into the momentum: 1 / mu.

        The update happens before the step's transition A_t, which the next settle applies, and
        A_t (0, g / mu) = (-eta_t g, g).

        Raises:
            ValueError: the step has not been recorded.
        """
        if not 1 <= step <= self._step:
            raise ValueError(f"step: {step} is outside [1, {self._step}], the steps recorded")
        return 1.0 / self.momentum

    def state_dict(self) -> dict[str, Any]:
        """The state as float64 tensors and the step itself.

        "momentum" [1], "inner" [7, step + 1], "outer" [8, step // BLOCK + 1].
        """
        blocks = self._step // BLOCK + 1
        return {
            "step": self._step,
            "momentum": torch.tensor([self.momentum], dtype=torch.float64),
            "inner": torch.from_numpy(self._inner[:, : self._step + 1].copy()),
            "outer": torch.from_numpy(self._outer[:, :blocks].copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned.

        Raises:
            ValueError: an entry is missing, unknown, of the wrong shape or dtype, or of another
                momentum.
        """
        names = ["step", "momentum", "inner", "outer"]
        if set(state) != set(names):
            raise ValueError(f"state: entries {names} expected, {sorted(state)} given")
        step = int(state["step"])
        shapes = {"momentum": (1,), "inner": (7, step + 1), "outer": (8, step // BLOCK + 1)}
        for name, shape in shapes.items():
            value = state[name]
            if tuple(value.shape) != shape or value.dtype != torch.float64:
                raise ValueError(
                    f"state: {name} must be float64 of shape {shape}, not {value.dtype} "
                    f"{tuple(value.shape)}"
                )
        if float(state["momentum"]) != self.momentum:
            raise ValueError(
                f"state: its momentum is {float(state['momentum'])}, this run's {self.momentum}"
            )
        self._step = step
        self._inner = state["inner"].cpu().numpy().copy()
        self._outer = state["outer"].cpu().numpy().copy()
        self._reserve(step + 1)

    def _reserve(self, size: int) -> None:
        """Make room for `size` steps, doubling, so that a step costs O(1) copies on average."""
        if size > self._inner.shape[1]:
            larger = np.empty((7, max(size, 2 * self._inner.shape[1])))
            larger[:, : self._inner.shape[1]] = self._inner
            self._inner = larger
        blocks = size // BLOCK + 1
        if blocks > self._outer.shape[1]:
            identities = np.tile(_IDENTITY[:, None], (1, max(blocks, self._outer.shape[1])))
            self._outer = np.concatenate([self._outer, identities], axis=1)


@np.errstate(all="ignore")  # what overflows is refused by `propagate`
def _advance(
    gaps: Float64Array, rate: float, momentum: float, decay: float, deviation: float
) -> None:
    """One more step at the end of every gap [7 or 8, n], in place."""
    for weight, speed in ((_WW, _MW), (_WM, _MM)):
        gaps[speed] = decay * gaps[weight] + momentum * gaps[speed]
        gaps[weight] -= rate * gaps[speed]
    if len(gaps) > _DET:
        gaps[_DET] *= momentum
    a, b, c = gaps[_A], gaps[_B], gaps[_C]
    # the momentum after the step, along z_1, z_2 and the step's own draw
    first, second = momentum * a + decay * b, decay * c
    length = np.sqrt(first * first + second * second + deviation * deviation)
    there = length > _NO_NOISE
    inverse = np.divide(1.0, length, out=np.zeros_like(length), where=there)
    along = (b * first + c * second) * inverse
    carried = np.sqrt((momentum * a) ** 2 + deviation * deviation)
    rest = np.hypot(c * carried, b * deviation) * inverse
    if not there.all():
        rest = np.where(there, rest, np.hypot(b, c))
        length = np.where(there, length, 0.0)
    gaps[_A], gaps[_B], gaps[_C] = length, along - rate * length, rest


@np.errstate(all="ignore")
def _join(early: Float64Array, late: Float64Array) -> Float64Array:
    """The gaps [7, n] that `early` [7, n] and then `late` [8, n] make together."""
    ww, wm, mw, mm = late[_WW], late[_WM], late[_MW], late[_MM]
    joined = np.empty_like(early)
    for w, m in ((_WW, _MW), (_WM, _MM)):
        joined[w] = ww * early[w] + wm * early[m]
        joined[m] = mw * early[w] + mm * early[m]
    a, b, c = early[_A], early[_B], early[_C]
    # columns (w, m) of the joint noise: p and q from the early gap, u and (v, 0) from the late one
    p_w, p_m = ww * b + wm * a, mw * b + mm * a
    q_w, q_m = ww * c, mw * c
    u_w, u_m, v = late[_B], late[_A], late[_C]
    length = np.sqrt(p_m * p_m + q_m * q_m + u_m * u_m)
    there = length > _NO_NOISE
    inverse = np.divide(1.0, length, out=np.zeros_like(length), where=there)
    minors = (
        late[_DET] * a * c,
        p_w * u_m - p_m * u_w,
        q_w * u_m - q_m * u_w,
        p_m * v,
        q_m * v,
        u_m * v,
    )
    rest = np.sqrt(sum(minor * minor for minor in minors)) * inverse
    if not there.all():
        rest = np.where(there, rest, np.sqrt(p_w * p_w + q_w * q_w + u_w * u_w + v * v))
        length = np.where(there, length, 0.0)
    joined[_A] = length
    joined[_B] = (p_w * p_m + q_w * q_m + u_w * u_m) * inverse
    joined[_C] = rest
    return joined
