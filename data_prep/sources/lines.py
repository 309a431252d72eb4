"""Iterate over the lines of a stream with their offsets, and divide files between lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from kabrn_dist.utils.safe_open import open_regular

MAX_LINE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 16


def iterate_lines(
    file: BinaryIO, start: int = 0, stop: int = -1, limit: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes | int]]:
    """Yield (offset, line with its line end) of the lines that begin in [start, stop).

    Args:
        file: a stream, positioned at `start`.
        start: offset of the first line.
        stop: end of the range; −1: to the end of the file.
        limit: a line above this number of bytes is skipped and its size yielded instead, to bound the memory.
    """
    offset = start
    while stop < 0 or offset < stop:
        line = file.readline(limit + 1)
        if not line:
            return
        begin, offset = offset, offset + len(line)
        if len(line) <= limit:
            yield begin, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(limit)
            offset += len(line)
        yield begin, offset - begin


def find_cuts(path: Path, size: int, unit_bytes: int, boundary: bytes = b"\n") -> list[tuple[int, int]]:
    """Return ranges [start, stop) of about `unit_bytes` that cover a file, each ending right after a `boundary`.

    The file is only read from each approximate cut to the next boundary.
    """
    edges = [0]
    with cast(BinaryIO, open_regular(path)) as file:
        while edges[-1] + unit_bytes < size:
            edge = _find_after(file, edges[-1] + unit_bytes, boundary)
            if edge is None or edge >= size:
                break
            edges.append(edge)
    return list(zip(edges, [*edges[1:], size], strict=True))


def _find_after(file: BinaryIO, offset: int, boundary: bytes) -> int | None:
    # Blocks overlap by one byte less than the length of the boundary, which may lie across two blocks.
    position = max(0, offset - len(boundary))
    file.seek(position)
    window = b""
    while block := file.read(_BLOCK_BYTES):
        window += block
        hit = window.find(boundary)
        if hit >= 0:
            return position + hit + len(boundary)
        keep = len(boundary) - 1
        position += len(window) - keep
        window = window[len(window) - keep :]
    return None
