"""Readers, one-time conversion to memory-mapped Arrow, batches and synthetic click logs.

A data set is declared by a :class:`~dist_dp.datasets.schema.DataSchema`, converted once by
:func:`~dist_dp.datasets.store.convert`, and then read by row number through
:class:`~dist_dp.datasets.store.ArrowStore`. Names are resolved on first use, so that importing
the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "ArrowStore": "store",
    "ClickBatch": "batch",
    "ClickDataset": "click_dataset",
    "DataSchema": "schema",
    "DenseFeature": "schema",
    "Manifest": "manifest",
    "SparseFeature": "schema",
    "open_reader": "readers",
    "write_criteo_like": "synthetic",
}

__all__ = [
    "ArrowStore",
    "ClickBatch",
    "ClickDataset",
    "DataSchema",
    "DenseFeature",
    "Manifest",
    "SparseFeature",
    "open_reader",
    "write_criteo_like",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
