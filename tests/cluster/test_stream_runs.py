"""A stream of three days through Ray: killed between two of them, gone on with, and looked at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_dp.cluster.config import RunConfig, parse_config
from dist_dp.cluster.kept_rows import read_kept_rows
from dist_dp.cluster.serving import evaluate_release
from dist_dp.cluster.stream import Stream
from dist_dp.cluster.trainer import Trainer
from dist_dp.datasets.synthetic import write_criteo_like
from dist_dp.errors import DistDpError
from dist_dp.ledger import Ledger
from dist_dp.release_files import sha256_of
from dist_dp.released import Release
from tests.cluster.small import run, small, write_config

DAYS = ("day_1", "day_2", "day_10")
FEST: dict[str, Any] = {
    "mechanism": "fest",
    "sparse": {"rows": 40, "choice_epsilon": 0.5, "choice_noise": "gaussian"},
}


class Kill(Exception):
    """Ends the driver between two periods."""


class Fits:
    """Trains with the trainer, and counts; dies instead of beginning one of the runs."""

    def __init__(self, most: int) -> None:
        self.most, self.runs = most, list[str]()

    def __call__(
        self, made: RunConfig | Path, changes: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Path]:
        if len(self.runs) == self.most:
            raise Kill
        assert isinstance(made, RunConfig)
        trainer = Trainer(made)
        summary = trainer.fit()
        assert trainer.run_folder is not None
        self.runs.append(trainer.run_folder.name)
        return summary, trainer.run_folder


def values_of(home: Path) -> dict[str, Any]:
    days = home / "days"
    days.mkdir()
    for seed, day in enumerate(DAYS):
        write_criteo_like(days / f"{day}.tsv", 700, seed=seed)
    return small(
        home,
        None,
        data={"split": {"train": 1.0}, "name": "clicks"},
        privacy=FEST,
        # Dense layers learn nothing then: what is released is what the run started with.
        train={"steps": 4, "dense_learning_rate": 1e-38, "table_optimizer": "adagrad"},
        cluster={"num_workers": 1},
        output={"name": "week", "tensorboard": False},
        stream={"periods": str(days / "*.tsv")},
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_stream_is_killed_and_goes_on(ray_local: None, tmp_path: Path) -> None:
    values = values_of(tmp_path)
    first = Fits(1)
    with pytest.raises(Kill):
        Stream(parse_config(values), first).run()
    assert first.runs == ["week-day_1"]
    rest = Fits(9)
    results = Stream(parse_config(values), rest).run()
    assert rest.runs == ["week-day_2", "week-day_10"]  # the first is not trained again
    again = run("stream", "-c", write_config(tmp_path, values))
    assert again.exit_code == 0, again.output
    assert "Everything released for 3 of 3 periods is" in " ".join(again.stdout.split())

    home = tmp_path / "runs" / "week"
    assert json.loads((home / "stream.json").read_text())["periods"] == results
    folders = [home / f"week-{day}" for day in DAYS]
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert [d.name for d in ledger.datasets()] == sorted(f"clicks/{day}" for day in DAYS)
    for day, entry in zip(DAYS, results, strict=True):
        spent = ledger.spent(f"clicks/{day}")
        assert len(spent.runs) == 1 and entry["records"] == 700
        assert 7.99 < spent.epsilon <= 8 and entry["epsilon"] == spent.epsilon
        assert sum(spent.steps_by_event.values()) == 4 + 1  # and the choice of rows

    for number, day in enumerate(DAYS[1:]):
        found = dict(results[number]["next"])
        assert found.pop("period") == day and found["examples"] == 700
        by_hand = evaluate_release(folders[number], str(tmp_path / "days" / f"{day}.tsv"))
        assert found == pytest.approx(by_hand, rel=1e-9)
    assert "next" not in results[-1]

    for number in (1, 2):
        before, after = (Release.open(folders[n] / "release") for n in (number - 1, number))
        (origin, *_) = reversed(after.manifest["privacy"]["started_from"])
        assert origin["release_sha256"] == sha256_of(before.folder / "release.json")
        assert origin["dataset"] == f"clicks/{DAYS[number - 1]}"
        assert len(after.manifest["privacy"]["started_from"]) == number
        dense = before.dense()
        assert all(torch.equal(tensor, dense[name]) for name, tensor in after.dense().items())
        kept, was = read_kept_rows(folders[number]), read_kept_rows(folders[number - 1])
        changed = 0
        for table in after.manifest["tables"]:
            old, new = before.table(table), after.table(table)
            rest_of = np.setdiff1d(np.arange(len(old)), kept.get(table, np.arange(len(old))))
            assert torch.equal(new[rest_of], old[rest_of])  # rows that the day does not train
            assert table not in kept or not torch.equal(new[kept[table]], old[kept[table]])
            changed += len(np.setdiff1d(kept.get(table, []), was.get(table, [])))
        counted = results[number]["kept_rows"]
        assert 0 < changed == counted["changed"] < counted["rows"]

    # The same records once more, under another day's name.
    (tmp_path / "days" / "day_11.tsv").write_bytes((tmp_path / "days" / "day_2.tsv").read_bytes())
    with pytest.raises(DistDpError, match=r"day_2\.tsv' and '.*day_11\.tsv' hold the same records"):
        Stream(parse_config(values), Fits(0)).run()
