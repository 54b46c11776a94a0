"""A run goes on with other workers and another sharding, and ends with the same model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from tests.dist_dp.checkpoint_runs import (
    Homes,
    assert_is_the_run,
    end_of,
    go_on,
    in_three,
    in_two,
    stages,
)
from tests.dist_dp.worlds import run_world

Ends = dict[tuple[str, bool], list[dict[Any, Tensor]]]


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ends, list[Any]]]:
    """Ends of runs by (chain, gradients are zero), a piece a rank; tables in a world of three."""
    root = tmp_path_factory.mktemp("chains")
    homes: Homes = {
        (chain, zero): root / f"{chain}-{zero}"
        for chain in ("worlds", "kinds", "dense")
        for zero in (False, True)
    }
    for zero in (False, True):
        assert stages(homes["worlds", zero], [(2, "table_wise")], zero=zero) is None
    found: Ends = {}
    for key in homes:
        found[key] = []
    for rank in run_world(in_two, 2, homes):
        for key, end in rank.items():
            if end is not None:
                found[key].append(end)
    three = run_world(in_three, 3, homes)
    for zero in (False, True):
        end = stages(homes["worlds", zero], [(8, "column_wise")], zero=zero)
        assert end is not None
        found["worlds", zero] = [end]
    yield found, three


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], dict[Any, Tensor]]:
    """Ends of runs that never stopped, of one worker, by (mechanism, gradients are zero)."""
    home = tmp_path_factory.mktemp("alone")
    return {
        (mechanism, zero): end_of(
            go_on(home / f"{mechanism}-{zero}", mechanism=mechanism, zero=zero, dropout=0.0)
        )
        for mechanism in ("lazydp", "dpsgd")
        for zero in (False, True)
    }


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(
    ("chain", "pieces"), [("worlds", 1), ("kinds", 2), ("dense", 2)], ids=lambda x: str(x)
)
def test_the_model_is_the_same(
    chains: tuple[Ends, list[Any]], alone: Any, chain: str, pieces: int, zero: bool
) -> None:
    ends = chains[0][chain, zero]
    assert len(ends) == pieces
    mechanism = "dpsgd" if chain == "dense" else "lazydp"
    wanted = alone[mechanism, zero]
    # Noise alone is a function of its coordinates; gradients are added in another order.
    for end in ends:
        assert_is_the_run(end, wanted, exact=zero)
    tables = {key for key in wanted if not isinstance(key, str)}
    for name, _, _ in tables:
        held = {key[1:]: end[key].numel() for end in ends for key in end if key[0] == name}
        assert sum(held.values()) == wanted[name, 0, 0].numel()


def test_a_rank_may_have_no_tables(chains: tuple[Ends, list[Any]]) -> None:
    tables = [sorted(map(len, stage)) for stage in zip(*chains[1], strict=True)]
    assert tables == [[3, 3, 3], [1, 2, 2]] * 2
