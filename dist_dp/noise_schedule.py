"""How much noise a row owes for the steps since it was last settled.

The schedule records each step's learning rate, noise and weight decay once, and answers for any
pair of steps in O(1).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_dp.errors import ConfigError

Float64Array = NDArray[np.float64]

SMALLEST_DEVIATION, LARGEST_DEVIATION = 2.0**-100, 2.0**100

_REBASE_BELOW = 2.0**-256
_OLDEST = 2.0**256
_DIRECT_BELOW = 2.0**-64
_FIELDS = ("decay", "decay_correction", "variance", "variance_low", "increment", "gradient_rate")


def _two_sum(a: float, b: float) -> tuple[float, float]:
    """a + b as a float64 and its rounding error, exactly (Knuth)."""
    total = a + b
    shift = total - a
    return total, (a - (total - shift)) + (b - shift)


def _two_product(a: float, b: float) -> tuple[float, float]:
    """a * b as a float64 and its rounding error, exactly (Dekker, Veltkamp splitting)."""
    product = a * b
    split = 134217729.0  # 2^27 + 1
    a_high = a * split - (a * split - a)
    b_high = b * split - (b * split - b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def step_deviation(
    learning_rate: float,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: float,
) -> float:
    """Standard deviation of one step's noise on a weight: eta sigma C / B."""
    return learning_rate * noise_multiplier * max_grad_norm / expected_batch_size


def is_representable(deviation: float) -> bool:
    """Whether a schedule can keep noise of this standard deviation; 0 is no noise at all."""
    return deviation == 0 or SMALLEST_DEVIATION <= deviation < LARGEST_DEVIATION


def check_step(
    step: int,
    learning_rate: float,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: float,
    weight_decay: float,
) -> tuple[float, float]:
    """Check a step's settings, before anything is recorded.

    Returns:
        The decay factor 1 - eta lambda as a float64 and its rounding error.

    Raises:
        ConfigError: a value is out of range.
    """
    at_least_zero = {
        "learning_rate": learning_rate,
        "noise_multiplier": noise_multiplier,
        "weight_decay": weight_decay,
    }
    positive = {"max_grad_norm": max_grad_norm, "expected_batch_size": expected_batch_size}
    for name, value in (at_least_zero | positive).items():
        if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
            bound = "above 0" if name in positive else "at least 0"
            raise ConfigError(f"step {step}: {name} is {value}; give a finite number {bound}")
    product, error = _two_product(float(learning_rate), float(weight_decay))
    factor, low = _two_sum(1.0, -product)
    factor, low = _two_sum(factor, low - error)
    if not factor > 0:
        raise ConfigError(
            f"step {step}: learning_rate * weight_decay = {product} must be below 1; "
            "lower the learning rate or the weight decay"
        )
    deviation = step_deviation(learning_rate, noise_multiplier, max_grad_norm, expected_batch_size)
    if not is_representable(deviation):
        raise ConfigError(
            f"step {step}: noise of standard deviation {deviation} cannot be "
            "represented; check learning_rate, noise_multiplier and max_grad_norm"
        )
    return factor, low


