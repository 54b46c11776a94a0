"""Arrow files, mapped and checked: no batch claims more rows than its bytes hold.

Arrow trusts what a file says about its batches: a length is taken as it stands, and reading beyond
a buffer's end would be a crash at best. So each batch is validated before any value of it is used,
and compressed ones are refused, whose size is not that of the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from dist_dp.limits import open_regular


class ArrowFile:
    """An Arrow IPC file, memory-mapped.

    Attributes:
        whole: The file as one buffer.
        schema: Its columns.

    Args:
        path: The file.

    Raises:
        ValueError: It is no such file, or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            os.close(open_regular(path))  # mapping a pipe would wait for who writes to it
            self.whole = pa.memory_map(str(path), "r").read_buffer()
            self._reader = pa.ipc.open_file(pa.BufferReader(self.whole))
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise ValueError(_said(error)) from None
        self.schema = self._reader.schema

    def batches(self, *, full: bool = False) -> Iterator[Any]:
        """The record batches, one after the other, each checked.

        Args:
            full: Check the offsets of lists too, which reads them all.

        Raises:
            ValueError: One is damaged, or claims more than it holds.
        """
        for number in range(self._reader.num_record_batches):
            try:
                batch = self._reader.get_batch(number)
                batch.validate(full=full)
            except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
                raise ValueError(f"record batch {number}: {_said(error)}") from None
            self._check_mapped(number, batch)
            yield batch

    def _check_mapped(self, number: int, batch: Any) -> None:
        first, last = self.whole.address, self.whole.address + self.whole.size
        for column in batch.columns:
            for data in column.buffers():
                if data is None or data.size == 0:
                    continue
                if not first <= data.address <= data.address + data.size <= last:
                    raise ValueError(f"record batch {number}: it is compressed")


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
