"""The private runs of ``test_optimizer_groups``: several parameter groups in one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.dist_dp import sharding_runs, unsharded

# Tables or prefixes of dense layers, learning rate, weight decay, momentum in `with_momentum`.
GROUPS: list[tuple[tuple[str, ...], float, float, float]] = [
    (("pooled.a", "top."), 0.5, 0.1, 0.0),
    (("bottom.",), 0.3, 0.05, 0.5),
    (("pooled.b", "weighted.v", "weighted.x", "sequence.s"), 0.2, 0.0, 0.9),
    (("pooled.c", "pooled.d", "weighted.w", "each."), 0.7, 0.2, 0.6),
]
KINDS: dict[str, Any] = {
    "table_wise": "table_wise",
    "column_wise": "column_wise",
    "mixed": sharding_runs.KINDS["mixed too"],
}


def _group(name: str) -> int:
    tables = {unsharded.parameter_of(t): t for t in unsharded.TABLES}
    found = tables.get(name, name)
    return next(i for i, (names, *_) in enumerate(GROUPS) if found.startswith(names))


def groups_of(whole: nn.Module, momentum: bool) -> torch.optim.Optimizer:
    members: list[list[nn.Parameter]] = [[] for _ in GROUPS]
    for name, parameter in whole.named_parameters():
        members[_group(name)].append(parameter)
    return torch.optim.SGD(
        [
            {"params": m, "lr": lr, "weight_decay": decay, "momentum": mu if momentum else 0.0}
            for m, (_, lr, decay, mu) in zip(members, GROUPS, strict=True)
        ],
        lr=1.0,
    )


def several_groups(whole: nn.Module) -> torch.optim.Optimizer:
    return groups_of(whole, momentum=False)


def with_momentum(whole: nn.Module) -> torch.optim.Optimizer:
    return groups_of(whole, momentum=True)


def rates() -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) by table or dense parameter."""
    tables = {unsharded.parameter_of(t): t for t in unsharded.TABLES}
    return {
        tables.get(name, name): GROUPS[_group(name)][1:3]
        for name, _ in unsharded.model().named_parameters()
    }


def all_runs(faults: list[str]) -> dict[Any, dict[str, Any]]:
    """Every kind with noise, without gradients, and without noise but with momentum; faults."""
    found: dict[Any, dict[str, Any]] = {}
    for name, kind in KINDS.items():
        found["lazydp", name] = sharding_runs.private_run(kind, optimizer=several_groups)
        found["zero", name] = sharding_runs.private_run(kind, optimizer=several_groups, zero=True)
        found["momentum", name] = sharding_runs.private_run(
            kind, optimizer=with_momentum, sigma=0.0
        )
    for fault in faults:
        found[fault, "mixed"] = sharding_runs.private_run(
            KINDS["mixed"], optimizer=several_groups, fault=fault
        )
    return found
