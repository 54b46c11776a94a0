"""FEST's rows when a run begins: from a public file, or privately and charged, and only once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dist_dp.checkpoint import save_checkpoint
from dist_dp.engine import PrivacyEngine
from dist_dp.errors import BudgetError, ConfigError, DataError, DistDpError
from dist_dp.events import TopKEvent
from dist_dp.mechanisms.sparse import SparseNoise
from dist_dp.sparse_settings import SparseSettings
from tests.dist_dp.placement import features_of, model, records
from tests.dist_dp.test_engine import DELTA, LOSSES, engine, ledger, train

ROWS = {"a": 5, "b": 4, "s": 3}


def private(**changes: Any) -> SparseSettings:
    return SparseSettings(**{"rows": ROWS, "choice_epsilon": 1.0} | changes)


def begin(made: PrivacyEngine, **options: Any) -> dict[str, Any]:
    """Trains a few steps; the chosen rows by table."""
    train(made, features_of=features_of, most=3, **options)
    mechanism = made.parts.mechanism
    assert isinstance(mechanism, SparseNoise)
    return {table: rows.tolist() for table, rows in mechanism.kept.items()}


@pytest.mark.parametrize("noise", ["gaussian", "gumbel"])
def test_a_private_choice_is_charged_and_part_of_the_target(tmp_path: Path, noise: Any) -> None:
    made = engine(tmp_path, mechanism="fest", sparse=private(choice_noise=noise), run_id="run")
    kept = begin(made)
    assert {t: len(rows) for t, rows in kept.items()} == {
        "pooled.a": 5, "pooled.b": 4, "sequence.s": 3
    }  # fmt: skip
    plan = made.parts.plan
    (event,) = plan.step_costs().setup
    assert isinstance(event, TopKEvent) == (noise == "gumbel")
    assert 3.9 < plan.epsilon() <= 4.0
    charged = ledger(tmp_path).run_charges("run")
    assert charged[event] == 1
    assert made.steps_charged() == sum(n for e, n in charged.items() if e != event)
    assert "chosen once before by noisy counts" in plan.statement()


def test_the_choice_costs_no_more_than_it_may() -> None:
    from dist_dp.accounting import epsilon_of
    from dist_dp.plan import PrivacyPlan

    plan = PrivacyPlan(
        mechanism="fest",
        max_grad_norm=1.0,
        num_records=1000,
        expected_batch_size=10,
        steps=10,
        delta=1e-5,
        sparse=private(),
    )
    with pytest.raises(ConfigError, match="call with_choice"):
        plan.calibrate(2.0, 1e-5)
    resolved = plan.with_choice({"a": 13, "b": 9, "s": 6}).calibrate(2.0, 1e-5)
    assert 0.999 < epsilon_of(dict.fromkeys(resolved.step_costs().setup, 1), 1e-5) <= 1.0
    assert 1.99 < resolved.epsilon() <= 2.0


def test_a_run_that_goes_on_keeps_its_rows_and_pays_no_more(tmp_path: Path) -> None:
    made = engine(tmp_path, mechanism="fest", sparse=private(), run_id="run")
    kept = begin(made)
    save_checkpoint(made, tmp_path / "checkpoint")
    before = ledger(tmp_path).run_charges("run")
    (event,) = made.parts.plan.step_costs().setup
    again = engine(
        tmp_path,
        mechanism="fest",
        sparse=private(),
        run_id="run",
        resume_from=tmp_path / "checkpoint",
    )
    assert begin(again) == kept
    assert ledger(tmp_path).run_charges("run")[event] == before[event] == 1


def test_a_run_begun_anew_chooses_and_pays_again(tmp_path: Path) -> None:
    budget: dict[str, Any] = {"budget": (20.0, DELTA)}
    for name in ("one", "two"):
        begin(engine(tmp_path, mechanism="fest", sparse=private(), run_id=name), **budget)
    (event,) = {e for e, n in ledger(tmp_path).run_charges("one").items() if n == 1}
    assert ledger(tmp_path).spent("clicks").steps_by_event[event] == 2


def test_a_choice_that_no_budget_is_left_for_is_not_made(tmp_path: Path) -> None:
    begin(engine(tmp_path, mechanism="fest", sparse=private(), run_id="one"), target_epsilon=3.0)
    with pytest.raises(BudgetError, match="not even what the run does before its first step"):
        begin(engine(tmp_path, mechanism="fest", sparse=private(choice_epsilon=3.9), run_id="two"))


def test_a_choice_that_takes_the_whole_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leaves nothing for the steps"):
        begin(engine(tmp_path, mechanism="fest", sparse=private(choice_epsilon=4.5)))


def test_public_counts_cost_nothing(tmp_path: Path) -> None:
    lines = [("a", 2, 9), ("a", 7, 5), ("a", 12, 1), ("pooled.b", 8, 3), ("s", 0, 1), ("s", 5, 2)]
    table, row, count = zip(*lines, strict=True)
    pq.write_table(
        pa.table({"table": table, "row": row, "count": count}), tmp_path / "counts.parquet"
    )
    public = SparseSettings(
        rows={"a": 2, "b": 1, "s": 2}, frequencies=str(tmp_path / "counts.parquet")
    )
    made = engine(tmp_path, mechanism="fest", sparse=public, run_id="run")
    assert begin(made) == {"pooled.a": [2, 7], "pooled.b": [8], "sequence.s": [0, 5]}
    assert made.parts.plan.step_costs().setup == ()
    assert "by public frequencies" in made.parts.plan.statement()
    assert any("the file of row counts" in phrase for phrase in made.parts.plan.not_covered())


def test_counts_that_cannot_be_read_open_no_account(tmp_path: Path) -> None:
    """So the run can be begun again under its name."""
    public = SparseSettings(rows={"a": 2}, frequencies=str(tmp_path / "counts.parquet"))
    with pytest.raises(DataError, match="counts"):
        begin(engine(tmp_path, mechanism="fest", sparse=public, run_id="run"))
    assert not ledger(tmp_path).knows_run("run")


def test_adafest_plus_selects_among_the_chosen(tmp_path: Path) -> None:
    both = private(threshold=0.5, selection_share=0.2)
    made = engine(tmp_path, mechanism="adafest+", sparse=both, run_id="run")
    before = {n: p.detach().clone() for n, p in model(meta=False).named_parameters()}
    kept = begin(made, module=model(meta=False))
    for shard in made.parts.shards:
        others = torch.ones(shard.num_rows, dtype=torch.bool)
        others[kept[shard.table]] = False
        (name,) = (n for n in before if n.split(".")[-2] == shard.table.split(".")[-1])
        assert torch.equal(shard.weight[others], before[name][others])
        assert not torch.equal(shard.weight, before[name])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"a": 14}, "14 rows of table 'pooled.a' are to be kept, but it has 13"),
        (14, "sparse.rows is 14, but the largest table has 13 rows"),
        ({"q": 2}, "'q' is no table of the model"),
        (13, "keeps every row of every table"),
    ],
)
def test_rows_that_tables_do_not_have_are_refused(tmp_path: Path, rows: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        begin(engine(tmp_path, mechanism="fest", sparse=private(rows=rows)))


def test_without_an_engine_the_rows_must_be_given() -> None:
    from tests.dist_dp.gradients import build
    from tests.dist_dp.worlds import run_world

    run_world(lambda: None, 1)
    whole = model(meta=False)
    made = build(whole, mechanism="fest", sparse=SparseSettings(rows=3, frequencies="x"))
    batch = records().select([1, 2])
    made.state.begin(1, 2, 2)
    LOSSES(whole(*batch.inputs), batch.labels).backward()
    with pytest.raises(DistDpError, match="no rows to train yet"):
        made.optimizer.step()
