"""Noise mechanisms for sharded tables: one module each, behind one interface.

``base``       what a mechanism is asked to do, and when
``none``       no noise (the baseline; not private)
``dpsgd``      noise on every row at every step (the slow reference)
``lazydp``     the same distribution, each row's noise drawn when the row is next read (default)
``sparse``     noise on few rows, every iterate private: FEST, AdaFEST, and both
``comparison`` what benchmarks compare with; refused for real runs
``exponential`` likewise: rows chosen by exponential mechanisms at every step
"""

from __future__ import annotations

from dist_dp.errors import ConfigError
from dist_dp.mechanisms.base import Mechanism, Read
from dist_dp.mechanisms.comparison import COMPARISONS, ComparisonMechanism
from dist_dp.mechanisms.dpsgd import DPSGD
from dist_dp.mechanisms.exponential import ExponentialSelection
from dist_dp.mechanisms.lazydp import LazyDP
from dist_dp.mechanisms.none import NoMechanism
from dist_dp.mechanisms.sparse import FEST, AdaFEST, AdaFESTPlus, SparseNoise

MECHANISMS: dict[str, type[Mechanism]] = {
    m.name: m for m in (NoMechanism, DPSGD, LazyDP, FEST, AdaFEST, AdaFESTPlus)
}

_REFUSED: dict[str, type[ComparisonMechanism]] = {
    **COMPARISONS,
    ExponentialSelection.name: ExponentialSelection,
}


def mechanism_class(name: str) -> type[Mechanism]:
    """The mechanism of a name.

    Raises:
        ConfigError: There is none of that name, or it is there for benchmarks to compare with.
    """
    if name in _REFUSED:
        raise ConfigError(
            f"mechanism '{name}' {_REFUSED[name].refusal}; choose one of "
            f"{', '.join(MECHANISMS)} (benchmarks measure it beside them)"
        )
    if name not in MECHANISMS:
        raise ConfigError(f"mechanism '{name}' is unknown; choose one of {', '.join(MECHANISMS)}")
    return MECHANISMS[name]


__all__ = [
    "DPSGD",
    "FEST",
    "MECHANISMS",
    "AdaFEST",
    "AdaFESTPlus",
    "LazyDP",
    "Mechanism",
    "NoMechanism",
    "Read",
    "SparseNoise",
    "mechanism_class",
]
