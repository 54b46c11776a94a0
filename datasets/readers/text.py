"""Delimited text in chunks: parsed vectorised, with exact line numbers when something is wrong.

A chunk of whole lines goes through Arrow's CSV parser at once. Only when that refuses the chunk
are its lines looked at one by one, to name the culprit or to leave it out.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from dist_dp.datasets.readers.spans import Span
from dist_dp.errors import DataError

MAX_LINE_BYTES = 16 << 20

# What Arrow's parser takes for a number; inf and nan are left to the check for finite values.
_NUMBER = r"(?i)^\s*[+-]?(\d+\.?\d*(e[+-]?\d+)?|\.\d+(e[+-]?\d+)?|nan|inf(inity)?)\s*$"


@dataclass
class TextChunk:
    """Whole lines of one file.

    Attributes:
        path: The file.
        lines: The lines, without their ends.
        numbers: Line number of each, from 1.
        position: Bytes of the file (as it lies on disk) consumed up to here.
    """

    path: Path
    lines: list[bytes]
    numbers: NDArray[np.int64]
    position: int

    def where(self, row: int) -> str:
        """``FILE:LINE`` of a row of this chunk."""
        return f"{self.path}:{self.numbers[row]}"


def first_line(path: Path) -> bytes:
    """The first line of a file (at most 64 KiB of it); an empty file is an error."""
    with _OpenText(path) as (stream, _):
        try:
            line = stream.readline(1 << 16)
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(path, error) from error
    if not line:
        raise DataError(f"{path}: the file is empty; check that it was written completely")
    return line.rstrip(b"\r\n")


def read_chunks(
    path: Path,
    chunk_bytes: int,
    separator: bytes = b"\t",
    span: Span | None = None,
    first_number: int = 1,
) -> Iterator[TextChunk]:
    """Reads a text file (plain or ``.gz``) in chunks of whole lines.

    Args:
        path: The file.
        chunk_bytes: Bytes to read at a time.
        separator: Field separator; replaced by a tab when it is another one.
        span: The part to read, of those that :func:`text_spans` gives; None for the whole file.
        first_number: Number of the first line read.

    Raises:
        DataError: The file is empty or cannot be read or decompressed.
    """
    next_number = first_number
    rest = b""
    position, stop = (0, None) if span is None else (span.start, span.end)
    with _OpenText(path) as (stream, raw):
        if position:
            raw.seek(position)
        while True:
            # Blocks end at multiples of their size, so that chunks do not depend on the span.
            size = chunk_bytes - position % chunk_bytes
            try:
                block = stream.read(size if stop is None else min(size, stop - position))
            except (OSError, EOFError, zlib.error) as error:
                raise _unreadable(path, error) from error
            position += len(block)
            data = rest + block
            if not data:
                break
            end = data.rfind(b"\n") + 1 if block else len(data)
            rest = data[end:]
            if end == 0:
                if len(rest) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{next_number}: the line is longer than "
                        f"{MAX_LINE_BYTES >> 20} MiB; this is not a text file of records"
                    )
                continue
            data = data[:end]
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n")
            if separator != b"\t":
                data = data.replace(separator, b"\t")
            lines = data.split(b"\n")
            if data.endswith(b"\n"):
                lines.pop()
            numbers = np.arange(next_number, next_number + len(lines))
            next_number += len(lines)
            yield TextChunk(path, lines, numbers, raw.tell())
    if next_number == 1 and position == 0:
        raise DataError(f"{path}: the file is empty; check that it was written completely")


def parse_chunk(
    chunk: TextChunk,
    names: Sequence[str],
    numeric: Sequence[str],
    wanted: Sequence[str],
    skipped: Counter[str] | None,
) -> Any:
    """Parses the tab-separated lines of a chunk.

    Args:
        chunk: The lines; bad ones are taken out of it when they are to be skipped.
        names: Names of all fields of a line, in order.
        numeric: Fields to read as float64 (empty: null); the others become
            dictionary-encoded bytes (empty: the empty token).
        wanted: Fields to return.
        skipped: Where to count bad lines by reason, or None to raise for the first one.

    Returns:
        An Arrow table of the wanted fields, one row for each line left in ``chunk``.

    Raises:
        DataError: A line has a wrong number of fields or a field that is no number.
    """
    text = pa.dictionary(pa.int32(), pa.binary())
    types = {name: pa.float64() if name in numeric else text for name in wanted}
    # Every numeric field is checked, whichever are wanted.
    types |= {name: pa.float64() for name in numeric}
    table = _try_parse(chunk.lines, names, types)
    if isinstance(table, str):
        bad = _bad_lines(chunk, names, numeric)
        if bad and skipped is None:
            row, (_, message) = min(bad.items())
            raise DataError(f"{chunk.where(row)}: {message}")
        skipped = Counter() if skipped is None else skipped
        skipped.update(reason for reason, _ in bad.values())
        chunk.lines = [line for row, line in enumerate(chunk.lines) if row not in bad]
        chunk.numbers = np.delete(chunk.numbers, sorted(bad))
        table = _try_parse(chunk.lines, names, types)
        if isinstance(table, str):
            raise DataError(
                f"{chunk.where(0)} to line {chunk.numbers[-1]}: cannot be parsed: {table}"
            )
    return table.select(list(wanted))


def _try_parse(lines: list[bytes], names: Sequence[str], types: dict[str, Any]) -> Any:
    """The table, or the parser's complaint as a string."""
    if not lines:
        return pa.table({name: pa.array([], kind) for name, kind in types.items()})
    data = b"\n".join(lines) + b"\n"
    try:
        table = pacsv.read_csv(
            pa.BufferReader(data),
            read_options=pacsv.ReadOptions(
                column_names=list(names), use_threads=False, block_size=len(data) + 1
            ),
            parse_options=pacsv.ParseOptions(
                delimiter="\t", quote_char=False, ignore_empty_lines=True
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=types,
                include_columns=list(types),
                null_values=[""],
                strings_can_be_null=False,
                check_utf8=False,
            ),
        )
    except pa.ArrowInvalid as error:
        return str(error)
    if table.num_rows != len(lines):  # an empty line, or a lone carriage return
        return f"{table.num_rows} rows in {len(lines)} lines"
    return table


