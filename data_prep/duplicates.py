"""Stages 2 and 3: documents that are there already. Ranges of hashes are shared out; each needs a part of memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.clean.minhash import BANDS, find_later_ids
from data_prep.sorted_runs import find_members, load_band_keys, load_rows
from kabrn_dist.utils.atomic_io import atomic_open

# Rows that one task sorts, about: 24 bytes each, and as much again to sort them.
_ROWS_A_RANGE = 1 << 20
_NAME = "{kind}-{number:05d}.npy"


class HashRange(NamedTuple):
    """One task: the hashes [low, high) of key `band` (−1: of the text), of which there are `2^64`."""

    number: int
    band: int
    low: int
    high: int


def make_hash_ranges(stage: str, documents: int) -> list[HashRange]:
    """The tasks for so many documents: of the text where `stage` is "exact", of each near-duplicate key for "near"."""
    bands = BANDS if stage == "near" else 0
    count = 1 + documents // _ROWS_A_RANGE
    edges = [(part << 64) // count for part in range(count + 1)]
    return [
        HashRange(band * count + part, band if bands else -1, edges[part], edges[part + 1])
        for band in range(max(bands, 1))
        for part in range(count)
    ]


def find_exact_duplicates(
    run_folder: Path, run_names: Sequence[str], pairs_folder: Path, hash_range: HashRange
) -> None:
    """Write the ids of a range's documents whose text came before, with that one's: uint64 [n, 2] (kept, dropped).

    What an earlier run has written stays.
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
    """Write pairs of ids that share a key of the range, uint64 [n, 2] (first, later), none of them `dropped`.

    What an earlier run has written stays.
    """
    if pairs_path(pairs_folder, "near", hash_range).exists():
        return
    parts = []
    for name in run_names:
        keys, ids = load_band_keys(run_folder, name)[:, hash_range.band], load_rows(run_folder, name)["id"]
        chosen = _in_range(keys, hash_range)
        parts.append(np.stack([keys[chosen], ids[chosen]]))
    keys, ids = np.concatenate(parts, axis=1)
    alive = ~find_members(dropped, ids)
    keys, ids = keys[alive], ids[alive]
    order = np.lexsort((ids, keys))
    keys, ids = keys[order], ids[order]
    _write(pairs_folder, "near", hash_range, _pairs(ids, keys[1:] == keys[:-1]))


def read_pairs(pairs_folder: Path, stage: str, hash_ranges: Sequence[HashRange]) -> np.ndarray:
    """The pairs of all tasks of a kind, uint64 [n, 2]."""
    parts = [np.load(pairs_path(pairs_folder, stage, task)) for task in hash_ranges]
    return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)


def pairs_path(pairs_folder: Path, stage: str, hash_range: HashRange) -> Path:
    """Where a task's pairs are written."""
    return pairs_folder / _NAME.format(kind=stage, number=hash_range.number)


def find_dropped_ids(edges: np.ndarray) -> np.ndarray:
    """All but the smallest id of each group that `edges`, uint64 [n, 2], connect: uint64, sorted."""
    return np.sort(np.asarray(find_later_ids(edges), np.uint64))


def _in_range(hashes: np.ndarray, hash_range: HashRange) -> np.ndarray:
    return np.asarray((hashes >= np.uint64(hash_range.low)) & (hashes <= np.uint64(hash_range.high - 1)))


def _pairs(ids: np.ndarray, same_as_before: np.ndarray) -> np.ndarray:
    """(first of its group, itself) for every id but the first of each group; groups are neighbours."""
    starts = np.concatenate([[True], ~same_as_before])[: len(ids)]
    first = ids[np.maximum.accumulate(np.where(starts, np.arange(len(ids)), 0))] if len(ids) else ids
    return np.stack([first[~starts], ids[~starts]], axis=1)


def _write(out: Path, kind: str, task: HashRange, pairs: np.ndarray) -> None:
    with atomic_open(pairs_path(out, kind, task)) as file:
        np.save(file, pairs, allow_pickle=False)
