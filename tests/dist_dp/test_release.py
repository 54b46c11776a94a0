"""A release streams: settled and written chunk by chunk; whole, or not there at all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dist_dp import release_tables
from dist_dp.checkpoint import save_checkpoint
from dist_dp.engine import PrivacyEngine
from dist_dp.errors import CheckpointError, LedgerError, ReleaseError
from dist_dp.release_files import HashedFile, sha256_of
from dist_dp.release_progress import progress_callback
from dist_dp.released import Release, load_release
from tests.dist_dp.placement import model
from tests.dist_dp.release_runs import (
    SMALL_CHUNK,
    STEPS,
    failing,
    in_a_world,
    loads,
    piece_of,
    tables_of,
    trained,
)
from tests.dist_dp.worlds import run_world

KINDS = ["table_wise", "row_wise", "column_wise", "data_parallel"]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_tables, "CHUNK_BYTES", SMALL_CHUNK)


def in_another_process(what: str, home: Path, *more: str) -> Path:
    """Runs a part of ``release_runs``; returns the file with its result."""
    out = home / "result"
    command = [sys.executable, "-m", "tests.dist_dp.release_runs", what, str(home), str(out)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, *more], capture_output=True, text=True, cwd=root, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


# What is written.


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"half": True}, {"mechanism": "dpsgd"}, {"noise_grid": 2.0**-12}],
    ids=["lazydp", "momentum", "half", "dpsgd", "grid"],
)
@pytest.mark.usefixtures("small_chunks")
def test_streamed_is_what_settling_everything_gives(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    streamed = trained(tmp_path / "streamed", **options)
    whole = trained(tmp_path / "whole", **options)
    behind = [not whole.parts.mechanism.is_settled(s) for s in whole.parts.shards]
    assert any(behind) == (options.get("mechanism") != "dpsgd")
    folder = streamed.release(tmp_path / "model")
    whole.parts.settle()
    tables = tables_of(folder)
    for mine, other in zip(streamed.parts.shards, whole.parts.shards, strict=True):
        assert torch.equal(tables[mine.table], other.weight.float())
        assert torch.equal(mine.weight, other.weight)
        assert streamed.parts.mechanism.is_settled(mine)


@pytest.mark.usefixtures("small_chunks")
def test_hashes_and_sizes_are_of_the_files(tmp_path: Path) -> None:
    folder = trained(tmp_path).release(tmp_path / "model")
    named = Release.open(folder).manifest["files"]
    there = {p for p in folder.rglob("*") if p.is_file() and p.name != "release.json"}
    assert {folder / name for name in named} == there
    for name, facts in named.items():
        path = folder / name
        assert facts == {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def test_a_large_piece_is_hashed_beside_the_write(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    content = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8).numpy()
    with ThreadPoolExecutor(1) as hasher, HashedFile(tmp_path / "file", hasher) as file:
        for piece in (content, b"small", content[: 2 << 20]):
            file.write(piece)
        facts = file.finish()
    assert facts.bytes == (5 << 20) + 5 and facts.sha256 == sha256_of(tmp_path / "file")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_world(in_a_world, 2, tmp_path_factory.mktemp("world"), KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_sharding_streams_on_every_rank(
    world: list[dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    alone = trained(tmp_path)
    alone.parts.settle()
    for found in world:
        assert found[kind]["same"] and all(found[kind]["same"])
        for shard in alone.parts.shards:
            # The order of sums of gradients over two ranks is the only difference.
            torch.testing.assert_close(
                found[kind]["tables"][shard.table], shard.weight, rtol=0, atol=1e-5
            )
        reports, total = found[kind]["reports"], found[kind]["bytes"]
        assert reports[0] == (0, total) and reports[-1] == (total, total)
        assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    written = [found[kind]["bytes"] for found in world]
    assert sum(written) == sum(4 * s.weight.numel() for s in alone.parts.shards)
    assert written[1] == 0 if kind == "data_parallel" else min(written) > 0


def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_their_history_alike(
    world: list[dict[str, Any]],
) -> None:
    for found in world:
        assert "disk is full" in found["failure"] and found["left"] == []
        assert found["settled"] and all(found["settled"])
        for name, table in found["column_wise"]["tables"].items():
            assert torch.equal(found["after failure"][name], table)


# Memory, overlap, progress.


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """A table of 512 MB; what it takes is a few chunks of 32 MB for work, never a copy."""
    found = json.loads(in_another_process("measure", tmp_path, "1000000").read_text())
    assert found["table"] == 512.0
    assert found["beyond"] < 160


@pytest.mark.usefixtures("small_chunks")
def test_chunks_are_settled_while_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk's write waits here until the next one is settled; and not too many wait for it."""
    made = trained(tmp_path)
    settle, write = made.parts.mechanism.settle, release_tables._TableFile.write
    settled, written, most = 0, 0, 0
    more = threading.Condition()
    chunks = sum(len(list(release_tables._chunks(s))) for s in made.parts.shards)

    def counted_settle(*args: Any) -> None:
        nonlocal settled, most
        settle(*args)
        with more:
            settled += 1
            most = max(most, settled - written)
            more.notify()

    def slow_write(*args: Any) -> int:
        nonlocal written
        with more:
            assert more.wait_for(lambda: settled >= min(chunks, written + 2), timeout=30)
            size = write(*args)
            written += 1
        return size

    monkeypatch.setattr(made.parts.mechanism, "settle", counted_settle)
    monkeypatch.setattr(release_tables._TableFile, "write", slow_write)
    made.release(tmp_path / "model")
    assert settled == written == chunks > 8
    assert most <= release_tables.CHUNKS_WAITING + 1


