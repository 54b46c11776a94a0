"""One row of measurements a training step: a table file and TensorBoard.

The rows are unnoised statistics of private data (losses, norms, counts), so both files are as
private as the training data; only a release is covered by the guarantee.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dist_dp.errors import ConfigError, DataError
from dist_dp.limits import MAX_METRICS_BYTES, read_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard"

# Column -> group in TensorBoard. The order is the order of the columns in the file.
_GROUPS: dict[str, str] = {
    "step": "",
    "loss": "train",
    "epsilon": "privacy",
    "batch_size": "train",
    "learning_rate": "train",
    "clip_fraction": "privacy",
    "grad_norm_p10": "privacy",
    "grad_norm_p50": "privacy",
    "grad_norm_p90": "privacy",
    "grad_norm_p99": "privacy",
    "signal_to_noise": "privacy",
    "noised_rows": "privacy",
    "examples_per_second": "speed",
    "step_ms": "speed",
    "data_ms": "phases",
    "forward_ms": "phases",
    "backward_ms": "phases",
    "select_ms": "phases",
    "clip_ms": "phases",
    "update_ms": "phases",
    "noise_ms": "phases",
    "settle_ms": "phases",
    "communication_ms": "phases",
    "ledger_ms": "phases",
    "valid_auc": "valid",
    "valid_log_loss": "valid",
}

STEP_COLUMNS: tuple[str, ...] = tuple(_GROUPS)
"""Columns of ``metrics.csv``, in order.

``batch_size`` counts the real examples of the Poisson batch over all ranks; columns that end in
``_ms`` are milliseconds; ``settle_ms`` lies inside ``forward_ms``; ``noise_ms`` is the dense noise
and whatever noise is drawn eagerly; ``noised_rows`` and ``select_ms`` are filled by mechanisms that
select rows, ``valid_*`` are filled at evaluations only.
"""


def tensorboard_tag(column: str) -> str:
    """Return the TensorBoard tag of a column: ``loss`` is ``train/loss``."""
    return f"{_GROUPS[column]}/{column.removeprefix('valid_')}"


class MetricsLog:
    """Appends one row a step to ``metrics.csv`` and to TensorBoard event files.

    Every row is handed to the operating system before ``write`` returns, so a run that is killed
    keeps all its rows. Opening a folder that holds a log continues it: a row that was cut off in
    the middle is removed first.

    TensorBoard gets every step below 10,000, every tenth below 100,000, and so on (evaluations
    always): its files and its browser do not cope with a million events; the table has them all.

    Args:
        folder: The run folder; created if missing.
        tensorboard: Whether to write event files below ``folder/tensorboard`` as well.

    Raises:
        DataError: ``metrics.csv`` exists with other columns.
        ConfigError: ``tensorboard`` is asked for and the package is missing.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = True) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / METRICS_FILE
        self._events: SummaryWriter | None = (
            _open_tensorboard(self.folder / TENSORBOARD_FOLDER) if tensorboard else None
        )
        fresh = _mend(self.path)
        # Line buffering: a finished row survives the end of this process, whatever ends it.
        self._file: io.TextIOWrapper | None = open(  # noqa: SIM115 - closed by close()
            self.path, "a", buffering=1, encoding="utf-8", newline=""
        )
        self._rows = csv.writer(self._file, lineterminator="\n")
        if fresh:
            self._rows.writerow(STEP_COLUMNS)

    def write(self, row: Mapping[str, float | int]) -> None:
        """Append one step.

        Args:
            row: Column -> value; columns left out stay empty. ``step`` is required.

        Raises:
            DataError: The log is closed, ``step`` is missing, a name is not a column, or the disk
                is full.
        """
        if self._file is None:
            raise DataError(f"{self.path} is closed; open a new MetricsLog to go on writing.")
        if "step" not in row:
            raise DataError(f"A row for {self.path} has no 'step'; give the step it belongs to.")
        unknown = sorted(set(row) - set(STEP_COLUMNS))
        if unknown:
            raise DataError(
                f"{', '.join(unknown)}: no column of {self.path}. "
                f"The columns are {', '.join(STEP_COLUMNS)}."
            )
        try:
            self._rows.writerow([_cell(row[name]) if name in row else "" for name in STEP_COLUMNS])
            if self._events is not None and _shown_in_tensorboard(row):
                _write_event(self._events, row)
        except OSError as error:
            raise DataError(
                f"cannot write {self.path} or the TensorBoard files beside it ({error.strerror}); "
                "free some space, then go on with --resume"
            ) from error

    def close(self) -> None:
        """Close both files; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> MetricsLog:
        """Return the log itself."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the log, also after an error."""
        self.close()


