"""Settings of the mechanisms that put noise on few rows, and what follows from them.

One step's privacy, that of a Gaussian mechanism with noise multiplier σ, is shared between the
selection of rows (σ₁, on contribution maps of norm C₁) and the gradients (σ₂, of norm C₂):

    1/σ₁² = r/σ²,   1/σ₂² = (1 − r)/σ²,   r = ``selection_share``,

so that both together cost what one with σ does (arXiv 2311.08357, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from dist_dp.errors import ConfigError
from dist_dp.plain_model import PlainModel

if TYPE_CHECKING:
    from collections.abc import Iterable

_Value = TypeVar("_Value")

SPARSE_MECHANISMS = ("fest", "adafest", "adafest+")
"""Names of the mechanisms with noise on few rows."""
CHOOSES_ONCE = frozenset({"fest", "adafest+"})
"""Those that choose rows once, before the first step."""
ADAPTIVE = frozenset({"adafest", "adafest+"})
"""Those that choose rows anew at every step."""


class SparseSettings(PlainModel):
    """Which rows are trained and noised.

    Args:
        selection_share: share r of each step's privacy that the selection takes, between 0 and 1
            (`adafest`, `adafest+`).
        max_contribution_norm: bound C₁ on the norm of a unit's contribution map, which has a 1 for
            each row that the unit touches. With C₁ below √(rows touched) a map is scaled down.
        threshold: τ, the noisy count from which a row survives: for all tables, or by table.
        false_positives: instead of `threshold`: rows that survive a step although no unit touches
            them, in the mean; for all tables together, or by table. τ follows from it.
        rows: k, the rows of a table that are trained at all (`fest`, `adafest+`): for every table
            (at most its rows then), or by table; tables that are not named keep all rows.
        frequencies: file of public row counts that `rows` are chosen by (`dist_dp.public_counts`);
            left out, they are chosen privately, from the training data. Counts of the training
            records are not public: with those there is no guarantee.
        choice_epsilon: the ε that the private choice costs, at the plan's δ, out of the plan's.
        choice_noise: how it is made private: `gaussian` (by default; noise on the counts, whose
            cost does not grow with k) or `gumbel` (one-shot top k, for few rows).
        max_rows_per_unit: most rows of a table that one unit counts for in the private choice.
        choice: what the private choice costs, an event of `dist_dp.events` in simple types; found
            by `PrivacyPlan.with_choice`.

    Raises:
        ConfigError: a value is out of range, or two exclude each other.
    """

    called: ClassVar[str] = "sparse settings"

    selection_share: float | None = None
    max_contribution_norm: float | None = Field(default=None, gt=0)
    threshold: float | dict[str, float] | None = None
    false_positives: float | dict[str, float] | None = None
    rows: int | dict[str, int] | None = None
    frequencies: str | None = None
    choice_epsilon: float | None = Field(default=None, gt=0)
    choice_noise: Literal["gumbel", "gaussian"] | None = None
    max_rows_per_unit: int | None = Field(default=None, ge=1)
    choice: dict[str, float | int | str] | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: object) -> object:
        # YAML reads `yes` as true, and true would pass for the number 1.
        given = value.values() if isinstance(value, dict) else (value,)
        if any(isinstance(each, bool) for each in given):
            raise ValueError("should be a number or a word, not true or false")
        return value

    @model_validator(mode="after")
    def _must_agree(self) -> Self:
        share = self.selection_share
        if share is not None and not 0 < share < 1:
            raise ConfigError(
                f"selection_share is {share:g}: it is the part of the budget that the selection "
                "of rows takes, and what is left is the gradients'; give a number between 0 and 1, "
                "both excluded, such as 0.1"
            )
        if self.threshold is not None and self.false_positives is not None:
            raise ConfigError(
                "threshold and false_positives are both given, but one follows from the other: "
                "leave out one of them"
            )
        for table, count in _each(self.rows):
            if count < 1:
                raise ConfigError(f"rows{table} is {count}: give 1 or more")
        for table, target in _each(self.false_positives):
            if not target > 0:
                raise ConfigError(
                    f"false_positives{table} is {target:g}: give a number above 0 (small for few), "
                    "or set threshold"
                )
        if self.frequencies is not None:
            for key in ("choice_epsilon", "choice_noise", "max_rows_per_unit"):
                if getattr(self, key) is not None:
                    raise ConfigError(
                        f"{key} is set, but the rows are chosen from public frequencies, at no "
                        f"cost: leave out {key} or frequencies"
                    )
        return self

    def check_for(self, mechanism: str) -> None:
        """Refuse settings that the mechanism has no use for, or lacks.

        Raises:
            ConfigError: with the key and the remedy.
        """
        used = {
            "selection_share": mechanism in ADAPTIVE,
            "max_contribution_norm": mechanism in ADAPTIVE,
            "threshold": mechanism in ADAPTIVE,
            "false_positives": mechanism in ADAPTIVE,
            "rows": mechanism in CHOOSES_ONCE,
            "frequencies": mechanism in CHOOSES_ONCE,
            "choice_epsilon": mechanism in CHOOSES_ONCE,
            "choice_noise": mechanism in CHOOSES_ONCE,
            "max_rows_per_unit": mechanism in CHOOSES_ONCE,
        }
        for key, is_used in used.items():
            if getattr(self, key) is not None and not is_used:
                others = ADAPTIVE if key in _ADAPTIVE_KEYS else CHOOSES_ONCE
                raise ConfigError(
                    f"sparse.{key} is set, but mechanism '{mechanism}' has no use for it: leave it "
                    f"out, or choose {' or '.join(sorted(others))}"
                )
        if mechanism in ADAPTIVE and self.threshold is None and self.false_positives is None:
            raise ConfigError(
                f"sparse.threshold is missing: mechanism '{mechanism}' needs the noisy count from "
                "which a row survives, or sparse.false_positives, the rows a step may noise in vain"
            )
        if mechanism in CHOOSES_ONCE:
            if self.rows is None:
                raise ConfigError(
                    f"sparse.rows is missing: mechanism '{mechanism}' trains the k most frequent "
                    "rows of a table; give k, for all tables or by table"
                )
            if self.frequencies is None and self.choice_epsilon is None:
                raise ConfigError(
                    f"sparse.choice_epsilon is missing: mechanism '{mechanism}' chooses rows from "
                    "the training data, which costs privacy; give the part of ε it may cost, or "
                    "sparse.frequencies, a file of public counts"
                )

    @property
    def chooses_privately(self) -> bool:
        """Whether rows are chosen from the training data."""
        return self.rows is not None and self.frequencies is None

    @property
    def rows_of_a_unit(self) -> int:
        """Most rows of a table that a unit counts for in the choice, by default 1."""
        return self.max_rows_per_unit or 1

    def rows_to_choose(self, num_rows: Mapping[str, int]) -> dict[str, int]:
        """How many rows of which tables are chosen; the others are kept whole.

        Args:
            num_rows: rows by unique name of the table.

        Raises:
            ConfigError: a table does not exist, or has fewer rows than it is to keep; or a number
                for all tables is above the largest's rows.
        """
        if self.rows is None:
            return {}
        if isinstance(self.rows, int) and self.rows > max(num_rows.values()):
            raise ConfigError(
                f"sparse.rows is {self.rows:,}, but the largest table has "
                f"{max(num_rows.values()):,} rows: give fewer, or choose 'adafest' to keep all rows"
            )
        asked = by_table(self.rows, num_rows, "sparse.rows", default=0)
        for table, wanted in asked.items():
            if wanted > num_rows[table] and not isinstance(self.rows, int):
                raise ConfigError(
                    f"sparse.rows: {wanted:,} rows of table '{table}' are to be kept, but it has "
                    f"{num_rows[table]:,}: give at most so many, or leave the table out to keep all"
                )
        return {t: k for t, k in asked.items() if 0 < k < num_rows[t]}

    @property
    def share(self) -> float:
        """r, by default a tenth."""
        return 0.1 if self.selection_share is None else self.selection_share

    @property
    def contribution_norm(self) -> float:
        """C₁, by default 1."""
        return 1.0 if self.max_contribution_norm is None else self.max_contribution_norm

    def selection_multiplier(self, noise_multiplier: float) -> float:
        """σ₁ of a step whose noise multiplier is σ."""
        return noise_multiplier / math.sqrt(self.share)

    def gradient_multiplier(self, noise_multiplier: float) -> float:
        """σ₂ of a step whose noise multiplier is σ."""
        return noise_multiplier / math.sqrt(1.0 - self.share)

    def thresholds(
        self, noise_multiplier: float, rows: Mapping[str, int]
    ) -> dict[str, tuple[float, float]]:
        """τ of each table, and the probability that a row that no unit touches survives.

        Args:
            noise_multiplier: σ of the step.
            rows: how many rows of each table may survive at all.

        Guarantee:
            A function of public settings alone: no count of the data is in it.

        Raises:
            ConfigError: a table that a setting names does not exist.
        """
        deviation = self.selection_multiplier(noise_multiplier) * self.contribution_norm
        if self.threshold is not None:
            taus = by_table(self.threshold, rows, "sparse.threshold")
            return {t: (tau, _tail(tau, deviation)) for t, tau in taus.items()}
        assert self.false_positives is not None
        if isinstance(self.false_positives, dict):
            targets: dict[str, float] = by_table(
                self.false_positives, rows, "sparse.false_positives"
            )
            rates = {t: targets[t] / max(1, rows[t]) for t in rows}
        else:
            rates = dict.fromkeys(rows, self.false_positives / max(1, sum(rows.values())))
        found = {}
        for table, rate in rates.items():
            if rate >= 0.5:
                raise ConfigError(
                    f"sparse.false_positives: half of table '{table}' or more ({rate:.0%} of its "
                    f"{rows[table]:,} rows) would survive each step untouched: lower it"
                )
            # Without noise nothing survives that no unit touches; a count of one is enough.
            tau = _quantile(rate) * deviation if deviation else 2.0**-20
            found[table] = (tau, _tail(tau, deviation))
        return found


_ADAPTIVE_KEYS = ("selection_share", "max_contribution_norm", "threshold", "false_positives")


def by_table(
    given: _Value | Mapping[str, _Value],
    tables: Iterable[str],
    key: str,
    default: _Value | None = None,
) -> dict[str, _Value]:
    """A setting for each table.

    Args:
        given: for all tables, or by a table's name, with or without its collection's path.
        tables: unique names (path of the collection, a dot, name).
        key: what the setting is called.
        default: for tables that are not named; None if all must be.

    Raises:
        ConfigError: a name is unknown, or means several tables, or a table is not named.
    """
    names = list(tables)
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    found: dict[str, _Value] = {}
    for name, value in given.items():
        meant = [t for t in names if name in (t, t.rpartition(".")[2])]
        if len(meant) != 1:
            said = f"means {', '.join(meant)}" if meant else "is no table of the model"
            raise ConfigError(f"{key}: '{name}' {said}; the tables are {', '.join(sorted(names))}")
        found[meant[0]] = value
    for name in names:
        if name not in found:
            if default is None:
                raise ConfigError(f"{key} names no value for table '{name}': add it")
            found[name] = default
    return found


def _each(value: object) -> list[tuple[str, float]]:
    """(" of table 'name'", value) for each value of a setting that may go by table."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [(f" of table '{name}'", each) for name, each in value.items()]
    assert isinstance(value, int | float)
    return [("", value)]


def _tail(threshold: float, deviation: float) -> float:
    """P(N(0, deviation²) >= threshold), to full relative precision."""
    if deviation == 0:
        return float(threshold <= 0)
    return 0.5 * math.erfc(threshold / deviation / math.sqrt(2.0))


def _quantile(rate: float) -> float:
    """Where a standard normal's upper tail is `rate`."""
    from scipy.special import ndtri

    return -float(ndtri(rate))
