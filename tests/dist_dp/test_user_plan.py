"""Users as units: the same events as as many records, and nothing that says records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from dist_dp.accounting import epsilon_of
from dist_dp.checkpoint import save_checkpoint
from dist_dp.engine import PrivacyEngine
from dist_dp.errors import BudgetError, CheckpointError, ConfigError, DataError
from dist_dp.ledger import Ledger
from dist_dp.plan import PrivacyPlan
from tests.dist_dp import unsharded
from tests.dist_dp.clicks import Clicks

PLAN: dict[str, Any] = {
    "unit": "user",
    "num_users": 60_000,
    "max_records_per_user": 8,
    "max_grad_norm": 1.0,
    "noise_multiplier": 1.3,
    "expected_batch_size": 150,
    "steps": 6000,
    "delta": 1e-5,
}


# The reference values of test_accounting (tensorflow/privacy, compute_dp_sgd_privacy_test.py), with
# users in the place of examples.
@pytest.mark.parametrize(
    ("n", "batch", "sigma", "epochs", "delta", "rdp", "pld"),
    [
        (60_000, 150, 1.3, 15, 1e-5, 0.7242234026109595, 0.64011),
        (100_000, 100, 1.0, 30, 1e-7, 1.4154988495444842, 1.09820),
    ],
)
def test_reference_values_with_users_as_units(
    n: int, batch: int, sigma: float, epochs: int, delta: float, rdp: float, pld: float
) -> None:
    common = {
        "max_grad_norm": 1.0,
        "noise_multiplier": sigma,
        "expected_batch_size": batch,
        "steps": math.ceil(epochs * n / batch),
        "delta": delta,
    }
    users = PrivacyPlan(unit="user", num_users=n, max_records_per_user=30, **common)
    records = PrivacyPlan(num_records=n, **common)
    assert users.events() == records.events()
    assert users.epsilon() == records.epsilon() == pytest.approx(pld, abs=5e-6)
    found = epsilon_of(users.events(), delta, accountant="rdp")
    assert found == pytest.approx(rdp, rel=1e-10)


def test_calibration_counts_users() -> None:
    values = {**PLAN, "noise_multiplier": None, "delta": None, "steps": 5}
    users = PrivacyPlan(**values).calibrate(0.5, 1e-6)
    for key in ("unit", "num_users", "max_records_per_user"):
        del values[key]
    records = PrivacyPlan(num_records=60_000, **values).calibrate(0.5, 1e-6)
    assert users.noise_multiplier == records.noise_multiplier
    assert users.sample_rate == 150 / 60_000


def test_the_statement_says_user() -> None:
    plan = PrivacyPlan(**PLAN)
    text = plan.statement()
    for said in (
        "The unit of privacy is one user of the training data, with all records",
        "adding or removing one such user",
        "draws every user independently",
        "150 of 60,000 users expected) with at most 8 of its records",
        "stands behind several user keys beyond what a guarantee for each user implies",
        "The number of users is treated as public",
    ):
        assert said in text
    assert "number of records" not in text and "every record" not in text
    gaps = " ".join(plan.not_covered())
    assert "several user keys" in gaps and "the number of users, treated as public" in gaps
    assert "the unit is one record" not in gaps
    none = PrivacyPlan(**{**PLAN, "mechanism": "none", "noise_multiplier": None})
    assert "60,000 users" in none.statement()


def test_the_statement_for_records_is_as_it_was() -> None:
    text = PrivacyPlan(
        num_records=1000, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=10,
        steps=5, delta=1e-5,
    ).statement()  # fmt: skip
    assert "draws every record independently with probability 0.01 (10 of 1,000 records" in text
    assert "of the training data, and" in text and "user" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_users": None}, "num_users is missing: the unit of privacy is one user"),
        ({"max_records_per_user": None}, "max_records_per_user is missing"),
        ({"max_records_per_user": 0}, "max_records_per_user"),
        ({"num_records": 10**6}, "num_records 1000000 is set, but the unit of privacy is one user"),
        ({"unit": "record"}, "num_records is missing"),
        ({"unit": "record", "num_records": 9}, "num_users 60000 is set, but the unit .* record"),
        ({"delta": 1 / 60_000}, r"not below 1/num_users = 1\.67e-05.*all records of one user"),
        ({"expected_batch_size": 60_001}, "larger than num_users 60000"),
        ({"unit": "person"}, "unit"),
    ],
)
def test_what_does_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrivacyPlan(**{**PLAN, **changes})


def test_delta_below_records_but_not_below_users_is_refused() -> None:
    with pytest.raises(ConfigError, match="1/num_users"):
        PrivacyPlan(**{**PLAN, "num_users": 100, "expected_batch_size": 10, "delta": 0.01})


class Records(torch.utils.data.Dataset[int]):
    """Numbers of records, for a DataLoader."""

    def __len__(self) -> int:
        return unsharded.RECORDS

    def __getitem__(self, index: int) -> int:
        return index


def data_loader() -> Any:
    data = unsharded.records()

    def collate(numbers: list[int]) -> Clicks:
        return data.select(numbers)

    return DataLoader(Records(), batch_size=5, collate_fn=collate)


KEYS = torch.arange(unsharded.RECORDS) * 5 % 12


def private(folder: Path, **options: Any) -> tuple[PrivacyEngine, Any, Any, Any]:
    whole = unsharded.model()
    engine_options = {
        k: options.pop(k) for k in ("dataset", "run_id", "resume_from") if k in options
    }
    engine = PrivacyEngine(
        ledger=folder / "ledger.sqlite",
        sharding="row_wise",
        secret=bytes(32),
        **{"dataset": "clicks", **engine_options},
    )
    given = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "steps": 3,
        "budget": (500.0, 1e-2),
        "users": KEYS,
        "max_records_per_user": 2,
        **options,
    }
    return engine, *engine.make_private(
        module=whole,
        optimizer=torch.optim.SGD(whole.parameters(), lr=0.1),
        data_loader=data_loader(),
        **given,
    )


def train(model: Any, optimizer: Any, loader: Any, steps: int = 3) -> list[int]:
    sizes = []
    for batch in loader:
        unsharded.LOSSES(model(*batch.inputs), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(optimizer.last_stats.norms.numel())
        if loader.steps_drawn == steps:
            loader.stop()
    return sizes


def test_the_api_and_its_release(tmp_path: Path) -> None:
    engine, model, optimizer, loader = private(tmp_path)
    plan = engine.parts.plan
    assert (plan.unit, plan.num_users, plan.num_records) == ("user", 12, None)
    assert plan.sample_rate == 5 / 12 and plan.delta == 0.1 / 12
    assert engine.records_per_unit == 2.0
    norms = train(model, optimizer, loader)
    assert len(norms) == 3 and max(norms) <= 12  # of users
    card = (engine.release(tmp_path / "release") / "MODEL_CARD.md").read_text()
    for line in (
        "| unit of privacy | one user |",
        "| neighbouring relation | data sets that differ by adding or removing one user |",
        "| users | 12 |",
        "| records of a user in a step | at most 2 |",
        "| clip norm C | 1 for each user, over all tables and layers together |",
        "| sampling | poisson, of users, rate 0.416667 |",
        "- a person who stands behind several user keys",
    ):
        assert line in card
    released = json.loads((tmp_path / "release" / "release.json").read_text())["privacy"]["plan"]
    assert released["num_records"] is None and released["num_users"] == 12
    ledger = Ledger(tmp_path / "ledger.sqlite")
    (budget,) = ledger.datasets()
    assert (budget.unit, budget.num_records) == ("user", 12)
    assert ledger.spent("clicks").epsilon == pytest.approx(epsilon_of(plan.events(), 1e-2))


def test_a_data_set_has_one_unit(tmp_path: Path) -> None:
    private(tmp_path)
    with pytest.raises(BudgetError, match="registered with unit of privacy 'user', not 'record'"):
        private(tmp_path, users=None, max_records_per_user=None)
    private(tmp_path, dataset="other", users=None, max_records_per_user=None)
    with pytest.raises(BudgetError, match="registered with unit of privacy 'record', not 'user'"):
        private(tmp_path, dataset="other")


def test_refusals_of_the_api(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="users is given without max_records_per_user"):
        private(tmp_path, max_records_per_user=None)
    with pytest.raises(ConfigError, match="does not say whose its records are"):
        private(tmp_path, users=None)
    with pytest.raises(ConfigError, match="35 numbers given for 36 records"):
        private(tmp_path, users=KEYS[1:])
    with pytest.raises(ConfigError, match="micro_batch_size 1 is below max_records_per_user 2"):
        private(tmp_path, micro_batch_size=1)
    with pytest.raises(ConfigError, match="made for 11 users, the data has 12"):
        values = {**PLAN, "num_users": 11, "expected_batch_size": 5, "delta": 1e-3}
        whole = unsharded.model()
        PrivacyEngine(dataset="x", ledger=tmp_path / "l").make_private_from_plan(
            PrivacyPlan(**values),
            module=whole,
            optimizer=torch.optim.SGD(whole.parameters(), lr=0.1),
            data_loader=data_loader(),
            users=KEYS,
        )


def test_a_checkpoint_goes_on_with_its_unit_only(tmp_path: Path) -> None:
    engine, *run = private(tmp_path, run_id="one")
    train(*run, steps=2)
    saved = save_checkpoint(engine, tmp_path / "checkpoint")
    for options in (
        {"users": None, "max_records_per_user": None},
        {"max_records_per_user": 3},
        {"users": KEYS // 2},
    ):
        with pytest.raises((CheckpointError, DataError, BudgetError), match="another privacy plan"):
            private(tmp_path, run_id="one", resume_from=saved, **options)
    engine, *run = private(tmp_path, run_id="one", resume_from=saved)
    assert len(train(*run)) == 1
