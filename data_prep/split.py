"""Divide the documents of a stream into training and validation.

Documents are held out by their sort key, a hash of the text: those whose key is below `validation_share` of all keys.
Where few or unlike documents make that far from the wanted share of bytes, whole documents are held out in the order
of their keys as long as they fit, and of the next one its last stretch. Only documents with loss masks and parallel
texts are never divided. All depends on the texts alone, so any number of workers makes the same split.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.recipe import SourceRecipe
from data_prep.sorted_runs import RunReader, StoredDocument, find_members, load_rows, merge_sorted
from kabrn_dist.data.index import SPLITS, SplitName
from kabrn_dist.utils.errors import UserError

LOWER_BITS = 48
KEYS_END = 1 << 64

_BUCKETS = 1 << (64 - LOWER_BITS)
# The share of bytes that is held out may differ from the wanted one by this factor.
_TOLERANCE = 2.0
# A shorter stretch, in bytes, is no text to validate on.
_MIN_STRETCH = 64


class Stream(NamedTuple):
    """One source of the index.

    Attributes:
        name: its name.
        sources: the recipe's sources in it.
        runs: names of their runs.
        masked: whether any of their documents has a loss mask.
    """

    name: str
    sources: tuple[SourceRecipe, ...]
    runs: tuple[str, ...]
    masked: bool

    @property
    def keeps_whole(self) -> bool:
        """Whether training keeps its documents whole in a sequence."""
        return any(source.keeps_whole for source in self.sources)

    @property
    def divisible(self) -> bool:
        """Whether its documents may be divided: not questions from their answers, nor one of two parallel texts."""
        return not self.masked and self.sources[0].interleave is None


class Cut(NamedTuple):
    """Where a document is divided: its text from `offset` on is validation.

    Attributes:
        sort_key: sort key of the document, and of others with the same text.
        offset: first byte that is held out.
    """

    sort_key: int
    offset: int

    def part_of(self, row: np.void, document: StoredDocument, split: SplitName) -> StoredDocument:
        """Return what of a document belongs to a split: all of it, unless it is the one that is divided."""
        if int(row["sort_key"]) != self.sort_key:
            return document
        part = slice(self.offset, None) if split == "validation" else slice(self.offset)
        return document._replace(text=document.text[part])


class SizeHistogram(NamedTuple):
    """Sizes of the documents of a stream, and how they are divided.

    Attributes:
        first_train_key: smallest sort key of the training split.
        train: bytes of training text by the upper 16 bits of the sort key, int64 [65536].
        validation: the same for validation.
        cut: where the first training document is divided; None if it is not.
    """

    first_train_key: int
    train: np.ndarray
    validation: np.ndarray
    cut: Cut | None = None

    @property
    def validation_share(self) -> float:
        """Share of the bytes that is held out."""
        held_out = int(self.validation.sum())
        return held_out / (held_out + int(self.train.sum()))

    def key_after(self, size: int) -> int:
        """Return a sort key below which there are at least `size` bytes of training text, or the end of all keys."""
        bucket = int(np.searchsorted(np.cumsum(self.train), size))
        return min((bucket + 1) << LOWER_BITS, KEYS_END)


def divide_stream(folder: Path, stream: Stream, dropped: np.ndarray, validation_share: float) -> SizeHistogram:
    """Count the sizes of a stream's documents and divide it into training and validation.

    Args:
        folder: folder of the runs.
        stream: the stream.
        dropped: ids of documents to leave out, uint64, sorted.
        validation_share: fraction to hold out.

    Raises:
        UserError: nothing is left to train on.
    """
    histogram = _divide_at(folder, stream, dropped, int(validation_share * KEYS_END))
    total = int(histogram.train.sum() + histogram.validation.sum())
    if not total:
        raise UserError(
            f"source {stream.name!r}: 0 distinct documents leave none to train on with a validation share of "
            f"{validation_share}; give more documents, or remove fewer of them"
        )
    if _is_near(histogram.validation_share, validation_share):
        return histogram
    return _divide_by_bytes(folder, stream, dropped, histogram, validation_share * total)


def describe_split(stream: Stream, histogram: SizeHistogram, validation_share: float) -> str:
    """Return a line about a split that is not what one would expect, or ""."""
    share = histogram.validation_share
    if histogram.cut is not None:
        return (
            f"{stream.name}: too few documents to hold out {validation_share:.3g} of the text as whole documents; "
            f"{int(histogram.validation.sum()):,} bytes are held out, among them the last stretch of one document"
        )
    if _is_near(share, validation_share):
        return ""
    return (
        f"warning: source {stream.name!r}: {share:.3g} of the text is held out for validation, not "
        f"{validation_share:.3g}, since its few documents cannot be divided; give more documents, or another "
        "validation_share"
    )


def _is_near(share: float, wanted: float) -> bool:
    """Return whether a share is near the wanted one, and so is what remains of 1."""
    pairs = ((share, wanted), (1 - share, 1 - wanted))
    return all(wanted / _TOLERANCE <= share <= wanted * _TOLERANCE for share, wanted in pairs)


def _divide_at(folder: Path, stream: Stream, dropped: np.ndarray, first_train_key: int) -> SizeHistogram:
    buckets = {split: np.zeros(_BUCKETS, np.int64) for split in SPLITS}
    for keys, sizes in _remaining_rows(folder, stream, dropped):
        held_out = keys < np.uint64(first_train_key) if first_train_key < KEYS_END else np.ones(len(keys), bool)
        for split, in_split in (("train", ~held_out), ("validation", held_out)):
            upper = (keys[in_split] >> np.uint64(LOWER_BITS)).astype(np.int64)
            # The weights of bincount are fp64, exact up to 2^53 bytes.
            buckets[split] += np.bincount(upper, sizes[in_split], _BUCKETS).astype(np.int64)
    return SizeHistogram(first_train_key, buckets["train"], buckets["validation"])


def _divide_by_bytes(
    folder: Path, stream: Stream, dropped: np.ndarray, histogram: SizeHistogram, wanted: float
) -> SizeHistogram:
    """Hold out about `wanted` bytes: whole documents while they fit, and the last stretch of the next one."""
    ends = np.cumsum(histogram.train + histogram.validation)
    bucket = int(np.searchsorted(ends, wanted, side="right"))
    held_out = int(ends[bucket - 1]) if bucket else 0
    low, high = bucket << LOWER_BITS, (bucket + 1) << LOWER_BITS
    groups = _group_sizes(folder, stream, dropped, low, high)
    key, size = next(groups)
    while held_out + size <= wanted:
        held_out += size
        key, size = next(groups)
    cut = _find_cut(folder, stream, dropped, key, (wanted - held_out) / size) if stream.divisible else None
    if cut is not None:
        divided = _divide_at(folder, stream, dropped, key)
        return _move_stretch(folder, stream, dropped, divided._replace(cut=cut))
    # The document belongs to the split that comes nearer to the wanted size, as long as each split has one.
    whole = held_out + size - wanted < wanted - held_out or not held_out
    if held_out + size == int(ends[-1]):
        whole = False
    return _divide_at(folder, stream, dropped, key + 1 if whole else key)


def _group_sizes(folder: Path, stream: Stream, dropped: np.ndarray, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Yield (sort key, bytes of all documents with it) in a range of keys, in order."""
    sizes: dict[int, int] = {}
    for _, row in merge_sorted(folder, stream.runs, low, high, dropped):
        sizes[int(row["sort_key"])] = sizes.get(int(row["sort_key"]), 0) + int(row["bytes"])
    yield from sizes.items()


