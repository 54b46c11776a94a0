"""Differentially private training of recommenders with sharded embedding tables.

The privacy core: clipping, noise, sampling, accounting, release. It knows TorchRec and
torch.distributed and nothing of Ray. Start with :class:`~dist_dp.engine.PrivacyEngine`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_dp.engine import PrivacyEngine
    from dist_dp.plan import PrivacyPlan
    from dist_dp.released import Release, load_release
    from dist_dp.sharding import TableOptimizer

# Imported when first used: torchrec alone takes seconds.
_HOMES = {
    "PrivacyEngine": "dist_dp.engine",
    "PrivacyPlan": "dist_dp.plan",
    "Release": "dist_dp.released",
    "TableOptimizer": "dist_dp.sharding",
    "load_release": "dist_dp.released",
}

__all__ = ["PrivacyEngine", "PrivacyPlan", "Release", "TableOptimizer", "load_release"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
