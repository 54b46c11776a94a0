"""What a private step costs: the mechanisms that can be charged, in ``dp_accounting``'s terms.

Every event says how its privacy loss is distributed; nothing is composed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

from dist_dp.bounded_range import selections_pld
from dist_dp.errors import ConfigError

if TYPE_CHECKING:
    import dp_accounting

# Beyond these dp_accounting has no floats to calculate with; more rate or less noise costs no less.
_LEAST_RATE = 1e-300
_MOST_NOISE = 1e100


@dataclass(frozen=True, order=True)
class _NoiseEvent:
    """Noise on a sum over a Poisson sample of the units."""

    noise_multiplier: float
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        """Normalise both values to ``float`` and check their ranges."""
        for name in ("noise_multiplier", "sample_rate"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier}: give a finite number of 0 or more"
            )
        check_sample_rate(self.sample_rate)

    @property
    def is_private(self) -> bool:
        """Whether there is noise."""
        return self.noise_multiplier > 0


@dataclass(frozen=True, order=True)
class GaussianEvent(_NoiseEvent):
    """One step of the Gaussian mechanism on a Poisson sample of the units (records or users).

    Args:
        noise_multiplier: standard deviation of the noise over the l2 sensitivity of the sum; 0
            means no noise, hence no guarantee.
        sample_rate: probability with which each unit takes part, independently; 1 means that all
            take part (no amplification by sampling).

    Raises:
        ConfigError: a value is out of its range.
    """

    kind: ClassVar[str] = "gaussian"

    def to_dp_event(self, count: int = 1) -> dp_accounting.DpEvent:
        """Return ``count`` such steps in the vocabulary of ``dp_accounting``."""
        import dp_accounting as dp

        return _sampled(dp.GaussianDpEvent(self.noise_multiplier), self.sample_rate, count)

    def pld(self, interval: float) -> Any:
        """Return the privacy loss distribution of one step, on a grid of ``interval``."""
        from dp_accounting import NeighboringRelation
        from dp_accounting.pld import privacy_loss_distribution

        return privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=min(self.noise_multiplier, _MOST_NOISE),
            sampling_prob=max(self.sample_rate, _LEAST_RATE),
            value_discretization_interval=interval,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        )

    def times(self, count: int) -> GaussianEvent | None:
        """Return the one event that ``count`` such steps are, if there is one."""
        if self.sample_rate < 1.0:
            return None
        return GaussianEvent(self.noise_multiplier / math.sqrt(count))

    def rough_loss(self) -> tuple[float, float]:
        """Return about the mean of one step's privacy loss, and its largest value."""
        inverse = (1 / self.noise_multiplier) * (1 / self.noise_multiplier)  # inf at worst
        mean = self.sample_rate * inverse / 2
        if inverse < 100:
            mean = min(mean, self.sample_rate**2 * math.expm1(inverse))
        return mean, inverse / 2 + 9 * math.sqrt(inverse)


@dataclass(frozen=True, order=True)
class LaplaceEvent(_NoiseEvent):
    """The Laplace mechanism on a Poisson sample of the units.

    Args:
        noise_multiplier: scale of the noise over the l1 sensitivity.
        sample_rate: as for `GaussianEvent`.

    Raises:
        ConfigError: a value is out of its range.
    """

    kind: ClassVar[str] = "laplace"

    def to_dp_event(self, count: int = 1) -> dp_accounting.DpEvent:
        """Return ``count`` such steps in the vocabulary of ``dp_accounting``."""
        import dp_accounting as dp

        return _sampled(dp.LaplaceDpEvent(self.noise_multiplier), self.sample_rate, count)

    def pld(self, interval: float) -> Any:
        """Return the privacy loss distribution of one step, on a grid of ``interval``."""
        from dp_accounting.pld import privacy_loss_distribution

        return privacy_loss_distribution.from_laplace_mechanism(
            self.noise_multiplier,
            sampling_prob=max(self.sample_rate, _LEAST_RATE),
            value_discretization_interval=interval,
        )

    def times(self, count: int) -> LaplaceEvent | None:
        """Several steps are no single one."""
        return self if count == 1 else None

    def rough_loss(self) -> tuple[float, float]:
        """Return about the mean of one step's privacy loss, and its largest value."""
        largest = 1 / self.noise_multiplier
        return self.sample_rate * min(largest, largest * largest), largest


