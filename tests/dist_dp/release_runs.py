"""Releases that run in other processes: in a world, killed at every operation, or measured."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.types import DataType

from dist_dp import release_files, release_tables
from dist_dp.accountant import LocalAccountant
from dist_dp.checkpoint import save_checkpoint
from dist_dp.engine import PrivacyEngine
from dist_dp.errors import ReleaseError
from dist_dp.ledger import Ledger
from dist_dp.release import publish_recorded
from dist_dp.released import Release
from tests.dist_dp.models import bags
from tests.dist_dp.placement import model
from tests.dist_dp.test_engine import DATA, DELTA, LOSSES, data_loader, engine

SECRET = bytes(range(32))
STEPS = 4
SMALL_CHUNK = 96
"""Bytes of a chunk: three rows of eight columns."""
BUDGET = (100.0, DELTA)


def trained(
    home: Path,
    steps: int = STEPS,
    *,
    momentum: float = 0.0,
    half: bool = False,
    **options: Any,
) -> PrivacyEngine:
    """A model trained for some steps, most of its rows unsettled; or one resumed, or not (0)."""
    resumed = "resume_from" in options
    given: dict[str, Any] = {} if resumed else {"secret": SECRET}
    made = engine(home, run_id="run", **{"sharding": "table_wise", **given, **options})
    module = model(meta=False)
    if half:
        configs = module.pooled.embedding_bag_configs() + module.sequence.embedding_configs()
        for config in configs:
            config.data_type = DataType.BF16
        for collection in (module.pooled, module.sequence):
            collection.to(torch.bfloat16)
    _, optimizer, loader = made.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5, momentum=momentum),
        data_loader=data_loader(),
        target_epsilon=4.0,
        target_delta=DELTA,
        max_grad_norm=1.0,
        steps=8,
        budget=BUDGET,
    )
    if resumed or not steps:
        return made
    for batch in loader:
        LOSSES(module(*batch.inputs), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if loader.steps_drawn == steps:
            loader.stop()
    return made


def tables_of(folder: Path) -> dict[str, Tensor]:
    """All tables of a release."""
    release = Release.open(folder)
    return {name: release.table(name) for name in release.manifest["tables"]}


def piece_of(shard: Any, table: Tensor) -> Tensor:
    """The part of a table that a shard holds."""
    rows, columns = shard.weight.shape
    return table[shard.row_offset :, shard.column_offset :][:rows, :columns]


# In a world of two.


@contextmanager
def failing(after: int) -> Iterator[None]:
    """The disk is full after some writes."""
    write, count = release_files.HashedFile.write, 0

    def broken(self: Any, data: Any) -> int:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    release_files.HashedFile.write = broken  # type: ignore[method-assign]
    try:
        yield
    finally:
        release_files.HashedFile.write = write  # type: ignore[method-assign]


def in_a_world(home: Path, kinds: list[str]) -> dict[str, Any]:
    """Releases by every sharding; one that fails on rank 1 alone, and the next one."""
    from dist_dp.distributed import barrier, rank

    release_tables.CHUNK_BYTES = SMALL_CHUNK
    found: dict[str, Any] = {}
    for kind in kinds:
        made = trained(home / kind, sharding=kind)
        reports: list[tuple[int, int]] = []
        folder = made.release(home / kind / "model", progress=lambda *r, to=reports: to.append(r))
        barrier()
        tables = tables_of(folder)
        same = [torch.equal(piece_of(s, tables[s.table]), s.weight) for s in made.parts.shards]
        mine = [4 * s.weight.numel() for s in made.parts.shards if rank() == 0 or not s.replicated]
        found[kind] = {"tables": tables, "same": same, "reports": reports, "bytes": sum(mine)}
    made = trained(home / "fails", sharding="column_wise")
    message = ""
    with failing(2 if rank() == 1 else 10**9):
        try:
            made.release(home / "fails" / "model")
        except ReleaseError as error:
            message = str(error)
    barrier()
    found["failure"] = message
    found["left"] = sorted(p.name for p in (home / "fails").iterdir() if p.is_dir())
    found["settled"] = [made.parts.mechanism.is_settled(s) for s in made.parts.shards]
    barrier()
    found["after failure"] = tables_of(made.release(home / "fails" / "model"))
    return found


# Killed.


class Deaths:
    """Counts what a release does to the disk, and kills this process before one of the deeds.

    Opening, making and renaming come as audit events; writing and fsync, and the ledger's entry,
    are counted where they are called.
    """

    EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.chmod", "shutil.rmtree"})

    def __init__(self, folder: Path, before: int, accountant: LocalAccountant) -> None:
        self.folder, self.before = str(folder), before
        self.seen: list[str] = []
        self._count_calls(os, "fsync")
        self._count_calls(release_files.HashedFile, "write")
        self._count_calls(accountant, "record_release")
        sys.addaudithook(self._on_event)

    def _count_calls(self, holder: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(holder, name)

        def counted(*args: Any, **options: Any) -> Any:
            self._count(name)
            return function(*args, **options)

        setattr(holder, name, counted)

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        path = str(args[0]) if args else ""
        if event in self.EVENTS and path.startswith(self.folder) and "ledger" not in path:
            self._count(f"{event} {Path(path).name}")

    def _count(self, what: str) -> None:
        self.seen.append(what)
        if len(self.seen) == self.before:
            os.kill(os.getpid(), signal.SIGKILL)


def die_everywhere(home: Path) -> dict[str, Any]:
    """Releases one trained model again and again, each time in a process that dies a deed later.

    Returns:
        For each death: what came next, what loads from the release's place and from the partial
        folder, what the ledger holds, and whether :func:`publish_recorded` found something. Last,
        the release that was left alone.
    """
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    release_tables.CHUNK_BYTES = SMALL_CHUNK
    original = home / "original"
    made = trained(original)
    save_checkpoint(made, original / "checkpoint")
    deaths: list[dict[str, Any]] = []
    for before in range(1, 1000):
        here = home / f"death-{before}"
        shutil.copytree(original, here)
        child = os.fork()
        if child == 0:
            made.accountant = LocalAccountant(Ledger(here / "ledger.sqlite"))
            counted = Deaths(here, before, made.accountant)
            made.release(here / "model")
            (home / "deeds.txt").write_text("\n".join(counted.seen), encoding="utf-8")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            deeds = (home / "deeds.txt").read_text(encoding="utf-8").splitlines()
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        accountant = LocalAccountant(Ledger(here / "ledger.sqlite"))
        death = {
            "home": str(here),
            "loads": loads(here / "model"),
            "partial loads": loads(here / ".model.partial"),
            "recorded": accountant.released_step("run"),
            "published": publish_recorded(here / "model", accountant, "run"),
        }
        deaths.append({**death, "loads now": loads(here / "model")})
    for death, deed in zip(deaths, deeds, strict=True):
        death["next"] = deed
    return {"deaths": deaths, "whole": tables_of(here / "model")}


def loads(folder: Path) -> bool:
    """Whether a folder opens as a release, and all of it can be read."""
    try:
        tables_of(folder)
    except ReleaseError:
        return False
    return True


# Measured.


class Large(nn.Module):
    """One table of many rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.pooled = bags({"a": (rows, ["f0"])}, 128, device="meta")
        self.top = nn.Linear(128, 1)

    def forward(self, dense: Tensor, *sparse: Any) -> Tensor:
        return self.top(self.pooled(sparse[0]).values()).squeeze(1)


