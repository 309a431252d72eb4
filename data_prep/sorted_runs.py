"""Runs: clean documents on disk, sorted, between reading and sharding.

`NAME.texts` holds documents one after another, each as its spans and its marks (pairs of little-endian int64: bytes of
the text), its name and its text (UTF-8). `NAME.npy` has one row per document, in the order of the shards, and
`NAME.keys.npy` the near-duplicate keys of the rows, uint64 [documents, bands], if near duplicates are dropped.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.documents import Document, Span
from kabrn_dist.utils.atomic_io import atomic_open

# The document that reaches this size ends a run. A worker holds about twice as many bytes of documents.
RUN_BYTES = 32 << 20
_OPEN_FILES = 128

# `sort_key`: order of the shards, the first 16 bytes of a sha256 as two big-endian numbers; `text_hash`: the same of
# the text; `id`: task and number of the document in it, so ids rise in the order of reading; `spans`, `marks`: −1 for
# none.
ROW = np.dtype(
    [
        ("sort_key", "<u8"),
        ("sort_key_low", "<u8"),
        ("text_hash", "<u8"),
        ("text_hash_low", "<u8"),
        ("id", "<u8"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
        ("name_bytes", "<u4"),
        ("spans", "<i4"),
        ("marks", "<i4"),
    ]
)


class StoredDocument(NamedTuple):
    """A document as a run holds it.

    Attributes:
        id: see `document_id`.
        name: its origin.
        text: UTF-8.
        spans: bytes of the text that carry loss, int64 [n, 2]; None: all.
        marks: bytes of each special token of a conversation, int64 [n, 2]; None: no conversation.
    """

    id: int
    name: str
    text: bytes
    spans: np.ndarray | None
    marks: np.ndarray | None = None


def document_id(task: int, number: int) -> int:
    """Return the id of the document `number` of a reading task; ids rise in the order of reading."""
    return (task << 32) | number


def sort_key(content: bytes) -> tuple[int, int]:
    """Return the first 16 bytes of the sha256 of `content` as two numbers that sort as the bytes do."""
    digest = hashlib.sha256(content).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


class RunWriter:
    """Collects the documents of one reading task and writes them as the runs `NAME-00`, `NAME-01`, ….

    Args:
        folder: folder of the runs.
        name: beginning of their names.
        texts: whether to store the texts; without them the rows can only be counted.

    Attributes:
        names: the runs written so far.
    """

    def __init__(self, folder: Path, name: str, texts: bool = True) -> None:
        self.names: list[str] = []
        self._folder, self._name, self._texts = folder, name, texts
        self._records: list[bytes] = []
        self._rows: list[tuple[int, ...]] = []
        self._keys: list[np.ndarray] = []
        self._bytes = 0

    def add(self, id: int, document: Document, text: bytes, keys: np.ndarray | None) -> None:
        """Add one document, and write a run if it is full.

        Args:
            id: see `document_id`.
            document: the document.
            text: its text as UTF-8.
            keys: its near-duplicate keys, uint64 [bands]; None if near duplicates are kept.

        Raises:
            UserError: the disk refuses.
        """
        text_key = sort_key(text)
        key = text_key if document.key is None else sort_key(document.key.encode())
        text_hash = text_key
        if document.stretch:
            # Stretches are no duplicates of others of the same text, only of those at the same place of its copies.
            place = document.name.rpartition(" ")[2].encode()
            text_hash = sort_key(place + text)
            keys = None if keys is None else keys ^ np.uint64(sort_key(place)[0])
        spans, num_spans = _pack_spans(document.text, document.spans)
        marks, num_marks = _pack_spans(document.text, document.marks)
        name = document.name.encode("utf-8", "replace")
        size = len(spans) + len(marks) + len(name) + len(text)
        self._rows.append((*key, *text_hash, id, size, len(text), len(name), num_spans, num_marks))
        if self._texts:
            self._records.append(spans + marks + name + text)
            self._bytes += size
        if keys is not None:
            self._keys.append(keys)
        if self._bytes >= RUN_BYTES or len(self._rows) * ROW.itemsize >= RUN_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the documents collected so far as a run.

        Raises:
            UserError: the disk refuses.
        """
        if not self._rows:
            return
        name = f"{self._name}-{len(self.names):02d}"
        rows = np.array(self._rows, ROW)
        order = np.lexsort((rows["id"], rows["sort_key_low"], rows["sort_key"]))
        rows = rows[order]
        # Until here the column holds sizes.
        rows["offset"] = np.cumsum(rows["offset"]) - rows["offset"]
        if self._texts:
            with atomic_open(self._folder / f"{name}.texts") as file:
                file.writelines(self._records[index] for index in order)
        if self._keys:
            _write_array(self._folder / f"{name}.keys.npy", np.stack(self._keys)[order])
        _write_array(self._folder / f"{name}.npy", rows)
        self.names.append(name)
        self._records, self._rows, self._keys, self._bytes = [], [], [], 0


