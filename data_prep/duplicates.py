"""Stages 2 and 3: documents that are there already. Ranges of hashes are shared out; each needs a part of memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.clean.minhash import BANDS, cluster
from data_prep.sorted_runs import contains, keys_of, rows_of
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


def ranges_of(stage: str, documents: int) -> list[HashRange]:
    """The tasks for so many documents: of the text where `stage` is "exact", of each near-duplicate key for "near"."""
    bands = BANDS if stage == "near" else 0
    count = 1 + documents // _ROWS_A_RANGE
    edges = [(part << 64) // count for part in range(count + 1)]
    return [
        HashRange(band * count + part, band if bands else -1, edges[part], edges[part + 1])
        for band in range(max(bands, 1))
        for part in range(count)
    ]


def find_exact(runs: Path, names: Sequence[str], out: Path, task: HashRange) -> None:
    """Write the ids of a range's documents whose text came before, with that one's: uint64 [n, 2] (kept, dropped).

    What an earlier run has written stays.
    """
    if pairs_path(out, "exact", task).exists():
        return
    parts = []
    for name in names:
        rows = rows_of(runs, name)
        rows = rows[_in_range(rows["text"], task)]
        parts.append(np.stack([rows["text"], rows["text_low"], rows["id"]]))
    high, low, ids = np.concatenate(parts, axis=1)
    order = np.lexsort((ids, low, high))
    high, low, ids = high[order], low[order], ids[order]
    _write(out, "exact", task, _pairs(ids, (high[1:] == high[:-1]) & (low[1:] == low[:-1])))


def find_near(runs: Path, names: Sequence[str], dropped: np.ndarray, out: Path, task: HashRange) -> None:
    """Write pairs of ids that share a key of the range, uint64 [n, 2] (first, later), none of them `dropped`.

    What an earlier run has written stays.
    """
    if pairs_path(out, "near", task).exists():
        return
    parts = []
    for name in names:
        keys, ids = keys_of(runs, name)[:, task.band], rows_of(runs, name)["id"]
        chosen = _in_range(keys, task)
        parts.append(np.stack([keys[chosen], ids[chosen]]))
    keys, ids = np.concatenate(parts, axis=1)
    alive = ~contains(dropped, ids)
    keys, ids = keys[alive], ids[alive]
    order = np.lexsort((ids, keys))
    keys, ids = keys[order], ids[order]
    _write(out, "near", task, _pairs(ids, keys[1:] == keys[:-1]))


def read_pairs(out: Path, kind: str, tasks: Sequence[HashRange]) -> np.ndarray:
    """The pairs of all tasks of a kind, uint64 [n, 2]."""
    parts = [np.load(pairs_path(out, kind, task)) for task in tasks]
    return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)


def pairs_path(out: Path, kind: str, task: HashRange) -> Path:
    """Where a task's pairs are written."""
    return out / _NAME.format(kind=kind, number=task.number)


def dropped_of(edges: np.ndarray) -> np.ndarray:
    """All but the smallest id of each group that `edges`, uint64 [n, 2], connect: uint64, sorted."""
    return np.sort(np.asarray(cluster(edges), np.uint64))


def _in_range(hashes: np.ndarray, task: HashRange) -> np.ndarray:
    return np.asarray((hashes >= np.uint64(task.low)) & (hashes <= np.uint64(task.high - 1)))


def _pairs(ids: np.ndarray, same_as_before: np.ndarray) -> np.ndarray:
    """(first of its group, itself) for every id but the first of each group; groups are neighbours."""
    starts = np.concatenate([[True], ~same_as_before])[: len(ids)]
    first = ids[np.maximum.accumulate(np.where(starts, np.arange(len(ids)), 0))] if len(ids) else ids
    return np.stack([first[~starts], ids[~starts]], axis=1)


def _write(out: Path, kind: str, task: HashRange, pairs: np.ndarray) -> None:
    with atomic_open(pairs_path(out, kind, task)) as file:
        np.save(file, pairs, allow_pickle=False)