def _bad_lines(
    chunk: TextChunk, names: Sequence[str], numeric: Sequence[str]
) -> dict[int, tuple[str, str]]:
    """Row of each bad line with its reason and message."""
    bad: dict[int, tuple[str, str]] = {}
    whole: list[int] = []
    for row, line in enumerate(chunk.lines):
        fields = line.count(b"\t") + 1
        if b"\r" in line:
            bad[row] = ("carriage return", "a carriage return stands inside the line; remove it")
        elif not line:
            bad[row] = ("empty line", f"the line is empty; {len(names)} fields belong here")
        elif fields != len(names):
            bad[row] = (
                "wrong number of fields",
                f"{fields} fields where {len(names)} belong ({names[0]} to {names[-1]}, "
                "separated by tabs); complete the line or remove it",
            )
        else:
            whole.append(row)
    everything = {name: pa.binary() for name in names}
    table = _try_parse([chunk.lines[row] for row in whole], names, everything)
    if isinstance(table, str):
        return bad
    rows = np.array(whole, dtype=np.int64)
    for name in numeric:
        values = table.column(name).combine_chunks()
        text = pa.array([v.decode("latin-1") for v in values.to_pylist()], pa.string())
        wrong = pc.invert(pc.or_(pc.match_substring_regex(text, _NUMBER), pc.equal(text, "")))
        for i in np.flatnonzero(wrong.to_numpy(zero_copy_only=False)):
            message = f"{name} is {text[int(i)].as_py()!r}, not a number; correct it"
            bad.setdefault(int(rows[i]), (f"{name} is not a number", message))
    return bad


class _OpenText:
    """Opens plain or gzip text; gives the stream and the file whose position is on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tuple[BinaryIO, BinaryIO]:
        try:
            self._raw: BinaryIO = self._path.open("rb")
        except OSError as error:
            raise _unreadable(self._path, error) from error
        if self._path.suffix == ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=self._raw)), self._raw
        return self._raw, self._raw

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read ({error}); check the file, or fetch it again")