def read_metrics(folder: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Read ``metrics.csv`` of a run folder as columns.

    A last row without its end of line is left out. Where a resumed run has repeated steps, the
    later row counts.

    Args:
        folder: The run folder.

    Returns:
        Each of ``STEP_COLUMNS`` -> float64 array of one length, ordered by step, NaN where the
        file has no value. All are empty if the file has no rows.

    Raises:
        DataError: The file is missing, or is not a table of numbers.
    """
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    path = Path(folder) / METRICS_FILE
    try:
        content = read_whole(path, MAX_METRICS_BYTES)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"Cannot read {path} ({why}); give the folder of a training run."
        ) from error
    content = content[: content.rfind(b"\n") + 1]
    if not content:
        return {name: np.empty(0) for name in STEP_COLUMNS}
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(content),
            convert_options=pa_csv.ConvertOptions(
                column_types={name: pa.float64() for name in STEP_COLUMNS}
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path} is not a table of numbers ({error}); restore it, or delete it to go without."
        ) from error
    try:
        names = table.column_names
    except UnicodeDecodeError:
        names = []
    if "step" not in names:
        raise DataError(f"{path} has no column 'step'; it was not written by a training run.")
    columns = {
        name: np.asarray(table[name].to_numpy(), dtype=np.float64)
        if name in names
        else np.full(table.num_rows, np.nan)
        for name in STEP_COLUMNS
    }
    # np.unique keeps the first of equal steps: reversed, that is the last one written.
    _, first = np.unique(columns["step"][::-1], return_index=True)
    order = table.num_rows - 1 - first
    return {name: values[order] for name, values in columns.items()}


def _mend(path: Path) -> bool:
    """Cut an unfinished last row off; return whether the file still needs its header."""
    if not path.exists():
        return True
    with open(path, "rb+") as file:
        header = file.readline()
        if not header.endswith(b"\n"):
            file.truncate(0)
            return True
        found = header.decode("utf-8", "replace").strip().split(",")
        if found != list(STEP_COLUMNS):
            raise DataError(
                f"{path} has other columns than this version writes ({', '.join(found)}); "
                "start the run in a new folder."
            )
        # A row is far below 4 KiB, so the last end of line is in the last 4 KiB or in the header.
        end = file.seek(0, io.SEEK_END)
        start = file.seek(max(len(header) - 1, end - 4096))
        file.truncate(start + file.read().rfind(b"\n") + 1)
    return False


def _cell(value: float | int) -> str:
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else f"{number:.7g}"


def _shown_in_tensorboard(row: Mapping[str, float | int]) -> bool:
    step = int(row["step"])
    stride = 10 ** max(0, len(str(step)) - 4)
    return step % stride == 0 or "valid_auc" in row or "valid_log_loss" in row


def _open_tensorboard(folder: Path) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"TensorBoard files cannot be written to {folder}: {error}. "
            "Install the package 'tensorboard', or switch TensorBoard off."
        ) from error
    return SummaryWriter(log_dir=str(folder), flush_secs=1)


def _write_event(events: Any, row: Mapping[str, float | int]) -> None:
    """Write all scalars of a step as one event: add_scalar once a column costs a millisecond."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=tensorboard_tag(name), simple_value=float(value))
        for name, value in row.items()
        if name != "step"
    ]
    events.file_writer.add_summary(Summary(value=values), global_step=int(row["step"]))
