"""The optimizer's groups and the mechanism of a run that goes on: as they were, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_dp.checkpoint import save_checkpoint
from dist_dp.errors import CheckpointError, ReleaseError
from dist_dp.mechanisms.comparison import EANA, ComparisonMechanism, TorchDPSGD
from tests.dist_dp.checkpoint_runs import STEPS, assert_is_the_run, end_of, go_on, train_on

Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def groups(*members: str, tensors: bool = False) -> Optimizer:
    """Adam with a group for each word, of the parameters whose names hold it, and one of the rest.

    Their rates are 0.4, 0.2, 0.1 and so on.
    """

    def made(module: nn.Module) -> torch.optim.Optimizer:
        left = dict(module.named_parameters())
        found: list[dict[str, Any]] = []
        for word in (*members, ""):
            named = [n for n in left if word in n]
            rate = 0.4 / 2 ** len(found)
            found.append(
                {
                    "params": [left.pop(n) for n in named],
                    "lr": torch.tensor(rate) if tensors else rate,
                }
            )
        return torch.optim.Adam(found, lr=1.0, foreach=False)

    return made


def other_settings(made: Any) -> None:
    """Halves every rate and moves Adam's betas, as a scheduler would: in place where it can."""
    for group in made.parts.optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].mul_(0.5)
        else:
            group["lr"] *= 0.5
        if "betas" in group:
            group["betas"] = (0.5, 0.6)


@pytest.mark.parametrize("tensors", [False, True])
def test_settings_of_the_optimizer_come_back(tmp_path: Path, tensors: bool) -> None:
    """Nothing sets a rate after the checkpoint, so only the restored ones give the same end."""
    options: dict[str, Any] = {
        "optimizer": groups(".a.", "top", tensors=tensors),
        "table_lr": None,
        "falling": False,
    }
    whole = go_on(tmp_path / "whole", 3, **options)
    other_settings(whole)
    train_on(whole, STEPS, falling=False)

    stopped = go_on(tmp_path, 3, **options)
    other_settings(stopped)
    save_checkpoint(stopped, tmp_path / "checkpoint")
    resumed = go_on(tmp_path, 3, **options)
    for before, after in zip(
        stopped.parts.optimizer.param_groups, resumed.parts.optimizer.param_groups, strict=True
    ):
        assert before["lr"] == after["lr"] and type(before["lr"]) is type(after["lr"])
    train_on(resumed, STEPS, falling=False)
    assert_is_the_run(end_of(resumed), end_of(whole), exact=True)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (groups(".b.", "top"), r"'pooled\.a' was in group 0 .* is in group 1 now"),
        (groups(".a.", "bottom"), r"'bottom.* was in group 3 .* is in group 2 now"),
        (groups(".a."), r"was in group 3 .* is in group 2 now"),
    ],
    ids=["tables", "dense", "number"],
)
def test_other_groups_are_refused(tmp_path: Path, now: Optimizer, words: str) -> None:
    first = groups(".a.", "top")
    go_on(tmp_path, 2, save=True, optimizer=first, table_lr=None)
    with pytest.raises(CheckpointError, match=words):
        go_on(tmp_path, 3, optimizer=now, table_lr=None)
    go_on(tmp_path, 3, optimizer=first, table_lr=None)


def test_a_setting_of_many_numbers_is_not_saved(tmp_path: Path) -> None:
    made = go_on(tmp_path, 1)
    made.parts.optimizer.param_groups[-1]["by_layer"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"'by_layer' is a tensor of shape \(3,\)"):
        save_checkpoint(made, tmp_path / "checkpoint")


@pytest.mark.parametrize("kind", [EANA, TorchDPSGD])
def test_a_mechanism_put_in_by_hand_is_neither_saved_nor_released(
    tmp_path: Path, kind: type[ComparisonMechanism]
) -> None:
    """Saved under the plan's name, it would be resumed and released as the plan's."""
    made = go_on(tmp_path, 0)
    proper = made.parts.mechanism
    made.parts.optimizer.mechanism = kind(proper.schedules)
    for shard in made.parts.shards:
        made.parts.mechanism.prepare(shard)
    train_on(made, 2)
    for leave in (
        lambda: save_checkpoint(made, tmp_path / "checkpoint"),
        lambda: made.release(tmp_path / "model"),
    ):
        with pytest.raises(ReleaseError, match=rf"'{kind.name}'.* but the plan says 'lazydp'"):
            leave()
    assert not [*tmp_path.iterdir()]