@dataclass(frozen=True, order=True)
class PureEvent:
    """Any (ε, 0)-differentially private mechanism, such as a selection by the exponential one.

    Args:
        epsilon: its ε, for add-or-remove-one unit, above 0.

    Raises:
        ConfigError: ε is out of range.
    """

    kind: ClassVar[str] = "pure"
    epsilon: float

    def __post_init__(self) -> None:
        """Normalise ε to ``float`` and check it."""
        object.__setattr__(self, "epsilon", float(self.epsilon))
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ConfigError(f"epsilon of an event is {self.epsilon}: give a number above 0")

    @property
    def is_private(self) -> bool:
        """Always."""
        return True

    def to_dp_event(self, count: int = 1) -> dp_accounting.DpEvent:
        """Refused: ``dp_accounting`` has no event for it, only a privacy loss distribution.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{count} selections of epsilon {self.epsilon:g} have no Rényi accounting: use the "
            "accountant 'pld'"
        )

    def pld(self, interval: float) -> Any:
        """Return the privacy loss distribution that dominates every such mechanism's."""
        from dp_accounting.pld import common, privacy_loss_distribution

        return privacy_loss_distribution.from_privacy_parameters(
            common.DifferentialPrivacyParameters(self.epsilon, 0.0),
            value_discretization_interval=interval,
        )

    def times(self, count: int) -> PureEvent | None:
        """Several steps are no single one."""
        return self if count == 1 else None

    def rough_loss(self) -> tuple[float, float]:
        """Return about the mean of one step's privacy loss, and its largest value."""
        return self.epsilon * math.tanh(self.epsilon / 2), self.epsilon


@dataclass(frozen=True, order=True)
class TopKEvent:
    """Selections of one item after another, each with an ε₀-bounded range: a private top k.

    Guarantee:
        Bounds what any sequence of so many selections costs, each chosen in the light of those
        before, where each is an exponential mechanism with probabilities in proportion to
        exp(ε₀ · count) among what is left, and a unit more raises every count by 1 or not at all
        (see `dist_dp.bounded_range`). The k largest of counts with Gumbel noise of scale 1/ε₀ are
        selected so (Durfee and Rogers 2019). For add-or-remove-one unit.

    Args:
        epsilon0: ε₀ of each selection, above 0.
        selections: how many there are, over all tables together, 1 or more.

    Raises:
        ConfigError: a value is out of its range.
    """

    kind: ClassVar[str] = "top_k"
    epsilon0: float
    selections: int

    def __post_init__(self) -> None:
        """Normalise ε₀ to ``float`` and check both values."""
        object.__setattr__(self, "epsilon0", float(self.epsilon0))
        if not (math.isfinite(self.epsilon0) and self.epsilon0 > 0):
            raise ConfigError(f"epsilon0 of a selection is {self.epsilon0}: give a number above 0")
        if isinstance(self.selections, bool) or not isinstance(self.selections, int):
            raise ConfigError(f"selections is {self.selections!r}: give an integer")
        if self.selections < 1:
            raise ConfigError(f"selections is {self.selections}: give 1 or more")

    @property
    def is_private(self) -> bool:
        """Always."""
        return True

    def to_dp_event(self, count: int = 1) -> dp_accounting.DpEvent:
        """Return ``count`` such choices in the vocabulary of ``dp_accounting``.

        A mechanism with an ε₀-bounded range is ε₀²/8-zCDP (Cesar and Rogers 2021).
        """
        import dp_accounting as dp

        return dp.ZCDpEvent(count * self.selections * self.epsilon0**2 / 8)

    def pld(self, interval: float) -> Any:
        """Return the privacy loss distribution that dominates all selections together."""
        return selections_pld(self.epsilon0, self.selections, interval)

    def times(self, count: int) -> TopKEvent:
        """Return the one event that ``count`` such choices are: as many selections."""
        return TopKEvent(self.epsilon0, self.selections * count)

    def rough_loss(self) -> tuple[float, float]:
        """Return about the mean of the privacy loss, and about its largest value."""
        mean = self.selections * min(self.epsilon0**2 / 8, self.epsilon0)
        most = self.selections * self.epsilon0
        return mean, min(most, mean + 10 * math.sqrt(2 * mean))


