"""Batches whose features come in another order, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrec import KeyedJaggedTensor

from dist_dp.distributed import ensure_process_group
from dist_dp.errors import DataError
from dist_dp.id_checks import FeatureOrder
from dist_dp.id_distribution import IdDistribution
from tests.dist_dp import gradients
from tests.dist_dp.models import BATCH
from tests.dist_dp.test_gradients import TOLERANCE

CASES = ["mixed-sum-mean-1", "mixed-weighted-3", "oddities"]
ALL = list(range(BATCH))


@pytest.fixture(autouse=True)
def one_process() -> None:
    ensure_process_group()


def errors(case: str, kind: str) -> dict[str, float]:
    wanted, clip = gradients.brute_force(case, ALL)
    found = gradients.private_step(case, kind, clip, [ALL], reordered=True)
    return gradients.errors([found], wanted)


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "data_parallel"])
@pytest.mark.parametrize("case", CASES)
def test_the_order_may_change(case: str, kind: str) -> None:
    assert {name: e for name, e in errors(case, kind).items() if not e <= TOLERANCE} == {}


def test_without_the_order_kept_rows_of_other_tables_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault that it guards against: TorchRec goes by place, the norms go by name."""
    monkeypatch.setattr(FeatureOrder, "apply", lambda _, features: features)
    assert max(errors("oddities", "table_wise").values()) > 100 * TOLERANCE


def test_ids_sent_ahead_serve_a_batch_in_another_order() -> None:
    model, data = gradients.CASES["oddities"]()
    private = gradients.build(model)
    batch, cut = data.select(ALL), private.cuts[0]
    cut.eval()
    first = cut(batch.sparse[0])
    cut.look_ahead(gradients.reverse(batch.sparse[0]))
    assert isinstance(cut._ahead, IdDistribution)
    again = cut(gradients.reverse(batch.sparse[0]))
    assert cut._ahead is None
    assert torch.equal(values(again), values(first))


def values(output: Any) -> torch.Tensor:
    if hasattr(output, "values") and not isinstance(output, dict):
        return torch.as_tensor(output.values())
    return torch.cat([jagged.values() for jagged in output.values()])


def bags(*keys: str) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(keys), values=torch.arange(len(keys)), lengths=torch.ones(len(keys)).int()
    )


def test_a_missing_feature_is_named() -> None:
    with pytest.raises(DataError, match=r"'bags': feature 'b' is missing.*needs it"):
        FeatureOrder(["a", "b"], "bags").apply(bags("a", "c"))
    order = FeatureOrder(["a"], "bags")
    order.apply(bags("a", "other"))
    with pytest.raises(DataError, match=r"'other' is missing.*the first batch had it"):
        order.apply(bags("a"))


def test_a_feature_that_comes_twice_is_named() -> None:
    with pytest.raises(DataError, match="'b' comes twice"):
        FeatureOrder(["a", "b"], "bags").apply(bags("a", "b", "b"))


def test_the_first_order_is_kept() -> None:
    order = FeatureOrder(["a", "b"], "bags")
    first = bags("b", "x", "a")
    assert order.apply(first) is first
    again = order.apply(bags("a", "b", "x", "new"))
    assert again.keys() == ["b", "x", "a"] and again.values().tolist() == [1, 2, 0]
