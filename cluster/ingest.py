"""Conversion of raw records on a cluster: Ray Data writes the parts, this process the store.

Parts that are whole stay when a conversion is cut short, and the next one goes on with them. The
store is the one that ``dist_dp.datasets.convert`` writes. All nodes must see the source and the
folder of the destination under the same paths.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_dp.cluster.config import ClusterConfig
from dist_dp.cluster.ray_session import ray_session
from dist_dp.datasets.convert import DEFAULT_SPLIT, write_store
from dist_dp.datasets.manifest import Manifest, SplitInfo
from dist_dp.datasets.parts import (
    DEFAULT_PART_BYTES,
    PartsPlan,
    assemble,
    parts_folder,
    read_part,
    write_part,
)
from dist_dp.datasets.readers import Reader, open_reader
from dist_dp.datasets.readers.spans import Span
from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import DataError

CHUNK_BYTES = 32 << 20
"""Bytes of text parsed at a time, as in a conversion without a cluster."""

Watcher = Callable[[int, int], None]


def convert_distributed(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "auto",
    schema: DataSchema | None = None,
    split: Mapping[str, float] | None = DEFAULT_SPLIT,
    split_seed: int = 0,
    skip_bad_rows: bool = False,
    max_bad_rows: int | None = None,
    user: str | None = None,
    address: str | None = None,
    part_bytes: int = DEFAULT_PART_BYTES,
    watch: Watcher | None = None,
) -> Manifest:
    """Converts a source as :func:`dist_dp.datasets.convert.convert` does, on all CPUs of a cluster.

    Args:
        source: File or folder that every node sees.
        destination: Folder to make, likewise.
        format: See ``convert``.
        schema: See ``convert``.
        split: See ``convert``.
        split_seed: See ``convert``.
        skip_bad_rows: See ``convert``.
        max_bad_rows: See ``convert``.
        user: See ``convert``.
        address: A running Ray cluster; by default Ray is started here.
        part_bytes: Bytes of a part of a text file, about. A ``.gz`` file and a Parquet file are
            one part each, whatever their size.
        watch: Called with the parts that are whole and the number of all parts.

    Raises:
        DataError: What ``convert`` raises, or a node that does not see the files.
    """
    reader = open_reader(
        source,
        format,
        schema,
        skip_bad_rows=skip_bad_rows,
        split_seed=split_seed,
        chunk_bytes=min(part_bytes, CHUNK_BYTES),
        user=user,
    )
    reader.max_bad_rows = max_bad_rows
    done: list[Path] = []

    def fill(reader: Reader, folder: Path, split: dict[str, float] | None) -> dict[str, SplitInfo]:
        plan = PartsPlan.of(reader, split, part_bytes)
        with parts_folder(Path(destination), plan) as parts:
            _write_missing(reader, parts, plan, address, watch or (lambda whole, all: None))
            found = [read_part(parts, index) for index in range(len(plan.spans))]
            whole = [part for part in found if part is not None]
            splits, reader.skipped = assemble(parts, whole, reader.schema, folder)
            done.append(parts)
            return splits

    manifest = write_store(reader, destination, split=split, fill=fill)
    for parts in done:
        shutil.rmtree(parts, ignore_errors=True)
    return manifest


def _write_missing(
    reader: Reader, folder: Path, plan: PartsPlan, address: str | None, watch: Watcher
) -> None:
    """Has Ray Data write the parts that are not there."""
    count = len(plan.spans)
    missing = []
    for index in range(count):
        part = read_part(folder, index)
        if part is None:
            missing.append(index)
        else:
            reader.skipped.update(part.skipped)
    watch(count - len(missing), count)
    reader.check_skipped()
    if not missing:
        return
    with ray_session(ClusterConfig(address=address)):
        for number, reply in enumerate(_replies(folder, plan, missing), start=1):
            if reply["error"] is not None:
                raise DataError(reply["error"])
            part = read_part(folder, reply["index"])
            if part is None:
                raise DataError(
                    f"part {reply['index']} was written on node {reply['node']}, but is not in "
                    f"'{folder}' here; put the destination on storage that all nodes share"
                )
            reader.skipped.update(part.skipped)
            reader.check_skipped()
            watch(count - len(missing) + number, count)


def _replies(folder: Path, plan: PartsPlan, missing: list[int]) -> Any:
    """Yields what became of each part, in the order in which they end."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    items = [{"index": index} for index in missing]
    # One block a part: Ray Data would put many small items into one task.
    parts = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _write_one, fn_args=(str(folder), asdict(plan)), num_cpus=1
    )
    yield from parts.iter_rows()


def _write_one(item: dict[str, Any], folder: str, values: dict[str, Any]) -> dict[str, Any]:
    """Runs on a worker. Errors are part of the reply: a failed task would be tried again."""
    import ray

    plan = PartsPlan(**{**values, "spans": tuple(Span(**span) for span in values["spans"])})
    error = None
    try:
        if not Path(folder).is_dir():
            raise DataError(
                f"'{folder}' is not there; put the destination on storage that all nodes share"
            )
        write_part(Path(folder), plan, int(item["index"]))
    except (DataError, OSError) as problem:
        error = str(problem)
    node = ray.util.get_node_ip_address()
    return {"index": int(item["index"]), "error": error, "node": node}
