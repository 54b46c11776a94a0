"""One split's Arrow file, mapped and checked, as words of memory and where its columns begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_dp.arrow_file import ArrowFile
from dist_dp.datasets.schema import DataSchema
from dist_dp.datasets.stored import stored_schema
from dist_dp.errors import DataError


class MappedFile:
    """An Arrow file, memory-mapped; gives the word at which each buffer of a column starts."""

    def __init__(self, path: Path, schema: DataSchema, rows: int) -> None:
        remedy = "convert the source again with overwrite=True"
        try:
            file = ArrowFile(path)
            if file.schema != stored_schema(schema):
                raise DataError(f"{path}: its columns are not those of the schema; {remedy}")
            self._batches = list(file.batches())
        except ValueError as error:
            raise DataError(f"{path}: is damaged ({error}); {remedy}") from error
        self.path = path
        self._whole = file.whole
        self.first_row = np.cumsum([0] + [b.num_rows for b in self._batches]).astype(np.int64)
        if self.first_row[-1] != rows:
            raise DataError(
                f"{path}: holds {self.first_row[-1]} rows, the manifest says {rows}; {remedy}"
            )

    def words(self, dtype: Any) -> NDArray[Any]:
        """The whole file as an array of ``dtype``."""
        size = np.dtype(dtype).itemsize
        return np.frombuffer(self._whole, dtype=dtype, count=self._whole.size // size)

    def starts(self, column: str, buffer: int, itemsize: int) -> NDArray[np.int64]:
        """Per record batch: index, in words of ``itemsize`` bytes, of a buffer of a column."""
        result = []
        for batch in self._batches:
            data = batch.column(column).buffers()[buffer]
            offset = (data.address - self._whole.address) if data is not None else 0
            result.append(offset // itemsize)
        return np.array(result, dtype=np.int64)

    def list_values(self, column: str) -> NDArray[np.int64]:
        """Per record batch: how many values all lists of a column hold together."""
        return np.array([len(b.column(column).values) for b in self._batches], dtype=np.int64)

    def whole(self, column: str) -> NDArray[Any]:
        """All values of a column of numbers, copied."""
        parts = [batch.column(column).to_numpy() for batch in self._batches]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])
