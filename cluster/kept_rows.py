"""The rows that FEST chose, in the run's folder, and how one run's differ from another's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dist_dp.errors import DataError

KEPT_ROWS_FILE = "kept_rows.parquet"


def write_kept_rows(folder: Path, kept: Mapping[str, Tensor]) -> None:
    """Writes the rows of each table that the run trains, once, for its owner alone.

    Args:
        folder: The run folder.
        kept: Global rows by unique name of the table, sorted.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / KEPT_ROWS_FILE
    if path.exists():  # a run that goes on has the rows that it chose
        return
    names = sorted(kept)
    counts = [kept[name].numel() for name in names]
    codes = np.repeat(np.arange(len(names), dtype=np.int32), counts)
    table = pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names, pa.string()))
    rows = np.concatenate([kept[name].cpu().numpy() for name in names])
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.table({"table": table, "row": pa.array(rows)}), partial)
    partial.chmod(0o600)
    partial.rename(path)


def read_kept_rows(folder: Path) -> dict[str, NDArray[np.int64]]:
    """What :func:`write_kept_rows` wrote; empty for a run that chose no rows.

    Raises:
        DataError: The file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / KEPT_ROWS_FILE
    if not path.is_file():
        return {}
    try:
        with pq.ParquetFile(path) as file:
            content = file.read()
        names = np.array(content["table"].to_pylist(), dtype=object)
        rows = content["row"].to_numpy().astype(np.int64)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"'{path}' is damaged ({said}); it can be removed") from None
    return {str(name): rows[names == name] for name in dict.fromkeys(names)}


def rows_changed(before: Path | None, after: Path) -> tuple[int, int | None]:
    """How many rows a run keeps, and how many of them an earlier run did not.

    Args:
        before: Folder of the earlier run, if there is one.
        after: Folder of the run.

    Returns:
        The second is None where the earlier run chose no rows.
    """
    new, old = read_kept_rows(after), {} if before is None else read_kept_rows(before)
    count = sum(len(rows) for rows in new.values())
    if not old:
        return count, None
    none = np.empty(0, dtype=np.int64)
    kept = sum(len(np.intersect1d(rows, old.get(name, none))) for name, rows in new.items())
    return count, count - kept
