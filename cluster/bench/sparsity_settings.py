"""What ``dist-dp bench sparsity`` measures: the run, the rates that are tried, the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from dist_dp.cluster.bench.sparsity_training import Rates
from dist_dp.cluster.config import ModelConfig
from dist_dp.datasets.readers.criteo import PUBLISHED_CARDINALITIES
from dist_dp.errors import ConfigError
from dist_dp.sparse_settings import ADAPTIVE, CHOOSES_ONCE, SPARSE_MECHANISMS, SparseSettings

REFERENCE = "lazydp"
"""DP-SGD's distribution at a step's cost without privacy: what losses are counted from."""
EXPONENTIAL = "exponential"
"""DP-SGD with exponential selection, which no run can choose; see `dist_dp.sampled_selection`."""
MECHANISMS = ("none", REFERENCE, *SPARSE_MECHANISMS, EXPONENTIAL)
MODEL = ModelConfig(
    name="dlrm_dcn",
    embedding_dim=8,
    dense_arch=(32, 8),
    over_arch=(32, 1),
    dcn_layers=1,
    dcn_low_rank_dim=8,
)


@dataclass(frozen=True)
class Point:
    """A mechanism with its settings, at any ε.

    Attributes:
        mechanism: Its name.
        rows: k of FEST.
        threshold: τ over C₁: a record that reads n rows counts min(1, 1/√n) in it where C₁ ≤ √n.
        contribution_norm: C₁.
        share: The selection's share of a step's privacy: the ratio of the two noises.
        selections: Rows that ``exponential`` selects in a step, over all tables.
    """

    mechanism: str
    rows: int | None = None
    threshold: float | None = None
    contribution_norm: float | None = None
    share: float | None = None
    selections: int | None = None

    @property
    def planned_as(self) -> str:
        """The mechanism of the plan: exponential selection takes AdaFEST's noise on gradients."""
        return "adafest" if self.mechanism == EXPONENTIAL else self.mechanism

    def sparse(self, frequencies: str) -> SparseSettings | None:
        """As the plan has them.

        Args:
            frequencies: File of the public counts.
        """
        if self.mechanism == EXPONENTIAL:
            return SparseSettings(selection_share=self.share, threshold=2.0**20)  # unused
        if self.mechanism not in SPARSE_MECHANISMS:
            return None
        values: dict[str, Any] = {}
        if self.mechanism in CHOOSES_ONCE:
            values |= {"rows": self.rows, "frequencies": frequencies}
        if self.mechanism in ADAPTIVE:
            assert self.threshold is not None and self.contribution_norm is not None
            values |= {
                "threshold": self.threshold * self.contribution_norm,
                "max_contribution_norm": self.contribution_norm,
                "selection_share": self.share,
            }
        return SparseSettings(**values)

    def described(self) -> dict[str, Any]:
        """For the JSON file; `threshold` is τ itself there."""
        found = {k: v for k, v in asdict(self).items() if v is not None and k != "mechanism"}
        if self.threshold is not None and self.contribution_norm is not None:
            found["threshold"] = self.threshold * self.contribution_norm
        return found


_PRIVATE_RATES = (Rates(30.0, 6.0), Rates(15.0, 12.0), Rates(30.0, 12.0), Rates(60.0, 12.0))
RATES = {
    "none": (Rates(10.0, 1.0), Rates(30.0, 1.0), Rates(60.0, 1.0), Rates(30.0, 2.0)),
    "lazydp": _PRIVATE_RATES,
    "fest": _PRIVATE_RATES,
    "adafest": _PRIVATE_RATES,
    EXPONENTIAL: _PRIVATE_RATES,
}
"""Learning rates (tables, dense layers) that are tried, as many for each family of mechanisms."""

TUNED_AT = {
    "none": Point("none"),
    "lazydp": Point("lazydp"),
    "fest": Point("fest", rows=12),
    "adafest": Point("adafest", threshold=8.0, contribution_norm=1.0, share=0.3),
    EXPONENTIAL: Point(EXPONENTIAL, share=0.3, selections=100),
}
"""The setting at which a family's rates are tried, if it is in the grid; else the grid's middle."""


def family(mechanism: str) -> str:
    """Whose learning rates a mechanism has: AdaFEST+ takes AdaFEST's."""
    return mechanism.removesuffix("+")


