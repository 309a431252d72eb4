"""Stages 2 and 3: find exact and near duplicates. Each task compares the documents in a range of hashes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.clean.minhash import BANDS, find_later_ids
from data_prep.sorted_runs import find_members, load_band_keys, load_rows
from kabrn_dist.utils.atomic_io import atomic_open

# Approximate number of rows that one task sorts: 24 bytes each, and as much again for sorting.
_ROWS_PER_RANGE = 1 << 20
_NAME = "{kind}-{number:05d}.npy"


class HashRange(NamedTuple):
    """One task: a range of hashes.

    Attributes:
        number: number of the task within its stage.
        band: which near-duplicate key is compared; −1: the hash of the text.
        low: smallest hash.
        high: end of the range, at most 2^64.
    """

    number: int
    band: int
    low: int
    high: int


def make_hash_ranges(stage: str, documents: int) -> list[HashRange]:
    """Return the tasks of stage "exact" (hashes of texts) or "near" (near-duplicate keys) for a number of documents."""
    bands = BANDS if stage == "near" else 0
    count = 1 + documents // _ROWS_PER_RANGE
    edges = [(part << 64) // count for part in range(count + 1)]
    return [
        HashRange(band * count + part, band if bands else -1, edges[part], edges[part + 1])
        for band in range(max(bands, 1))
        for part in range(count)
    ]


def find_exact_duplicates(
    run_folder: Path, run_names: Sequence[str], pairs_folder: Path, hash_range: HashRange
) -> None:
    """Write the pairs of documents in a range that have the same text, uint64 [n, 2]: id of the first, of another.

    A file that an earlier run wrote is kept.
    """
    if pairs_path(pairs_folder, "exact", hash_range).exists():
        return
    parts = []
    for name in run_names:
        rows = load_rows(run_folder, name)
        rows = rows[_in_range(rows["text_hash"], hash_range)]
        parts.append(np.stack([rows["text_hash"], rows["text_hash_low"], rows["id"]]))
    high, low, ids = np.concatenate(parts, axis=1)
    order = np.lexsort((ids, low, high))
    high, low, ids = high[order], low[order], ids[order]
    _write(pairs_folder, "exact", hash_range, _pairs(ids, (high[1:] == high[:-1]) & (low[1:] == low[:-1])))


def find_near_duplicates(
    run_folder: Path, run_names: Sequence[str], dropped: np.ndarray, pairs_folder: Path, hash_range: HashRange
) -> None:
    """Write the pairs of documents that share a near-duplicate key in a range, uint64 [n, 2]: ids of first and other.

    Args:
        run_folder: folder of the runs.
        run_names: runs to compare.
        dropped: ids of documents to leave out, uint64, sorted.
        pairs_folder: folder for the file, which is kept if an earlier run wrote it.
        hash_range: the task.
    """
    if pairs_path(pairs_folder, "near", hash_range).exists():
        return
    parts = []
    for name in run_names:
        keys, ids = load_band_keys(run_folder, name)[:, hash_range.band], load_rows(run_folder, name)["id"]
        in_range = _in_range(keys, hash_range)
        parts.append(np.stack([keys[in_range], ids[in_range]]))
    keys, ids = np.concatenate(parts, axis=1)
    remaining = ~find_members(dropped, ids)
    keys, ids = keys[remaining], ids[remaining]
    order = np.lexsort((ids, keys))
    keys, ids = keys[order], ids[order]
    _write(pairs_folder, "near", hash_range, _pairs(ids, keys[1:] == keys[:-1]))


def read_pairs(pairs_folder: Path, stage: str, hash_ranges: Sequence[HashRange]) -> np.ndarray:
    """Return the pairs that all tasks of a stage found, uint64 [n, 2]."""
    parts = [np.load(pairs_path(pairs_folder, stage, task)) for task in hash_ranges]
    return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)


def pairs_path(pairs_folder: Path, stage: str, hash_range: HashRange) -> Path:
    """Return the file of a task's pairs."""
    return pairs_folder / _NAME.format(kind=stage, number=hash_range.number)


def find_dropped_ids(pairs: np.ndarray) -> np.ndarray:
    """Return all ids but the smallest of each group that `pairs`, uint64 [n, 2], connect: uint64, sorted."""
    return np.sort(np.asarray(find_later_ids(pairs), np.uint64))


def _in_range(hashes: np.ndarray, hash_range: HashRange) -> np.ndarray:
    return np.asarray((hashes >= np.uint64(hash_range.low)) & (hashes <= np.uint64(hash_range.high - 1)))


def _pairs(ids: np.ndarray, same_as_before: np.ndarray) -> np.ndarray:
    """Pair every id with the first of its group of adjacent equal rows, unless it is the first."""
    starts = np.concatenate([[True], ~same_as_before])[: len(ids)]
    first = ids[np.maximum.accumulate(np.where(starts, np.arange(len(ids)), 0))] if len(ids) else ids
    return np.stack([first[~starts], ids[~starts]], axis=1)


def _write(out: Path, kind: str, task: HashRange, pairs: np.ndarray) -> None:
    with atomic_open(pairs_path(out, kind, task)) as file:
        np.save(file, pairs, allow_pickle=False)
