"""Parts of a source that can be read on their own, and where text may be cut."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dist_dp.errors import DataError


@dataclass(frozen=True)
class Span:
    """A part of a source.

    Attributes:
        file: The file that holds it.
        start: Its first byte, at the start of a line.
        end: The byte after its last one; None for the end of the file.
    """

    file: str
    start: int = 0
    end: int | None = None


def text_spans(path: Path, size: int, chunk_bytes: int) -> list[Span]:
    """Cuts a text file after the last line end before every multiple of a size.

    Args:
        path: The file; a ``.gz`` one, which can only be read from its start, is one span.
        size: Bytes of a span, about; rounded to chunks, so that the spans' chunks are the file's.
        chunk_bytes: Bytes read at a time (:func:`dist_dp.datasets.readers.text.read_chunks`).

    Raises:
        DataError: The file cannot be read.
    """
    if path.suffix == ".gz":
        return [Span(str(path))]
    size = max(1, round(size / chunk_bytes)) * chunk_bytes
    cuts = [0]
    try:
        with path.open("rb") as stream:
            total = stream.seek(0, io.SEEK_END)
            for wanted in range(size, total, size):
                cut = _line_start(stream, cuts[-1], wanted)
                if cuts[-1] < cut < total:
                    cuts.append(cut)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file") from error
    ends = [*cuts[1:], None]
    return [Span(str(path), start, end) for start, end in zip(cuts, ends, strict=True)]


def lines_before(span: Span) -> int:
    """Lines of the file before a span; reads all of them."""
    count, left = 0, span.start
    with Path(span.file).open("rb") as stream:
        while left and (block := stream.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _line_start(stream: BinaryIO, lowest: int, highest: int) -> int:
    """The byte after the last line end in [lowest, highest), or ``lowest``."""
    position = highest
    while position > lowest:
        begin = max(lowest, position - (1 << 16))
        stream.seek(begin)
        found = stream.read(position - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        position = begin
    return lowest
