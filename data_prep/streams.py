"""Streams, the sources of the index, and how they are divided into shards.

A stream is a source of the recipe or a group of interleaved sources. Its documents are ordered by sort key; those with
the smallest keys are the validation split. A shard is a range of sort keys, so it can be built on its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.read import ReadRecord
from data_prep.recipe import Recipe, SourceRecipe
from data_prep.sorted_runs import find_members, load_rows
from kabrn_dist.data.index import SPLITS, SplitName
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError

_BUCKET_BITS = 16
_LOWER_BITS = np.uint64(64 - _BUCKET_BITS)
_END = 1 << 64


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


class ShardTask(NamedTuple):
    """One shard to build: the documents of a stream in a range of sort keys.

    Attributes:
        stream: number of the stream.
        split: train or validation.
        number: number of the shard within the split.
        low: smallest sort key.
        high: end of the range.
        bytes: bytes of their texts.
    """

    stream: int
    split: SplitName
    number: int
    low: int
    high: int
    bytes: int


class SizeHistogram(NamedTuple):
    """Sizes of the documents of a stream.

    Attributes:
        first_train_key: smallest sort key of the training split.
        train: bytes of training text by the upper 16 bits of the sort key, int64 [65536].
        validation: the same for validation.
    """

    first_train_key: int
    train: np.ndarray
    validation: np.ndarray

    def key_after(self, size: int) -> int:
        """Return a sort key below which there are at least `size` bytes of training text, or the end of all keys."""
        bucket = int(np.searchsorted(np.cumsum(self.train), size))
        return min((bucket + 1) << int(_LOWER_BITS), _END)


def make_streams(recipe: Recipe, records: Sequence[ReadRecord]) -> list[Stream]:
    """Return the streams in the order of their first sources; `records` has one record per source."""
    names: dict[str, list[int]] = {}
    for number, source in enumerate(recipe.sources):
        names.setdefault(source.interleave or source.name, []).append(number)
    return [
        Stream(
            name=name,
            sources=tuple(recipe.sources[number] for number in numbers),
            runs=tuple(run for number in numbers for run in records[number].runs),
            masked=any(records[number].masked for number in numbers),
        )
        for name, numbers in names.items()
    ]


def count_sizes(folder: Path, stream: Stream, dropped: np.ndarray, validation_share: float) -> SizeHistogram:
    """Count the sizes of a stream's documents and divide it into training and validation.

    Args:
        folder: folder of the runs.
        stream: the stream.
        dropped: ids of documents to leave out, uint64, sorted.
        validation_share: fraction of all sort keys that is validation. At least one document is, if there are two.

    Raises:
        UserError: nothing is left to train on.
    """
    first_train_key = int(validation_share * _END)
    smallest = _smallest_keys(folder, stream, dropped)
    if validation_share and len(smallest) > 1:
        first_train_key = max(first_train_key, int(smallest[0]) + 1)
    elif len(smallest) == 1:
        first_train_key = 0
    documents = 0
    buckets = {split: np.zeros(1 << _BUCKET_BITS, np.int64) for split in SPLITS}
    for keys, sizes in _remaining_rows(folder, stream, dropped):
        documents += len(keys)
        held_out = keys < np.uint64(first_train_key)
        for split, in_split in (("train", ~held_out), ("validation", held_out)):
            upper = (keys[in_split] >> _LOWER_BITS).astype(np.int64)
            # The weights of bincount are fp64, exact up to 2^53 bytes.
            buckets[split] += np.bincount(upper, sizes[in_split], 1 << _BUCKET_BITS).astype(np.int64)
    if not buckets["train"].any():
        raise UserError(
            f"source {stream.name!r}: {documents} distinct documents leave none to train on with a validation share of "
            f"{validation_share}; give more documents, or remove fewer of them"
        )
    return SizeHistogram(first_train_key, buckets["train"], buckets["validation"])


def plan_stream(number: int, histogram: SizeHistogram, shard_text_bytes: float) -> list[ShardTask]:
    """Divide stream `number` into shards of about `shard_text_bytes` of text. The edges depend only on the texts."""
    return [
        *_plan_split(number, "validation", (0, histogram.first_train_key), histogram.validation, shard_text_bytes),
        *_plan_split(number, "train", (histogram.first_train_key, _END), histogram.train, shard_text_bytes),
    ]


def _plan_split(
    number: int, split: SplitName, key_range: tuple[int, int], buckets: np.ndarray, shard_text_bytes: float
) -> list[ShardTask]:
    ends = np.cumsum(buckets)
    total = int(ends[-1])
    count = max(1, round(total / shard_text_bytes))
    # A shard ends with the bucket in which it reaches its part of the bytes.
    last = np.unique(np.searchsorted(ends, [total * part // count for part in range(1, count)]))
    edges = [min(max((int(bucket) + 1) << int(_LOWER_BITS), key_range[0]), key_range[1]) for bucket in last]
    sums = [0, *(int(ends[bucket]) for bucket in last), total]
    parts = zip([key_range[0], *edges], [*edges, key_range[1]], np.diff(sums).tolist(), strict=True)
    nonempty = [part for part in parts if part[2]]
    return [ShardTask(number, split, index, low, high, size) for index, (low, high, size) in enumerate(nonempty)]


def write_shard_plan(path: Path, tasks: Sequence[ShardTask]) -> None:
    """Write the list of shards to build."""
    atomic_write(path, json.dumps([task._asdict() for task in tasks]).encode())


def read_shard_plan(path: Path) -> list[ShardTask]:
    """Read the list of shards to build: stream by stream, validation first, in the order of the sort keys."""
    fields: list[dict[str, Any]] = json.loads(path.read_bytes())
    return [ShardTask(**each) for each in fields]


def _smallest_keys(folder: Path, stream: Stream, dropped: np.ndarray) -> np.ndarray:
    """Return the two smallest different sort keys, or as many as there are."""
    smallest = np.empty(0, np.uint64)
    for keys, _ in _remaining_rows(folder, stream, dropped):
        smallest = np.unique(np.concatenate([smallest, np.unique(keys)[:2]]))[:2]
    return smallest


def _remaining_rows(folder: Path, stream: Stream, dropped: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the sort keys and text sizes of the documents of each run that are not dropped."""
    for run in stream.runs:
        rows = load_rows(folder, run)
        remaining = ~find_members(dropped, rows["id"])
        yield rows["sort_key"][remaining], rows["bytes"][remaining]
