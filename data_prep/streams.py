"""Streams, the sources of the index, and how they are divided into shards.

A stream is a source of the recipe or a group of interleaved sources. Its documents are ordered by sort key; those with
the smallest keys are the validation split (see `data_prep/split.py`, also for a document that is divided). A shard is a
range of sort keys, so it can be built on its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.read import ReadRecord
from data_prep.recipe import Recipe
from data_prep.sorted_runs import StoredDocument
from data_prep.split import KEYS_END, LOWER_BITS, Cut, SizeHistogram, Stream
from kabrn_dist.data.index import SplitName
from kabrn_dist.utils.atomic_io import atomic_write


class ShardTask(NamedTuple):
    """One shard to build: the documents of a stream in a range of sort keys.

    Attributes:
        stream: number of the stream.
        split: train or validation.
        number: number of the shard within the split.
        low: smallest sort key.
        high: end of the range.
        bytes: bytes of their texts.
        cut: where a document is divided between the splits; None if none is.
    """

    stream: int
    split: SplitName
    number: int
    low: int
    high: int
    bytes: int
    cut: Cut | None = None

    def part_of(self, row: np.void, document: StoredDocument) -> StoredDocument:
        """Return what of a document belongs to this split: all of it, unless it is the one that is divided."""
        return document if self.cut is None else self.cut.part_of(row, document, self.split)


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


def plan_stream(number: int, histogram: SizeHistogram, shard_text_bytes: float) -> list[ShardTask]:
    """Divide stream `number` into shards of about `shard_text_bytes` of text. The edges depend only on the texts."""
    cut = histogram.cut
    validation_end = histogram.first_train_key if cut is None else cut.sort_key + 1
    tasks = [
        *_plan_split(number, "validation", (0, validation_end), histogram.validation, shard_text_bytes),
        *_plan_split(number, "train", (histogram.first_train_key, KEYS_END), histogram.train, shard_text_bytes),
    ]
    return [task._replace(cut=cut) for task in tasks]


def _plan_split(
    number: int, split: SplitName, key_range: tuple[int, int], buckets: np.ndarray, shard_text_bytes: float
) -> list[ShardTask]:
    ends = np.cumsum(buckets)
    total = int(ends[-1])
    count = max(1, round(total / shard_text_bytes))
    # A shard ends with the bucket in which it reaches its part of the bytes.
    last = np.unique(np.searchsorted(ends, [total * part // count for part in range(1, count)]))
    edges = [min(max((int(bucket) + 1) << LOWER_BITS, key_range[0]), key_range[1]) for bucket in last]
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
    return [ShardTask(**(each | {"cut": None if each["cut"] is None else Cut(*each["cut"])})) for each in fields]