PrivacyEvent = GaussianEvent | LaplaceEvent | PureEvent | TopKEvent

_KINDS: dict[str, type[PrivacyEvent]] = {
    kind.kind: kind for kind in (GaussianEvent, LaplaceEvent, PureEvent, TopKEvent)
}


def gaussians_together(
    noise_multipliers: Sequence[float], sample_rate: float = 1.0
) -> GaussianEvent:
    """Several Gaussian mechanisms on *the same* sample in one step, as the one that they are.

    Noisy sums x + σ₁z₁ and x + σ₂z₂ of one sample tell as much as their weighted mean, which has
    noise 1/√(σ₁⁻² + σ₂⁻²).

    Guarantee:
        Exact, whatever the sample rate. (Charging one subsampled event for each would treat the
        sample as drawn anew for each, and is no bound: the mechanisms share one draw.)

    Args:
        noise_multipliers: of each, over its own sensitivity.
        sample_rate: of the step.
    """
    if not noise_multipliers:
        raise ConfigError("noise_multipliers is empty: give that of each mechanism of the step")
    if min(noise_multipliers) <= 0:
        return GaussianEvent(min(noise_multipliers), sample_rate)
    least = min(noise_multipliers)
    squares = sum((least / multiplier) ** 2 for multiplier in noise_multipliers)
    return GaussianEvent(least / math.sqrt(squares), sample_rate)


def event_order(event: PrivacyEvent) -> tuple[Any, ...]:
    """A sort key over events of all kinds."""
    return (event.kind, *vars(event).values())


def event_to_json(event: PrivacyEvent) -> dict[str, Any]:
    """Return an event in simple types."""
    return {"kind": event.kind, **asdict(event)}


def event_from_json(item: Mapping[str, Any]) -> PrivacyEvent:
    """Return what `event_to_json` was given; without a kind it is Gaussian (ledgers before 0.2).

    Raises:
        ConfigError, TypeError: it is something else.
    """
    values = dict(item)
    kind = values.pop("kind", GaussianEvent.kind)
    if kind not in _KINDS:
        raise ConfigError(f"an event of kind {kind!r} needs another version of dist-dp")
    wanted = {field.name for field in fields(_KINDS[kind])}
    if set(values) != wanted:
        raise ConfigError(f"an event of kind {kind!r} has {sorted(values)}, not {sorted(wanted)}")
    return _KINDS[kind](**values)


def check_sample_rate(sample_rate: float) -> None:
    """Refuse a sample rate outside (0, 1].

    Raises:
        ConfigError: with what it is.
    """
    if not 0 < sample_rate <= 1:
        raise ConfigError(
            f"sample_rate is {sample_rate}: it must lie in (0, 1]; it is the expected batch size "
            "over the number of records"
        )


def _sampled(event: Any, sample_rate: float, count: int) -> dp_accounting.DpEvent:
    import dp_accounting as dp

    if sample_rate < 1.0:
        event = dp.PoissonSampledDpEvent(sample_rate, event)
    return cast("dp_accounting.DpEvent", dp.SelfComposedDpEvent(event, count))