def peak_of_a_release(home: Path, rows: int) -> dict[str, float]:
    """Megabytes of a table, and of memory beyond what there was before its release."""
    import pyarrow.ipc  # noqa: F401 (not the release's memory)

    from tests.dist_dp.clicks import Clicks, random_bags

    made = engine(home, sharding="row_wise", secret=SECRET)
    module = Large(rows)
    g = torch.Generator().manual_seed(1)
    some = Clicks(DATA.dense, (random_bags({"f0": rows}, len(DATA), g),), DATA.labels)
    loader = torch.utils.data.DataLoader(
        data_loader().dataset, batch_size=10, collate_fn=some.select
    )
    _, optimizer, batches = made.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        steps=2,
        budget=BUDGET,
    )
    for batch in batches:
        LOSSES(module(*batch.inputs), batch.labels).backward()
        optimizer.step()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    made.release(home / "model")
    size = made.parts.shards[0].weight.numel() * 4 / 1e6
    return {"table": size, "beyond": _status("VmHWM") - before}


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


if __name__ == "__main__":
    import json
    import warnings

    warnings.filterwarnings("ignore")
    what, place, out = sys.argv[1:4]
    if what == "die":
        torch.save(die_everywhere(Path(place)), out)
    else:
        result = peak_of_a_release(Path(place), int(sys.argv[4]))
        Path(out).write_text(json.dumps(result), encoding="utf-8")