@dataclass(frozen=True)
class SparsitySettings:
    """What is measured.

    Attributes:
        records: Generated records to train on.
        other_records: Public ones, and as many for the test.
        data_seed: Of the generated records.
        cardinalities: Rows of each generated table.
        path: A real set in their place.
        format: Its format.
        max_rows: Cap on the rows of a real set's tables.
        batch: Expected records a step.
        steps: Steps of a run.
        max_grad_norm: C.
        epsilons: The ε of the private mechanisms.
        seeds: The first one for all points, the others for those of the frontier.
        points: The grid.
        rates: What is tried, by mechanism.
        model: The model.
    """

    records: int = 524_288
    other_records: int = 131_072
    data_seed: int = 0
    cardinalities: tuple[int, ...] = PUBLISHED_CARDINALITIES
    path: Path | None = None
    format: str = "auto"
    max_rows: int | None = None
    batch: int = 2048
    steps: int = 256
    max_grad_norm: float = 1.0
    epsilons: tuple[float, ...] = (1.0, 3.0, 8.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    points: tuple[Point, ...] = ()
    rates: Mapping[str, tuple[Rates, ...]] = field(default_factory=lambda: RATES)
    model: ModelConfig = MODEL

    @property
    def families(self) -> list[str]:
        """Those of the grid, in its order, after the two that all are compared with."""
        return list(dict.fromkeys(["none", REFERENCE, *(family(p.mechanism) for p in self.points)]))

    def tuned_at(self, name: str) -> Point:
        """The point at which a family's rates are tried."""
        mine = [p for p in self.points if p.mechanism == name]
        mine = mine or [p for p in self.points if family(p.mechanism) == name]
        usual = TUNED_AT[name]
        return usual if usual in mine or not mine else mine[len(mine) // 2]

    def delta(self, records: int) -> float:
        """δ: a tenth of what one published record would make."""
        return 1.0 / (10.0 * records)


KEPT_ROWS = (1, 3, 12, 64)
PLUS_ROWS = 12
ADAFEST = (
    (5.0, 1.0, 0.5),
    (8.0, 1.0, 0.3),
    (16.0, 1.0, 0.3),
    (16.0, 1.0, 0.1),
    (32.0, 1.0, 0.1),
    (8.0, 10.0, 0.3),
)
"""(τ over C₁, C₁, ratio) of ``adafest``."""
ADAFEST_PLUS = ((4.0, 1.0, 0.3), (16.0, 1.0, 0.1))
"""The same of ``adafest+``, whose few rows are seldom false positives: τ may be lower."""
EXPONENTIAL_SELECTIONS = (20, 100, 500)
QUICK = SparsitySettings(
    records=65_536,
    other_records=16_384,
    max_rows=1000,
    batch=512,
    steps=128,
    epsilons=(3.0,),
    seeds=(0, 1),
    rates={name: rates[:2] for name, rates in RATES.items()},
)


def chosen(
    *,
    quick: bool = False,
    mechanisms: Sequence[str] | None = None,
    kept_rows: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
    contribution_norms: Sequence[float] | None = None,
    shares: Sequence[float] | None = None,
    selections: Sequence[int] | None = None,
    rates: Sequence[tuple[float, float]] | None = None,
    **changes: Any,
) -> SparsitySettings:
    """The default settings, or the quick ones, with what is given changed.

    Args:
        quick: Begin from :data:`QUICK`.
        mechanisms: Names; all by default.
        kept_rows: k of ``fest``.
        thresholds: τ over C₁ of ``adafest`` and ``adafest+``. What is given of these three makes a
            grid of all combinations; what is left out has one value then.
        contribution_norms: C₁.
        shares: Ratios.
        selections: m of ``exponential``, over all tables.
        rates: Learning rates of tables and dense layers to try, the same for all mechanisms.
        **changes: Fields of :class:`SparsitySettings`; None is left out.

    Raises:
        ConfigError: A mechanism is unknown, a ratio is no share, or a number fits no other.
    """
    base = QUICK if quick else SparsitySettings()
    settings = replace(base, **{k: v for k, v in changes.items() if v is not None})
    if rates:
        tried = tuple(Rates(tables, dense) for tables, dense in rates)
        settings = replace(settings, rates=dict.fromkeys(RATES, tried))
    for name in mechanisms or ():
        if name not in MECHANISMS:
            raise ConfigError(
                f"--mechanisms: '{name}' is none of {', '.join(MECHANISMS)}; dpsgd has lazydp's "
                "distribution and is not measured apart"
            )
    for share in shares or ():
        if not share < 1:
            raise ConfigError(f"--ratios: {share:g} is no share of a budget: give less than 1")
    rows = kept_rows or (KEPT_ROWS[1:3] if quick else KEPT_ROWS)
    given = thresholds or contribution_norms or shares
    every = tuple(product(thresholds or (16.0,), contribution_norms or (1.0,), shares or (0.3,)))
    adaptive = {
        "adafest": every if given else ADAFEST[:2] if quick else ADAFEST,
        "adafest+": every if given else ADAFEST_PLUS[:1] if quick else ADAFEST_PLUS,
    }
    points: list[Point] = []
    for name in mechanisms or MECHANISMS:
        if name == "fest":
            points += [Point(name, k) for k in rows]
        elif name == EXPONENTIAL:
            usual = EXPONENTIAL_SELECTIONS[1:2] if quick else EXPONENTIAL_SELECTIONS
            some = selections or usual
            points += [Point(name, share=r, selections=m) for r in shares or (0.3,) for m in some]
        elif name in ADAPTIVE:
            k = PLUS_ROWS if name in CHOOSES_ONCE else None
            points += [Point(name, k, *values) for values in adaptive[name]]
    return replace(settings, points=tuple(points), cardinalities=_capped(settings))


def _capped(settings: SparsitySettings) -> tuple[int, ...]:
    most = settings.max_rows
    return tuple(n if most is None else min(n, most) for n in settings.cardinalities)