def _find_cut(folder: Path, stream: Stream, dropped: np.ndarray, key: int, share: float) -> Cut | None:
    """Return where to divide the document of a key so that about `share` of it is held out; None if it is too short."""
    reader = RunReader(folder)
    run, row = next(merge_sorted(folder, stream.runs, key, key + 1, dropped))
    text = reader.read(run, row).text
    reader.close()
    stretch = round(len(text) * share)
    if stretch < _MIN_STRETCH:
        return None
    earliest = len(text) - stretch
    # Within the first quarter of the stretch: after a line, else after a word, else between characters.
    latest = earliest + stretch // 4
    for boundary in (b"\n", b" "):
        found = text.find(boundary, earliest, latest)
        if found >= 0:
            return Cut(key, found + 1)
    while earliest < len(text) and text[earliest] & 0xC0 == 0x80:
        earliest += 1
    return Cut(key, earliest) if 0 < earliest < len(text) else None


def _move_stretch(folder: Path, stream: Stream, dropped: np.ndarray, histogram: SizeHistogram) -> SizeHistogram:
    assert histogram.cut is not None
    key, offset = histogram.cut
    for _, row in merge_sorted(folder, stream.runs, key, key + 1, dropped):
        stretch = int(row["bytes"]) - offset
        histogram.train[key >> LOWER_BITS] -= stretch
        histogram.validation[key >> LOWER_BITS] += stretch
    return histogram


def _remaining_rows(folder: Path, stream: Stream, dropped: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the sort keys and text sizes of the documents of each run that are not dropped."""
    for run in stream.runs:
        rows = load_rows(folder, run)
        remaining = ~find_members(dropped, rows["id"])
        yield rows["sort_key"][remaining], rows["bytes"][remaining]
