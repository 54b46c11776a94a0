"""What all readers share: the schema, the treatment of bad rows, the count of bytes read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_dp.datasets.encode import Columns, Encoder, Problem
from dist_dp.datasets.manifest import FileIdentity, identify_file
from dist_dp.datasets.readers.spans import Span
from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import DataError


class Reader(ABC):
    """Reads one source as record batches of the stored form (see ``stored``).

    Attributes:
        format: Name of the format.
        path: The file or folder.
        schema: Label and features.
        files: Every file that is read, in order; together they identify the source.
        skipped: Bad rows left out, by reason (only with ``skip_bad_rows``).
        bytes_read: Bytes of ``files`` consumed so far, for a progress bar.
        span: The only part to read, of those that :meth:`spans` gives; None for all.
        first_number: Number of the span's first line, for messages.
        max_bad_rows: More bad rows than this are an error; None for any number.
    """

    format: str
    span: Span | None = None
    first_number: int = 1
    max_bad_rows: int | None = None

    def __init__(
        self,
        path: Path,
        schema: DataSchema,
        files: list[Path],
        *,
        skip_bad_rows: bool = False,
        split_seed: int = 0,
        chunk_bytes: int = 32 << 20,
    ) -> None:
        """Stores the settings; nothing is read yet."""
        self.path = path
        self.schema = schema
        self.files = files
        self.skip_bad_rows = skip_bad_rows
        self.split_seed = split_seed
        self.chunk_bytes = chunk_bytes
        self.skipped: Counter[str] = Counter()
        self.bytes_read = 0
        self._encoder = Encoder(schema, str(path))

    @property
    def total_bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(file.stat().st_size for file in self.files)

    def identity(self) -> tuple[FileIdentity, ...]:
        """What tells this source from another, or from a later state of itself."""
        try:
            return tuple(identify_file(file) for file in self.files)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); check the file") from error

    def check_skipped(self) -> None:
        """Refuses a source with more bad rows than allowed.

        Raises:
            DataError: There are more.
        """
        total = sum(self.skipped.values())
        if self.max_bad_rows is not None and total > self.max_bad_rows:
            reasons = ", ".join(f"{n:,} {why}" for why, n in sorted(self.skipped.items()))
            raise DataError(
                f"{self.path}: {total:,} bad rows so far ({reasons}), more than the "
                f"{self.max_bad_rows:,} allowed; correct the source, or allow more"
            )

    def spans(self, size: int) -> list[Span]:
        """Parts of about ``size`` bytes that give the batches of the whole, one after the other."""
        return [Span(str(self.path))]

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Yields record batches of the stored form, in the order of the source.

        Raises:
            DataError: A bad row (unless ``skip_bad_rows``), with its file and line.
        """

    def __iter__(self) -> Iterator[Any]:
        """The same as :meth:`batches`."""
        return self.batches()

    def _encode(
        self, columns: Columns, where: Callable[[int], str], known: Sequence[Problem] = ()
    ) -> Any:
        """Encodes a chunk; raises for its first bad row, or drops and counts the bad ones.

        ``known`` are problems the reader has found itself.
        """
        batch, found = self._encoder.encode(columns, self.split_seed)
        problems = [*known, *found]
        if not problems:
            return batch
        if not self.skip_bad_rows:
            row, problem = min(((int(p.rows[0]), p) for p in problems), key=lambda item: item[0])
            raise DataError(f"{where(row)}: {problem.describe(row)}")
        good = np.ones(columns.num_rows, dtype=bool)
        for problem in problems:
            fresh = problem.rows[good[problem.rows]]  # a row counts once, under its first reason
            if len(fresh):
                self.skipped[problem.reason] += len(fresh)
                good[fresh] = False
        return batch.take(np.flatnonzero(good))