def test_a_terminal_has_a_bar_and_a_file_has_none() -> None:
    out = io.StringIO()
    with progress_callback(True, Console(file=out, force_terminal=True, width=80)) as report:
        assert report is not None
        for done in range(0, 11, 5):
            report(done * 10**8, 10**9)
    assert "releasing" in out.getvalue() and "1.0/1.0 GB" in out.getvalue()
    silent = io.StringIO()
    with progress_callback(True, Console(file=silent)) as report:
        assert report is None
    with progress_callback(False, Console(file=out, force_terminal=True)) as report:
        assert report is None
    with progress_callback(print) as report:
        assert report is print
    assert silent.getvalue() == ""


# What stops a release, and what it leaves.


@pytest.mark.usefixtures("small_chunks")
def test_training_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step between two chunks, however far the thread that writes them is."""
    made = trained(tmp_path)
    settle, calls = made.parts.mechanism.settle, iter(range(10**6))

    def beside_a_step(*args: Any) -> None:
        settle(*args)
        if next(calls) == 3:
            made.parts.mechanism.schedule.advance(0.5, 1.0, 1.0, 10.0)

    monkeypatch.setattr(made.parts.mechanism, "settle", beside_a_step)
    with pytest.raises(ReleaseError, match="trained while it was being released"):
        made.release(tmp_path / "model")
    monkeypatch.undo()
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert_nothing_leaves(made, tmp_path)


@pytest.mark.usefixtures("small_chunks")
def test_a_row_that_was_not_settled_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(tmp_path)
    settle = made.parts.mechanism.settle

    def lazy(shard: Any, first: int, last: int) -> None:
        settle(shard, first, last - 1)

    monkeypatch.setattr(made.parts.mechanism, "settle", lazy)
    with pytest.raises(ReleaseError, match="not settled to step 4, so they lack noise"):
        made.release(tmp_path / "model")
    monkeypatch.undo()
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert_nothing_leaves(made, tmp_path)


@pytest.mark.usefixtures("small_chunks")
def test_settling_cut_short_keeps_everything_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two chunks, where no shard is being settled: histories of ranks could differ."""
    made = trained(tmp_path)
    settle, calls = made.parts.mechanism.settle, iter(range(10**6))

    def interrupted(*args: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        settle(*args)

    monkeypatch.setattr(made.parts.mechanism, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.release(tmp_path / "model")
    monkeypatch.undo()
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    assert_nothing_leaves(made, tmp_path)


def assert_nothing_leaves(made: PrivacyEngine, home: Path) -> None:
    with pytest.raises(ReleaseError, match=r"cut short.*Resume from the last checkpoint"):
        made.release(home / "again")
    with pytest.raises((CheckpointError, ReleaseError), match="cut short"):
        save_checkpoint(made, home / "checkpoint")
    assert not loads(home / "again")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_full_disk_leaves_nothing_and_the_next_release_is_the_same(
    tmp_path: Path, after: int
) -> None:
    made, wanted = trained(tmp_path / "a"), trained(tmp_path / "b")
    with failing(after), pytest.raises(ReleaseError, match=r"disk is full.*Nothing was kept"):
        made.release(tmp_path / "model")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    assert all(made.parts.mechanism.is_settled(s) for s in made.parts.shards)
    found = tables_of(made.release(tmp_path / "model"))
    wanted.parts.settle()
    for shard in wanted.parts.shards:
        assert torch.equal(found[shard.table], shard.weight)


def test_what_is_being_written_is_for_its_owner(tmp_path: Path) -> None:
    made = trained(tmp_path)
    modes: list[int] = []
    before = os.umask(0o022)
    try:
        folder = made.release(
            tmp_path / "model",
            progress=lambda *_: modes.append((tmp_path / ".model.partial").stat().st_mode & 0o777),
        )
    finally:
        os.umask(before)
    assert set(modes) == {0o700} and folder.stat().st_mode & 0o777 == 0o755


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    yield torch.load(in_another_process("die", tmp_path_factory.mktemp("deaths")))


def test_killed_before_any_deed_nothing_half_loads(deaths: dict[str, Any]) -> None:
    """Until the ledger has it nothing loads, from anywhere; then all of it, at once or later."""
    found = deaths["deaths"]
    kinds = [d["next"].split()[0] for d in found]
    for kind in ("os.mkdir", "open", "write", "fsync", "record_release", "os.rename"):
        assert kind in kinds
    assert kinds.count("write") > 20
    record = kinds.index("record_release")
    for number, death in enumerate(found):
        recorded = number > record
        assert death["recorded"] == (STEPS if recorded else 0), death
        if not recorded:
            assert not death["loads"] and not death["partial loads"], death
        assert death["published"] == (recorded and not death["loads"]), death
        assert death["loads now"] == recorded, death
        if recorded:
            tables = tables_of(Path(death["home"]) / "model")
            assert all(torch.equal(tables[n], t) for n, t in deaths["whole"].items())
    assert any(d["published"] for d in found)


def test_a_resumed_run_releases_the_same(deaths: dict[str, Any]) -> None:
    found = [d for d in deaths["deaths"] if not d["recorded"]]
    for death in (found[3], found[len(found) // 2], found[-1]):
        home = Path(death["home"])
        assert (home / ".model.partial").exists()
        resumed = trained(home, resume_from=home / "checkpoint")
        tables = tables_of(resumed.release(home / "model"))
        assert all(torch.equal(tables[n], t) for n, t in deaths["whole"].items())
        assert not (home / ".model.partial").exists()


def test_a_run_does_not_go_on_from_before_a_recorded_release(deaths: dict[str, Any]) -> None:
    home = Path(next(d for d in deaths["deaths"] if d["recorded"])["home"])
    with pytest.raises(LedgerError, match="released a model of step 4"):
        trained(home, resume_from=home / "checkpoint")


# Reading.


@pytest.fixture
def released(tmp_path: Path, small_chunks: None) -> Path:
    return trained(tmp_path).release(tmp_path / "model")


def test_a_file_cut_off_is_refused_at_opening(released: Path) -> None:
    part = next((released / "tables").rglob("*.arrow"))
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    for verify in (True, False):
        with pytest.raises(ReleaseError, match=f"{len(content) - 1} bytes instead of"):
            Release.open(released, verify=verify)
    part.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    Release.open(released, verify=False)
    with pytest.raises(ReleaseError, match="was changed"):
        Release.open(released)


def edit_manifest(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "release.json").read_text(encoding="utf-8"))
    change(manifest)
    (folder / "release.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_table_without_all_its_rows_does_not_load(released: Path) -> None:
    release = Release.open(released)
    name = next(iter(release.manifest["tables"]))
    edit_manifest(released, lambda m: m["tables"][name].update(rows=m["tables"][name]["rows"] + 1))
    with pytest.raises(ReleaseError, match="incomplete or holds NaN"):
        Release.open(released).table(name)


def test_a_file_that_the_manifest_does_not_name_is_not_read(released: Path) -> None:
    release = Release.open(released)
    part = next((released / "tables").rglob("*.arrow"))
    (part.parent / "part-99999-000.arrow").write_bytes(b"no table")
    for name in release.manifest["tables"]:
        release.table(name)


def test_loading_fits_or_changes_nothing(released: Path) -> None:
    fresh = model(meta=False)
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    edit_manifest(released, lambda m: m["tables"]["pooled.a"].update(rows=14))
    with pytest.raises(ReleaseError, match=r"does not fit the model, 1 tensors differ: pooled\."):
        load_release(released, fresh)
    assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())
    edit_manifest(released, lambda m: m["tables"]["pooled.a"].update(rows=13))
    with pytest.raises(ReleaseError, match="meta device"):
        load_release(released, model(meta=False).to("meta"))
    load_release(released, fresh)
    tables = tables_of(released)
    assert torch.equal(fresh.pooled.embedding_bags["a"].weight, tables["pooled.a"])


def test_pieces_know_their_place(released: Path) -> None:
    """The helper of the tests above can tell a wrong place."""
    made = trained(released.parent / "other")
    made.parts.settle()
    shard = made.parts.shards[0]
    table = tables_of(released)[shard.table]
    assert torch.equal(piece_of(shard, table), shard.weight)
    assert not torch.equal(piece_of(shard, table.flip(0)), shard.weight)