class NoiseSchedule:
    """Prefix sums of a run's noise: decay and standard deviation between any two steps.

    DP-SGD with weight decay moves a row that no example touches, for i = s+1, …, t, by
    w_i = (1 - eta_i lambda_i) w_{i-1} - (eta_i / B) sigma_i C_i Z_i with Z_i standard normal. This
    is linear in Gaussians, hence

        w_t = D w_s + N(0, v),   D = P_t / P_s,   v = P_t^2 (Q_t - Q_s),
        P_t = prod_{i<=t} (1 - eta_i lambda_i),   Q_t = sum_{i<=t} (eta_i sigma_i C_i / (B P_i))^2.

    Precision. Under a falling learning rate Q_t - Q_s can be 10^-17 of Q_t, and a difference of
    float64 values would be rounding error: too little noise, a privacy failure. P and Q are
    therefore kept in double-double arithmetic (about 106 bits). Where even that would leave a
    relative error above about 2^-41 in v (the interval holds less than 2^-64 of Q_t for each of
    its steps), its terms are added up again, without any subtraction. When P becomes small, all
    values are rescaled by a power of two, exactly. A step since which the weights have decayed
    by more than 2^256 can still be settled from, but no longer to.

    Guarantee:
        For every s <= t the returned standard deviation is within 1e-12, relative, of the exact
        one (where the terms are added up again, plus at most 2^-54 for each of them), for the
        float64 values recorded. A row settled with it has the same joint distribution as under
        eager DP-SGD, in real arithmetic, for any neighbouring relation, as long as it is settled
        before every read and no step is recorded twice. The settings must be chosen without
        looking at the private data.
    """

    def __init__(self) -> None:
        """Start at step 0: nothing recorded."""
        self._step = 0
        self._data = {name: np.zeros(1024) for name in _FIELDS}
        self._data["decay"][0] = 1.0

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
        settings = (learning_rate, noise_multiplier, max_grad_norm, expected_batch_size)
        factor, low = check_step(self._step + 1, *settings, weight_decay)
        deviation = step_deviation(*settings)
        t = self._step + 1
        self._reserve(t + 1)
        data = self._data
        decay, rounding = _two_product(float(data["decay"][t - 1]), factor)
        # relative correction of P_t: inherited, from the factor's low part, from this rounding
        correction = float(data["decay_correction"][t - 1]) + low / factor + rounding / decay
        term = (deviation / decay) ** 2 * (1.0 - 2.0 * correction)
        total, total_error = _two_sum(float(data["variance"][t - 1]), term)
        total, total_low = _two_sum(total, float(data["variance_low"][t - 1]) + total_error)
        for name, value in zip(
            _FIELDS,
            (decay, correction, total, total_low, term, learning_rate / (factor + low)),
            strict=True,
        ):
            data[name][t] = value
        self._step = t
        if decay < _REBASE_BELOW:
            self._rebase()
        return t

    def decay_and_scale(
        self, from_steps: torch.Tensor, to_step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decay and noise for rows last settled at `from_steps`, to bring them to `to_step`.

        Args:
            from_steps: int32 or int64 [n], each in [0, to_step].
            to_step: at most `step`.

        Returns:
            Decay D, float64 [n], and standard deviation sqrt(v), float64 [n], on the device of
            `from_steps`; (1, 0) where from-step and to-step are equal.

        Raises:
            TypeError: `from_steps` is no integer tensor.
            ValueError: a step is out of range, or `to_step` too far in the past.
        """
        if not isinstance(from_steps, torch.Tensor) or from_steps.dtype not in (
            torch.int32,
            torch.int64,
        ):
            raise TypeError("from_steps: a tensor of dtype int32 or int64 expected")
        if not 0 <= to_step <= self._step:
            raise ValueError(f"to_step: {to_step} is outside [0, {self._step}], the steps recorded")
        if self._data["decay"][to_step] > _OLDEST:
            raise ValueError(
                f"to_step: weights have decayed by more than 2^256 since step {to_step}; "
                "settle to a later step"
            )
        steps = from_steps.detach().cpu().numpy().astype(np.int64)
        if steps.size and (steps.min() < 0 or steps.max() > to_step):
            wrong = steps.min() if steps.min() < 0 else steps.max()
            raise ValueError(f"from_steps: step {wrong} is outside [0, to_step = {to_step}]")
        if steps.size > to_step + 1:  # fewer distinct steps than rows: compute each once
            decay, scale = self._between(np.arange(to_step + 1), to_step)
            decay, scale = decay[steps], scale[steps]
        else:
            decay, scale = self._between(steps, to_step)
        device = from_steps.device
        return torch.from_numpy(decay).to(device), torch.from_numpy(scale).to(device)

    def one_step(self, step: int) -> tuple[float, float]:
        """Decay and standard deviation of one step alone, for mechanisms that defer nothing."""
        decay, scale = self.decay_and_scale(torch.tensor([step - 1]), step)
        return float(decay), float(scale)

    @property
    def without_decay(self) -> bool:
        """Whether no step so far shrank the weights."""
        return bool(self._data["decay"][self._step] == 1.0)

    def gradient_learning_rate(self, step: int) -> float:
        """The rate at which step's gradient is applied: eta_t / (1 - eta_t lambda_t).

        The update happens before the step's decay, which the next settle applies.

        Raises:
            ValueError: the step has not been recorded.
        """
        if not 1 <= step <= self._step:
            raise ValueError(f"step: {step} is outside [1, {self._step}], the steps recorded")
        return float(self._data["gradient_rate"][step])

    def state_dict(self) -> dict[str, Any]:
        """The state as plain float64 tensors [step + 1] and the step itself."""
        state: dict[str, Any] = {"step": self._step}
        for name in _FIELDS:
            state[name] = torch.from_numpy(self._data[name][: self._step + 1].copy())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned.

        Raises:
            ValueError: an entry is missing, unknown, or of the wrong length or dtype.
        """
        if set(state) != {"step", *_FIELDS}:
            raise ValueError(f"state: entries {['step', *_FIELDS]} expected, {sorted(state)} given")
        step = int(state["step"])
        for name in _FIELDS:
            value = state[name]
            if value.shape != (step + 1,) or value.dtype != torch.float64:
                raise ValueError(
                    f"state: {name} must be float64 of shape ({step + 1},), not {value.dtype} "
                    f"{tuple(value.shape)}"
                )
        self._step = step
        self._data = {name: state[name].cpu().numpy().copy() for name in _FIELDS}

    def _reserve(self, size: int) -> None:
        """Make room for `size` entries, doubling, so that a step costs O(1) on average."""
        capacity = len(self._data["decay"])
        if size > capacity:
            for name in _FIELDS:
                larger = np.zeros(max(size, 2 * capacity))
                larger[:capacity] = self._data[name]
                self._data[name] = larger

    def _rebase(self) -> None:
        """Scale P by a power of two so that the current one is near 1, and Q to match."""
        now = slice(0, self._step + 1)
        exponent = -math.frexp(self._data["decay"][self._step])[1]
        with np.errstate(over="ignore", under="ignore"):
            # P of long ago becomes infinite and its Q zero: exactly their weight from now on
            self._data["decay"][now] = np.ldexp(self._data["decay"][now], exponent)
            for name in ("variance", "variance_low", "increment"):
                self._data[name][now] = np.ldexp(self._data[name][now], -2 * exponent)

    def _between(self, steps: NDArray[np.int64], to_step: int) -> tuple[Float64Array, Float64Array]:
        data = self._data
        decay_to, correction_to = data["decay"][to_step], data["decay_correction"][to_step]
        with np.errstate(under="ignore"):
            decay = decay_to / data["decay"][steps]
        decay *= 1.0 + (correction_to - data["decay_correction"][steps])
        variance = data["variance"][to_step] - data["variance"][steps]
        variance += data["variance_low"][to_step] - data["variance_low"][steps]
        length = to_step - steps
        coarse = variance < _DIRECT_BELOW * length * data["variance"][to_step]
        if coarse.any():
            oldest = int(steps[coarse].min())
            # sums of the increments of oldest+1..to_step, counted from the last one backwards
            tail = np.cumsum(data["increment"][to_step:oldest:-1])
            variance[coarse] = tail[length[coarse] - 1]
        return decay, decay_to * (1.0 + correction_to) * np.sqrt(variance)
