"""Lines of a stream with their places, and the places where a file may be cut between lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_LINE_BYTES = 64 << 20
_LOOK_BYTES = 1 << 16


def iterate_lines(
    file: BinaryIO, start: int = 0, stop: int = -1, limit: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes | None]]:
    """Yield (offset, line with its line end) of the lines that begin in [start, stop); `file` stands at `start`.

    `stop` -1 reads to the end. A line above `limit` bytes is skipped and given as None: memory holds one line.
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
        yield begin, None


def find_cuts(path: Path, size: int, unit_bytes: int, boundary: bytes = b"\n") -> list[tuple[int, int]]:
    """Return ranges [start, stop) of about `unit_bytes` that cover `path`, each cut right after a `boundary`.

    Reads only from each cut to the next boundary.
    """
    edges = [0]
    with path.open("rb", buffering=0) as file:
        while edges[-1] + unit_bytes < size:
            edge = _after(file, edges[-1] + unit_bytes, boundary)
            if edge is None or edge >= size:
                break
            edges.append(edge)
    return list(zip(edges, [*edges[1:], size], strict=True))


def _after(file: BinaryIO, place: int, boundary: bytes) -> int | None:
    # Blocks overlap by one byte less than the boundary is long: it may lie across two.
    at = max(0, place - len(boundary))
    file.seek(at)
    window = b""
    while block := file.read(_LOOK_BYTES):
        window += block
        hit = window.find(boundary)
        if hit >= 0:
            return at + hit + len(boundary)
        keep = len(boundary) - 1
        at += len(window) - keep
        window = window[len(window) - keep :]
    return None
