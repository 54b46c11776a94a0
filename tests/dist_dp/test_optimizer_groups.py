"""Several parameter groups: each table and layer follows its own learning rate, decay, momentum.

With noise, runs equal the unsharded reference to 1e-5 (bit for bit without gradients); without
noise but with momentum they equal ``torch.optim.SGD`` with the same groups.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_dp.errors import ConfigError
from dist_dp.optimizer_settings import optimizer_settings, rates_of
from dist_dp.sharding import TableOptimizer
from tests.dist_dp import group_runs, unsharded
from tests.dist_dp.gradients import build
from tests.dist_dp.group_runs import GROUPS, KINDS
from tests.dist_dp.sharding_runs import STEPS, together
from tests.dist_dp.worlds import run_world

TOLERANCE = 1e-5
FAULTS = ["one rate for all", "one schedule for all"]


@cache
def wanted(what: str) -> dict[str, Tensor]:
    if what == "momentum":
        return unsharded.plain(STEPS, group_runs.with_momentum).state
    return unsharded.reference(STEPS, zero=what == "zero", rates=group_runs.rates()).state


@pytest.fixture(scope="module")
def runs() -> dict[int, dict[Any, list[dict[str, Any]]]]:
    found = {}
    for size in (1, 2):
        ranks = run_world(group_runs.all_runs, size, FAULTS if size == 1 else [])
        found[size] = {key: [r[key] for r in ranks] for key in ranks[0]}
    return found


def far(ranks: list[dict[str, Any]], what: str) -> dict[str, float]:
    state = together(ranks)
    return {n: float((state[n] - w).abs().max() / w.abs().max()) for n, w in wanted(what).items()}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["lazydp", "momentum"])
def test_each_follows_its_group(runs: Any, what: str, kind: str, size: int) -> None:
    assert max(far(runs[size][what, kind], what).values()) <= TOLERANCE


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_follows_the_group(runs: Any, kind: str, size: int) -> None:
    state = together(runs[size]["zero", kind])
    for table in unsharded.TABLES:
        name = unsharded.parameter_of(table)
        assert torch.equal(state[name], wanted("zero")[name]), name


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(runs: Any, fault: str) -> None:
    assert max(far(runs[1][fault, "mixed"], "lazydp").values()) > 100 * TOLERANCE


def test_param_groups_of_the_private_optimizer() -> None:
    run_world(int, 1)
    whole = unsharded.model()
    private = build(whole, optimizer=group_runs.with_momentum(whole))
    groups = private.optimizer.param_groups
    assert [g.get("name") for g in groups] == ["tables", "tables.1", "tables.2", None, None, None]
    assert [set(g["tables"]) for g in groups[:3]] == [
        {t for t in names if not t.endswith(".")} for names, *_ in GROUPS if names != ("bottom.",)
    ]
    assert [g["lr"] for g in groups] == [0.5, 0.2, 0.7, 0.5, 0.3, 0.7]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.2, 0.1, 0.05, 0.2]
    assert [g["momentum"] for g in groups[3:]] == [0.0, 0.5, 0.6]
    assert [len(g["params"]) for g in groups[3:]] == [4, 2, 2]
    by_group = torch.optim.lr_scheduler.LambdaLR(
        private.optimizer, [lambda _, f=f: f for f in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    )
    assert [g["lr"] for g in groups] == pytest.approx([0.5, 0.4, 2.1, 2.0, 1.5, 4.2])
    del by_group


def test_what_cannot_be_split_is_named() -> None:
    whole = unsharded.model()
    dense = [p for n, p in whole.named_parameters() if "embedding" not in n]
    tables = [p for n, p in whole.named_parameters() if "embedding" in n]
    settings = optimizer_settings(
        torch.optim.SGD([{"params": dense}, {"params": tables[1:]}], lr=0.1)
    )
    with pytest.raises(ConfigError, match=r"'pooled\.a' is in none of the optimizer's 2 parameter"):
        settings.table_groups(whole)
    settings = optimizer_settings(
        torch.optim.SGD([{"params": dense[1:]}, {"params": tables}], lr=0.1)
    )
    with pytest.raises(ConfigError, match=r"'bottom\.0\.weight' is in none"):
        settings.table_groups(whole)
    apart: list[dict[str, Any]] = [{"params": tables[1:]}, {"params": [*dense, tables[0]]}]
    with pytest.raises(ConfigError, match=r"'adagrad' has one learning rate"):
        optimizer_settings(torch.optim.Adagrad(apart, lr=0.1)).table_groups(whole)
    with pytest.raises(ConfigError, match=r"table_lr is given.*2 parameter groups"):
        optimizer_settings(torch.optim.SGD(apart, lr=0.1), table_lr=1.0).table_groups(whole)
    with pytest.raises(ConfigError, match=r"nesterov"):
        apart[1] |= {"momentum": 0.9, "nesterov": True}
        optimizer_settings(torch.optim.SGD(apart, lr=0.1))
    split = [{"params": tables}, {"params": [*dense, tables[0]]}]
    with pytest.raises(ValueError, match="more than one parameter group"):
        torch.optim.SGD(split, lr=0.1)


def test_the_tables_of_one_group_may_have_another_optimizer() -> None:
    whole = unsharded.model()
    tables = [p for n, p in whole.named_parameters() if "embedding" in n]
    dense = [p for n, p in whole.named_parameters() if "embedding" not in n]
    adam = torch.optim.Adam(
        [{"params": dense, "lr": 0.01}, {"params": tables, "lr": 3.0, "weight_decay": 0.1}]
    )
    settings = optimizer_settings(adam, TableOptimizer("sgd"))
    (group,) = settings.table_groups(whole)
    assert (group.lr, group.weight_decay, group.momentum) == (3.0, 0.1, 0.0)
    rebuilt = settings.rebuild({n: p for n, p in whole.named_parameters() if "embedding" not in n})
    assert isinstance(rebuilt, torch.optim.Adam)
    assert [g["lr"] for g in rebuilt.param_groups] == [0.01]
    assert settings.rebuild({}) is None
    assert rates_of([group]) == (3.0, 3.0)


def test_the_grid_looks_at_every_group() -> None:
    """The noise of the slowest group must be well above the grid's spacing."""
    run_world(int, 1)
    whole = unsharded.model()
    private = build(whole, sigma=1.0, optimizer=group_runs.several_groups(whole), grid=2.0**-22)
    data = unsharded.records().select(range(8))
    private.optimizer.param_groups[1]["lr"] = 1e-6
    private.state.begin(1, 8, 8)
    loss = nn.functional.binary_cross_entropy_with_logits(whole(*data.inputs), data.labels)
    loss.backward()
    with pytest.raises(ConfigError, match="at step 1"):
        private.optimizer.step()
    assert [s.step for s in private.mechanism.schedules] == [0, 0, 0]


def test_a_step_is_recorded_in_all_groups_or_none() -> None:
    run_world(int, 1)
    whole = unsharded.model()
    private = build(whole, sigma=1.0, optimizer=group_runs.several_groups(whole))
    private.optimizer.param_groups[2]["lr"] = 5.0  # times the weight decay of 0.2 it is 1
    with pytest.raises(ConfigError, match="must be below 1"):
        private.optimizer.record_step()
    assert [s.step for s in private.mechanism.schedules] == [0, 0, 0]
