"""What a user's optimizer says about tables and dense layers, read before the model is sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_dp.errors import ConfigError
from dist_dp.sharding import TableOptimizer, embedding_collections


@dataclass(frozen=True)
class TableGroup:
    """Tables that share a learning rate, weight decay and momentum.

    Attributes:
        tables: Unique names (path of the collection, dot, name).
        lr: Learning rate at the start.
        weight_decay: Coupled, as in SGD.
        momentum: Of SGD; 0 for none. It cannot change during a run.
    """

    tables: tuple[str, ...]
    lr: float
    weight_decay: float
    momentum: float


@dataclass(frozen=True)
class _Group:
    """One of the optimizer's parameter groups; ``members`` are ids of its parameters."""

    defaults: Mapping[str, Any]
    momentum: float
    members: frozenset[int]


@dataclass(frozen=True)
class OptimizerSettings:
    """What a user's optimizer says, apart for tables and dense layers.

    Attributes:
        tables: The fused optimizer of the tables.
        kind: The dense optimizer's class.
        groups: The optimizer's parameter groups; a single one holds every parameter.
        table_lr: The tables' learning rate, where it is not their group's.
    """

    tables: TableOptimizer
    kind: type[torch.optim.Optimizer]
    groups: tuple[_Group, ...]
    table_lr: float | None = None

    def table_groups(self, model: nn.Module) -> list[TableGroup]:
        """The groups that hold tables, in order.

        Args:
            model: The unsharded model.

        Raises:
            ConfigError: A table or a trained dense parameter is in no group, or the tables'
                optimizer cannot have several.
        """
        by_group: dict[int, list[str]] = {}
        inside: set[int] = set()
        for path, collection in embedding_collections(model).items():
            for name, parameter in collection.named_parameters():
                inside.add(id(parameter))
                table = f"{path}.{name.split('.')[-2]}"
                by_group.setdefault(self._group_of(table, parameter), []).append(table)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in inside:
                self._group_of(name, parameter)
        if len(by_group) > 1 and self.tables.kind != "sgd":
            raise ConfigError(
                f"the tables are in {len(by_group)} parameter groups of the optimizer, but "
                f"'{self.tables.kind}' has one learning rate for all tables: put them in one "
                "group, or use sgd for the tables"
            )
        if len(by_group) > 1 and self.table_lr is not None:
            raise ConfigError(
                f"table_lr is given, but the tables are in {len(by_group)} parameter groups of the "
                "optimizer: set lr in each group, or leave out table_lr"
            )
        found = []
        for number in sorted(by_group):
            group = self.groups[number]
            lr = self.table_lr if self.table_lr is not None else group.defaults["lr"]
            decay = float(group.defaults.get("weight_decay", 0.0))
            tables = tuple(by_group[number])
            found.append(TableGroup(tables, float(lr), decay, group.momentum))
        return found

    def _group_of(self, name: str, parameter: nn.Parameter) -> int:
        if len(self.groups) == 1:
            return 0
        for number, group in enumerate(self.groups):
            if id(parameter) in group.members:
                return number
        raise ConfigError(
            f"'{name}' is in none of the optimizer's {len(self.groups)} parameter groups: add it "
            "to one, or freeze it (requires_grad_(False)) if it is no table"
        )

    def rebuild(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer | None:
        """The same kind of optimizer over the dense parameters alone; None if there are none.

        Args:
            parameters: The trained dense parameters, the same objects as in the user's optimizer.
        """
        members: dict[int, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            members.setdefault(self._group_of(name, parameter), []).append(parameter)
        if not members:
            return None
        groups = [{"params": members[n], **self.groups[n].defaults} for n in sorted(members)]
        return self.kind(groups, **self.groups[min(members)].defaults)


def optimizer_settings(
    optimizer: torch.optim.Optimizer,
    tables: TableOptimizer | None = None,
    table_lr: float | None = None,
) -> OptimizerSettings:
    """Reads the settings of a user's optimizer for tables and dense layers.

    Args:
        optimizer: Over all parameters of the unsharded model, in any number of groups; one group
            may hold both tables and dense parameters.
        tables: Overrides the tables' optimizer.
        table_lr: Overrides the tables' learning rate, if they are in one group.

    Raises:
        ConfigError: The optimizer cannot be split that way.
    """
    kind = type(optimizer)
    groups = optimizer.param_groups
    given = tables
    if tables is None:
        tables = _for_tables(kind, groups[0])
    if tables.momentum and tables.kind != "sgd":
        raise ConfigError(
            f"momentum {tables.momentum} with the table optimizer '{tables.kind}' is not "
            "supported; use sgd, or momentum=0"
        )
    return OptimizerSettings(
        tables,
        kind,
        tuple(_read_group(optimizer, group, tables, given) for group in groups),
        table_lr,
    )


def _for_tables(kind: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> TableOptimizer:
    """The same optimizer for tables, with the settings of a group.

    Raises:
        ConfigError: Tables have no such variant of it.
    """
    kinds = {"SGD": "sgd", "Adagrad": "adagrad", "Adam": "adam"}
    kind_for_tables: Any = kinds.get(kind.__name__, kind.__name__.lower())
    if kind_for_tables == "adam" and group.get("amsgrad"):
        raise ConfigError(
            "optimizer Adam with amsgrad=True cannot drive the tables: use amsgrad=False, or pass "
            "table_optimizer=TableOptimizer('adam') to keep it for the dense layers only"
        )
    first, second = group["betas"] if kind_for_tables == "adam" else (0.9, 0.999)
    return TableOptimizer(
        kind=kind_for_tables,
        eps=float(group.get("eps", 1e-8)),
        momentum=_momentum(group, kind_for_tables),
        betas=(float(first), float(second)),
    )


def _read_group(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    tables: TableOptimizer,
    given: TableOptimizer | None,
) -> _Group:
    decay = float(group.get("weight_decay", 0.0))
    if decay and tables.kind != "sgd":
        raise ConfigError(
            f"weight_decay {decay} with the table optimizer '{tables.kind}' is not supported; "
            "use sgd, or weight_decay=0"
        )
    if group.get("maximize"):
        raise ConfigError("optimizer with maximize=True is not supported: negate the loss")
    return _Group(
        defaults={k: v for k, v in group.items() if k in optimizer.defaults},
        momentum=given.momentum if given is not None else _momentum(group, tables.kind),
        members=frozenset(id(p) for p in group["params"]),
    )


def _momentum(group: Mapping[str, Any], kind: str) -> float:
    """A group's momentum for tables.

    Raises:
        ConfigError: A kind of momentum that waiting noise does not merge with.
    """
    momentum = float(group.get("momentum", 0.0)) if kind == "sgd" else 0.0
    if momentum and (group.get("nesterov") or group.get("dampening")):
        raise ConfigError(
            "optimizer SGD with nesterov or dampening cannot drive the tables: the waiting "
            "noise of a row merges for plain momentum only. Use nesterov=False and "
            "dampening=0, or pass table_optimizer=TableOptimizer('sgd') to keep them for the "
            "dense layers only"
        )
    return momentum


def rates_of(groups: Sequence[TableGroup]) -> tuple[float, float]:
    """The least learning rate above 0 of some groups of tables, and the greatest; 0 for none."""
    rates = sorted(g.lr for g in groups if g.lr > 0) or [0.0]
    return rates[0], rates[-1]
