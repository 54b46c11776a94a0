"""Groups of a user's examples: what they refuse, and norms where records nearly cancel."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from dist_dp.clipping import dense_rules
from dist_dp.clipping.dense_rules import DenseRule, LinearRule, Record, VmapRule, register_rule
from dist_dp.clipping.table_norms import TableUse
from dist_dp.clipping.user_groups import UserGroups
from dist_dp.clipping.user_tables import squared_norms_of_users
from dist_dp.distributed import ensure_process_group
from dist_dp.errors import ModelError
from tests.dist_dp.gradients import build
from tests.dist_dp.models import CASES


def test_groups_pad_to_powers_of_two_and_leave_padding_alone() -> None:
    sizes = torch.tensor([1, 5, 2, 3, 1, 4, 8])
    groups = UserGroups(sizes, 30)
    assert (groups.num_users, groups.num_units, groups.one_each) == (7, 13, False)
    assert [b.examples.shape[1] for b in groups.buckets] == [1, 2, 4, 8]
    seen = torch.zeros(30, dtype=torch.int64)
    for bucket in groups.buckets:
        assert 2 * int(bucket.is_there.sum()) > bucket.examples.numel()
        for unit, examples, there in zip(
            bucket.units, bucket.examples, bucket.is_there, strict=True
        ):
            assert (groups.unit_of[examples] == unit).all()  # also those that stand for nothing
            seen[examples[there]] += 1
    assert (seen == 1).all()
    assert groups.unit_of[24:].tolist() == [7, 8, 9, 10, 11, 12]
    assert groups.spread(torch.arange(13.0)).tolist() == groups.unit_of.tolist()
    assert groups.to(torch.device("cpu")) is groups


def test_groups_that_do_not_fit() -> None:
    for sizes, batch in (([3, 2], 4), ([1, 0], 4)):
        with pytest.raises(ValueError, match="all must fit"):
            UserGroups(torch.tensor(sizes), batch)
    empty = UserGroups(torch.zeros(0, dtype=torch.int64), 2)
    assert (empty.num_users, empty.num_units) == (0, 2)


def test_a_number_that_is_not_finite_stays_with_its_user() -> None:
    groups = UserGroups(torch.tensor([3, 3]), 7)
    x, delta = torch.randn(7, 4), torch.randn(7, 2)
    x[1] = torch.inf
    delta[6] = torch.nan
    norms = torch.zeros(groups.num_units)
    for bucket in groups.buckets:
        record = bucket.gather(((x,), delta))
        norms[bucket.units] = LinearRule().squared_norms_of_groups(nn.Linear(4, 2), [record])
    assert torch.isfinite(norms).tolist() == [False, True, False]


@pytest.mark.parametrize("width", [3, 300])
def test_records_that_nearly_cancel(width: int) -> None:
    """Two records of norm 1e4, whose sum has norm about 1: what float32 squares would lose."""
    g = torch.Generator().manual_seed(3)
    a = torch.randn(1, 2, width, generator=g)
    a[:, 1] = a[:, 0] * (1 + 1e-4)
    d = 1e4 * torch.randn(1, 2, width, generator=g) / width
    d[:, 1] = -d[:, 0] * (1 - 1e-4 * torch.rand(width, generator=g))
    exact = (d.double().transpose(1, 2) @ a.double()).square().sum()
    layer = nn.Linear(width, width, bias=False)
    found = LinearRule().squared_norms_of_groups(layer, [((a,), d)])
    assert float(found / exact) == pytest.approx(1.0, abs=2e-3)

    uses = [
        ("t", TableUse(torch.tensor([3, 3]), torch.tensor([1, 1]), None, d[0], pooled=True)),
    ]
    exact = d[0].double().sum(0).square().sum()
    found = squared_norms_of_users(uses, {"t": 5}, UserGroups(torch.tensor([2]), 2))
    assert float(found / exact) == pytest.approx(1.0, abs=1e-3)


class Doubled(nn.Linear):
    """A layer of somebody's own."""


class OwnRule(DenseRule):
    """Knows single examples only."""

    def squared_norms(self, layer: nn.Module, records: Sequence[Record]) -> Tensor:
        return LinearRule().squared_norms(layer, records)

    def clipped_sums(
        self, layer: nn.Module, records: Sequence[Record], coefficients: Tensor
    ) -> dict[str, Tensor]:
        return LinearRule().clipped_sums(layer, records, coefficients)


@pytest.fixture
def own_rule() -> object:
    register_rule(Doubled)(OwnRule)
    yield
    del dense_rules._RULES[Doubled]


def with_own_layer() -> nn.Module:
    model, _ = CASES["oddities"]()
    model.twice = Doubled(8, 8)
    return model


def test_a_rule_without_groups_is_refused_for_users_alone(own_rule: object) -> None:
    ensure_process_group()
    build(with_own_layer())
    build(with_own_layer(), mechanism="none", max_records_per_user=3)
    with pytest.raises(
        ModelError, match=r"'twice' \(Doubled\): .* OwnRule has no squared_norms_of_groups.*Vmap"
    ):
        build(with_own_layer(), max_records_per_user=3)
    with pytest.raises(NotImplementedError, match="OwnRule"):
        OwnRule().squared_norms_of_groups(nn.Linear(2, 2), [])
    register_rule(Doubled)(VmapRule)
    build(with_own_layer(), max_records_per_user=3)