class RunReader:
    """Reads documents of runs by their rows. Not thread-safe. It keeps up to 128 files open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, run: str, row: np.void) -> StoredDocument:
        """Return the document of one row of `run`."""
        spans, marks = (max(int(row[name]), 0) * 16 for name in ("spans", "marks"))
        pairs, name = spans + marks, int(row["name_bytes"])
        size = pairs + name + int(row["bytes"])
        content = _pread(self._file(run), size, int(row["offset"]))
        return StoredDocument(
            id=int(row["id"]),
            name=content[pairs : pairs + name].decode(),
            text=content[pairs + name :],
            spans=None if row["spans"] < 0 else np.frombuffer(content[:spans], "<i8").reshape(-1, 2),
            marks=None if row["marks"] < 0 else np.frombuffer(content[spans:pairs], "<i8").reshape(-1, 2),
        )

    def close(self) -> None:
        """Close the files. Reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, run: str) -> int:
        if run not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[run] = os.open(self._folder / f"{run}.texts", os.O_RDONLY)
        self._files.move_to_end(run)
        return self._files[run]


def load_rows(folder: Path, run: str) -> np.ndarray:
    """Map the rows of a run into memory, ROW [documents]."""
    return np.load(folder / f"{run}.npy", mmap_mode="r")


def load_band_keys(folder: Path, run: str) -> np.ndarray:
    """Map the near-duplicate keys of a run's rows into memory, uint64 [documents, bands]."""
    return np.load(folder / f"{run}.keys.npy", mmap_mode="r")


def select_range(rows: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return the rows with low ≤ sort key < high (high ≤ 2^64); `rows` are sorted."""
    keys = rows["sort_key"]
    start = int(np.searchsorted(keys, np.uint64(low)))
    stop = len(rows) if high >= 1 << 64 else int(np.searchsorted(keys, np.uint64(high)))
    return rows[start:stop]


def merge_sorted(
    folder: Path, runs: Sequence[str], low: int, high: int, dropped: np.ndarray
) -> Iterator[tuple[str, np.void]]:
    """Merge the rows of several runs in a range of sort keys. The rows are held in memory, the texts are not.

    Args:
        folder: folder of the runs.
        runs: names of the runs.
        low: smallest sort key.
        high: end of the range, at most 2^64.
        dropped: ids to leave out, uint64, sorted.

    Yields:
        (run, row) in the order of the sort keys.
    """
    parts = [np.array(select_range(load_rows(folder, run), low, high)) for run in runs]
    rows = np.concatenate(parts) if parts else np.empty(0, ROW)
    of_run = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    remaining = ~find_members(dropped, rows["id"])
    rows, of_run = rows[remaining], of_run[remaining]
    for index in np.lexsort((rows["id"], rows["sort_key_low"], rows["sort_key"])):
        yield runs[of_run[index]], rows[index]


def find_members(sorted_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return which of `ids` are in `sorted_ids`, bool [ids]; both are uint64."""
    if not len(sorted_ids):
        return np.zeros(len(ids), bool)
    positions = np.searchsorted(sorted_ids, ids)
    return np.asarray(sorted_ids[np.minimum(positions, len(sorted_ids) - 1)] == ids)


def _pack_spans(text: str | None, spans: tuple[Span, ...] | None) -> tuple[bytes, int]:
    if spans is None:
        return b"", -1
    assert text is not None
    # Characters become bytes: the cumulative sizes of the pieces between the edges.
    edges = [edge for span in spans for edge in span]
    pieces = [len(text[a:b].encode()) for a, b in zip([0, *edges], edges, strict=False)]
    return np.cumsum(np.array(pieces, "<i8")).astype("<i8").tobytes(), len(spans)


def _write_array(path: Path, array: np.ndarray) -> None:
    with atomic_open(path) as file:
        np.save(file, array, allow_pickle=False)


def _pread(file: int, size: int, offset: int) -> bytes:
    content = os.pread(file, size, offset)
    # A call reads at most 2 GiB.
    while len(content) < size:
        block = os.pread(file, size - len(content), offset + len(content))
        if not block:
            raise EOFError(f"a run ends at byte {offset + len(content)}, not at {offset + size}")
        content += block
    return content
