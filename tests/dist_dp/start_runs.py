"""Models started from a release by every sharding, in a world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.dist_dp.release_runs import piece_of, tables_of, trained


def started_in_a_world(home: Path, folder: Path, kinds: list[str]) -> dict[str, list[bool]]:
    """Whether each shard and dense tensor is that of the release, by sharding."""
    from dist_dp.distributed import barrier
    from dist_dp.release import dense_tensors
    from dist_dp.released import Release

    tables, dense = tables_of(folder), Release.open(folder).dense()
    found: dict[str, list[bool]] = {}
    for kind in kinds:
        made = trained(home / kind, 0, sharding=kind, start_from=folder)
        own: dict[str, Any] = dense_tensors(made.parts)
        assert own.keys() == dense.keys()
        found[kind] = [
            *(torch.equal(piece_of(s, tables[s.table]), s.weight) for s in made.parts.shards),
            *(torch.equal(own[name], tensor) for name, tensor in dense.items()),
        ]
        barrier()
    return found
