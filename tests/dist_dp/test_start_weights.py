"""A model started from a release: its weights bit for bit, and what it says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_dp import release_tables, start_weights
from dist_dp.checkpoint import save_checkpoint
from dist_dp.errors import ReleaseError
from dist_dp.origins import origins_of, origins_statement
from dist_dp.release_files import sha256_of
from dist_dp.released import Release
from tests.dist_dp.release_runs import SMALL_CHUNK, piece_of, tables_of, trained
from tests.dist_dp.start_runs import started_in_a_world
from tests.dist_dp.worlds import run_world

KINDS = ["data_parallel", "table_wise", "row_wise", "column_wise"]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release_tables, "CHUNK_BYTES", SMALL_CHUNK)
        return trained(home).release(home / "model")


def test_every_sharding_starts_from_the_release(released: Path, tmp_path: Path) -> None:
    for found in run_world(started_in_a_world, 2, tmp_path, released, KINDS):
        assert found.keys() == set(KINDS)
        assert all(len(same) > 5 and all(same) for same in found.values()), found


def test_a_row_put_elsewhere_is_seen(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above fails for a loader that is wrong by one row."""

    class Moved(Release):
        def pieces(self, table: str) -> Any:
            last = self.manifest["tables"][table]["rows"]
            for rows, column, values in super().pieces(table):
                yield (rows + 1) % last, column, values

    monkeypatch.setattr(start_weights, "Release", Moved)
    assert not all(started_in_a_world(tmp_path, released, ["row_wise"])["row_wise"])


def test_half_precision_tables_start_from_their_weights(tmp_path: Path) -> None:
    folder = trained(tmp_path / "a", half=True).release(tmp_path / "model")
    made = trained(tmp_path / "b", 0, half=True, start_from=folder)
    tables = tables_of(folder)
    for shard in made.parts.shards:
        assert torch.equal(piece_of(shard, tables[shard.table]), shard.weight.float())
        assert shard.low is not None and not shard.low.any()


def test_the_release_says_what_it_was_started_from(released: Path, tmp_path: Path) -> None:
    made = trained(tmp_path, start_from=released, dataset="second")
    folder = made.release(tmp_path / "model")
    privacy = Release.open(folder).manifest["privacy"]
    (origin,) = privacy["started_from"]
    assert origin["release_sha256"] == sha256_of(released / "release.json")
    first = Release.open(released).manifest["privacy"]
    assert (origin["run_id"], origin["dataset"]) == ("run", first["dataset"])
    assert origin["epsilon"] == first["epsilon"] > 0
    for text in (privacy["statement"], (folder / "MODEL_CARD.md").read_text()):
        assert origin["release_sha256"] in text and "depends on earlier records too" in text
    # One more link: all that came before is named.
    chain = origins_of(folder, privacy)
    assert [item["dataset"] for item in chain] == [first["dataset"], "second"]
    assert "Runs on one data set compose" not in origins_statement(chain, "third")
    assert "Runs on one data set compose" in origins_statement(chain, "second")


def test_a_checkpoint_wins_over_the_release(released: Path, tmp_path: Path) -> None:
    import shutil

    start = tmp_path / "start"
    shutil.copytree(released, start)
    made = trained(tmp_path, 2, start_from=start)
    save_checkpoint(made, tmp_path / "checkpoint")
    shutil.rmtree(start)
    again = trained(tmp_path, resume_from=tmp_path / "checkpoint", start_from=start)
    assert again.started_from == made.started_from and len(made.started_from) == 1
    for mine, theirs in zip(again.parts.shards, made.parts.shards, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


def test_what_does_not_fit_is_named(released: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "start"
    shutil.copytree(released, folder)
    path = folder / "release.json"
    manifest = json.loads(path.read_text())

    def refused(match: str) -> None:
        path.write_text(json.dumps(manifest))
        with pytest.raises(ReleaseError, match=match):
            trained(tmp_path, 0, start_from=folder)

    rows = manifest["tables"]["pooled.a"]["rows"]
    manifest["tables"]["pooled.a"]["rows"] = rows - 1
    refused(r"pooled\.a \(model .*Give the model the sizes of the release")
    manifest["tables"]["pooled.a"]["rows"] = rows
    manifest["privacy"]["dataset"] = "two\nlines"
    refused("does not say which records the release depends on")
    manifest["privacy"]["dataset"] = "clicks"
    part = next((folder / "tables").rglob("*.arrow"))
    part.write_bytes(part.read_bytes()[:-9] + b"x" + part.read_bytes()[-8:])
    refused("was changed since the release")


def test_a_table_that_lacks_rows_is_refused(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = Release.pieces
    monkeypatch.setattr(Release, "pieces", lambda *of: list(pieces(*of))[:-1])
    with pytest.raises(ReleaseError, match="is incomplete or holds NaN"):
        trained(tmp_path, 0, start_from=released)
