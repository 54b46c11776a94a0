"""The optimizer's groups in a checkpoint: who is in each of them, and its settings.

A table's noise follows its group's schedule, so a run may go on only with the groups it had. Their
settings (learning rates) come back, as with torch's own optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dist_dp.errors import CheckpointError

if TYPE_CHECKING:
    from dist_dp.private_model import PrivateModel

_NO_SETTINGS = frozenset({"params", "tables", "name"})


def groups_of(parts: PrivateModel) -> list[dict[str, Any]]:
    """The groups in order, each as ``members`` and ``settings``: simple types.

    Raises:
        CheckpointError: A setting is a tensor of more than one number.
    """
    names = {id(p): name for name, p in parts.recorder.parameters.items()}
    return [
        {
            "members": sorted([*group.get("tables", ()), *(names[id(p)] for p in group["params"])]),
            "settings": {
                key: number
                for key, value in group.items()
                if key not in _NO_SETTINGS and (number := _numbers(key, value)) is not None
            },
        }
        for group in parts.optimizer.param_groups
    ]


def check_same_groups(parts: PrivateModel, saved: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a run whose optimizer groups its tables or dense parameters otherwise.

    Guarantee:
        What a row owes is read from the schedule of its table's group. Were the table in another
        group than the one that was recorded, it would get noise of another size than its gradients
        had.

    Args:
        parts: The run that goes on.
        saved: What :func:`groups_of` gave.

    Raises:
        CheckpointError: A member is in another group.
    """
    before, now = (_group_by_member(groups) for groups in (saved, groups_of(parts)))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"'{name}' was in {_said(before.get(name))} of the optimizer when the checkpoint "
                f"was saved and is in {_said(now.get(name))} now: resume with the parameter groups "
                "that the run began with, in the same order"
            )


def restore_settings(parts: PrivateModel, saved: Sequence[Mapping[str, Any]]) -> None:
    """Puts the settings back, those that are tensors into the tensors.

    Args:
        parts: The run that goes on, with the same groups.
        saved: What :func:`groups_of` gave.
    """
    for group, described in zip(parts.optimizer.param_groups, saved, strict=True):
        for key, value in described["settings"].items():
            group[key] = _restored(group.get(key), value)


def _numbers(key: str, value: Any) -> Any:
    """A setting as numbers, or None if it holds none (a flag that is unset, a function)."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise CheckpointError(
                f"the optimizer's setting '{key}' is a tensor of shape {tuple(value.shape)}, which "
                "a checkpoint does not hold: give one number a group"
            )
        return value.item()
    if isinstance(value, tuple):
        # Adam's betas, which some schedulers move too.
        return [_numbers(key, each) for each in value]
    return value if isinstance(value, bool | int | float) else None


def _restored(live: Any, saved: Any) -> Any:
    """A saved setting, in the form that the live one has."""
    if isinstance(live, Tensor):
        # The optimizer, or a compiled step, may hold the tensor itself.
        return live.fill_(saved)
    if isinstance(live, tuple):
        return tuple(_restored(*pair) for pair in zip(live, saved, strict=True))
    return saved


def _group_by_member(groups: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: number for number, group in enumerate(groups) for name in group["members"]}


def _said(number: int | None) -> str:
    return "no group" if number is None else f"group {number}"
