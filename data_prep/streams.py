"""Streams: what becomes one source of the index, and how it is cut into shards.

A stream is a source of the recipe, or a group of interleaved ones. Its documents stand in the order of their places;
those with the smallest are the validation split. Shards are ranges of places, so each can be made by itself.
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
    """One source of the index: its name, the recipe's sources in it, their runs, and whether any has a loss mask."""

    name: str
    sources: tuple[SourceRecipe, ...]
    runs: tuple[str, ...]
    masked: bool


class ShardTask(NamedTuple):
    """One shard: the documents of `stream` (its number) with low ≤ place < high. `bytes`: of their texts."""

    stream: int
    split: SplitName
    number: int
    low: int
    high: int
    bytes: int


class SizeHistogram(NamedTuple):
    """Of the kept documents of a stream: the first place of training, and bytes of text by the upper bits of places."""

    first_train_key: int
    train: np.ndarray
    validation: np.ndarray

    def key_after(self, size: int) -> int:
        """A place below which there are at least `size` bytes of training text, if there are so many."""
        bucket = int(np.searchsorted(np.cumsum(self.train), size))
        return min((bucket + 1) << int(_LOWER_BITS), _END)


def make_streams(recipe: Recipe, records: Sequence[ReadRecord]) -> list[Stream]:
    """The streams in the order of their first sources. `records`: one a source, all its items added up."""
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
    """Count a stream, cut in two: places below `share` of all are validation, and at least one is if there are two.

    Raises UserError when nothing is left to train on.
    """
    limit = int(validation_share * _END)
    first = _smallest_keys(folder, stream, dropped)
    if validation_share and len(first) > 1:
        limit = max(limit, int(first[0]) + 1)
    elif len(first) == 1:
        limit = 0
    documents = 0
    buckets = {split: np.zeros(1 << _BUCKET_BITS, np.int64) for split in SPLITS}
    for places, sizes in _remaining_rows(folder, stream, dropped):
        documents += len(places)
        held_out = places < np.uint64(limit)
        for split, chosen in (("train", ~held_out), ("validation", held_out)):
            upper = (places[chosen] >> _LOWER_BITS).astype(np.int64)
            # Weights of bincount are doubles: exact up to 2^53 bytes.
            buckets[split] += np.bincount(upper, sizes[chosen], 1 << _BUCKET_BITS).astype(np.int64)
    if not buckets["train"].any():
        raise UserError(
            f"source {stream.name!r}: {documents} distinct documents leave none to train on with a validation share of "
            f"{validation_share}. Give more documents, or remove fewer of them."
        )
    return SizeHistogram(limit, buckets["train"], buckets["validation"])


def plan_stream(number: int, histogram: SizeHistogram, shard_text_bytes: float) -> list[ShardTask]:
    """Cut stream `number` into shards of about `shard_text_bytes` of text, at edges that depend on the texts alone."""
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
    # A shard ends with the bucket in which its share of the bytes is reached.
    last = np.unique(np.searchsorted(ends, [total * part // count for part in range(1, count)]))
    edges = [min(max((int(bucket) + 1) << int(_LOWER_BITS), key_range[0]), key_range[1]) for bucket in last]
    sums = [0, *(int(ends[bucket]) for bucket in last), total]
    parts = zip([key_range[0], *edges], [*edges, key_range[1]], np.diff(sums).tolist(), strict=True)
    kept = [part for part in parts if part[2]]
    return [ShardTask(number, split, place, low, high, size) for place, (low, high, size) in enumerate(kept)]


def write_shard_plan(path: Path, tasks: Sequence[ShardTask]) -> None:
    """Write the shards to make."""
    atomic_write(path, json.dumps([task._asdict() for task in tasks]).encode())


def read_shard_plan(path: Path) -> list[ShardTask]:
    """The shards to make, stream by stream, validation first, training in stream order."""
    fields: list[dict[str, Any]] = json.loads(path.read_bytes())
    return [ShardTask(**each) for each in fields]


def _smallest_keys(folder: Path, stream: Stream, dropped: np.ndarray) -> np.ndarray:
    """The two smallest different places, or as many as there are."""
    found = np.empty(0, np.uint64)
    for places, _ in _remaining_rows(folder, stream, dropped):
        found = np.unique(np.concatenate([found, np.unique(places)[:2]]))[:2]
    return found


def _remaining_rows(folder: Path, stream: Stream, dropped: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places and bytes of text of each run's kept documents."""
    for run in stream.runs:
        rows = load_rows(folder, run)
        keep = ~find_members(dropped, rows["id"])
        yield rows["sort_key"][keep], rows["bytes"][keep]
