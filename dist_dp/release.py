"""The only way a model leaves the system: every row settled, then written, then renamed whole.

A release is a folder::

    release.json          what it is, by whom it may be loaded, sha256 of every file
    MODEL_CARD.md         the privacy statement
    dense.safetensors     everything outside the tables
    tables/TABLE/*.parquet    columns ``row`` (int64) and ``embedding`` (fixed-size list of float)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_dp.distributed import all_together, rank
from dist_dp.errors import ReleaseError
from dist_dp.model_card import model_card
from dist_dp.table_shard import TableShard

if TYPE_CHECKING:
    from dist_dp.engine import PrivacyEngine
    from dist_dp.private_model import PrivateModel

FORMAT = "dist-dp-release"
FORMAT_VERSION = 1
CHUNK_ROWS = 1 << 16


def write_release(
    engine: PrivacyEngine,
    destination: Path,
    *,
    model_info: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Settles and writes a model; every rank calls it.

    Args:
        engine: The engine that trained the model.
        destination: Folder to create, on storage that all ranks share.
        model_info: How to build the model again (for ``dist-dp evaluate``), of simple types.
        facts: More for the model card, of simple types.

    Returns:
        The folder.

    Raises:
        ReleaseError: The folder exists, or writing failed (a full disk); nothing is left of it.

    Guarantee:
        Every row of every shard is settled to the last finished step before its first byte is
        written, and buffers that moved with the private data are refused, so the folder holds
        only what the noise covers. A folder under the final name is always whole.
    """
    parts = engine.parts
    partial = destination.with_name(f".{destination.name}.partial")
    all_together(
        lambda: _prepare(destination, partial) if rank() == 0 else None,
        ReleaseError,
        "prepare the release",
    )
    try:
        all_together(parts.check_fixed_unchanged, ReleaseError, "check the model")
        parts.settle()
        all_together(
            lambda: _write_shards(parts, partial), ReleaseError, "write the tables of the release"
        )

        def finish() -> None:
            if rank() == 0:
                _write_dense(parts, partial)
                # Before the release can be seen, so that no resumed run draws other noise for it.
                if engine.accountant is not None:
                    engine.accountant.record_release(engine.run_id, parts.mechanism.schedule.step)
                _finish(engine, partial, destination, model_info, facts)

        all_together(finish, ReleaseError, "finish the release")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return destination


def _prepare(destination: Path, partial: Path) -> None:
    if destination.exists():
        raise ReleaseError(f"'{destination}' exists; choose another folder or remove it first")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "tables").mkdir(parents=True)


def _write_shards(parts: PrivateModel, partial: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, shard in enumerate(parts.shards):
        if shard.replicated and rank() != 0:
            continue
        if shard.weight.numel() == 0:
            continue
        folder = partial / "tables" / shard.table
        folder.mkdir(parents=True, exist_ok=True)
        columns = shard.weight.shape[1]
        schema = pa.schema(
            [("row", pa.int64()), ("embedding", pa.list_(pa.float32(), columns))],
            metadata={
                "table": shard.table,
                "num_rows": str(shard.num_rows),
                "dim": str(shard.dim),
                "column_offset": str(shard.column_offset),
            },
        )
        path = folder / f"part-{rank():05d}-{number:03d}.parquet"
        with pq.ParquetWriter(path, schema, compression="none") as writer:
            for rows, values in _chunks(shard):
                embedding = pa.FixedSizeListArray.from_arrays(
                    pa.array(values.reshape(-1).numpy()), columns
                )
                writer.write_table(pa.table([pa.array(rows.numpy()), embedding], schema=schema))


def _chunks(shard: TableShard) -> Iterator[tuple[Tensor, Tensor]]:
    count = shard.weight.shape[0]
    for start in range(0, count, CHUNK_ROWS):
        end = min(count, start + CHUNK_ROWS)
        rows = torch.arange(start, end) + shard.row_offset
        yield rows, shard.weight[start:end].detach().float().cpu().contiguous()


def _dense_state(parts: PrivateModel) -> dict[str, Tensor]:
    prefixes = tuple(f"{cut.path}." for cut in parts.cuts)
    named = [*parts.model.named_parameters(), *parts.model.named_buffers()]
    passing = {
        f"{path}.{name}" if path else name
        for path, module in parts.model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {
        n: t.detach().cpu().contiguous().clone()
        for n, t in named
        if not n.startswith(prefixes) and n not in passing
    }


def _write_dense(parts: PrivateModel, partial: Path) -> None:
    from safetensors.torch import save_file

    path = partial / "dense.safetensors"
    save_file(_dense_state(parts), path)
    # Readable like the release's other files; safetensors' own are for the owner alone.
    path.chmod((partial / "tables").stat().st_mode & 0o666)


def _finish(
    engine: PrivacyEngine,
    partial: Path,
    destination: Path,
    model_info: dict[str, Any] | None,
    facts: dict[str, Any] | None,
) -> None:
    parts = engine.parts
    plan = parts.plan
    steps = parts.mechanism.schedule.step
    charged = engine.steps_charged()
    privacy = {
        "private": plan.is_private and not engine.secret_is_given,
        "fixed_secret": engine.secret_is_given,
        "epsilon": plan.epsilon(charged) if plan.is_private else None,
        "delta": plan.delta if plan.is_private else None,
        "steps": steps,
        "steps_charged": charged,
        "plan": plan.model_dump(),
        "statement": privacy_statement(engine, charged),
        "not_covered": list(plan.not_covered()),
        "dataset": engine.dataset,
        "run_id": engine.run_id,
    }
    (partial / "MODEL_CARD.md").write_text(
        model_card(privacy, destination.name, facts or {}), encoding="utf-8"
    )
    configs = {
        cut.table_id(c.name): {
            "rows": c.num_embeddings,
            "dim": c.embedding_dim,
            "collection": cut.path,
            "name": c.name,
            "pooled": cut.pooled,
        }
        for cut in parts.cuts
        for c in cut.configs
    }
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "settled_to_step": steps,
        "tables": configs,
        "model": model_info,
        "privacy": privacy,
        "files": {
            str(p.relative_to(partial)): sha256_of(p)
            for p in sorted(partial.rglob("*"))
            if p.is_file()
        },
    }
    (partial / "release.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    os.rename(partial, destination)


def privacy_statement(engine: PrivacyEngine, steps: int) -> str:
    """The plan's statement, or what takes its place when the secret was given."""
    if engine.secret_is_given and engine.parts.plan.is_private:
        return (
            "This model is not private: its noise came from a fixed secret, which is for tests. "
            + engine.parts.plan.statement(steps).replace(
                "This model is", "With a secret of its own it would be", 1
            )
        )
    return engine.parts.plan.statement(steps)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
