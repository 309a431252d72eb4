"""A few of the documents that were dropped as duplicates, for the report."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.read import SAMPLE_CHARACTERS, SAMPLES, ReadRecord
from data_prep.sorted_runs import RunReader, StoredDocument, rows_of

_SHOWN = ("same text", "nearly the same")

Samples = dict[str, list[tuple[str, str, str]]]


class Duplicates(NamedTuple):
    """Of a source: how many documents were dropped as the same as others, as nearly the same, and a few of them."""

    same: int
    alike: int
    samples: Samples


def sample_duplicates(runs: Path, records: Sequence[ReadRecord], same: np.ndarray, alike: np.ndarray) -> list[Samples]:
    """By source and kind: name and beginning of dropped documents, and the name of one that came before.

    `same`, `alike`: pairs of ids (earlier, dropped), uint64 [n, 2]. Those dropped first are shown.
    """
    reader, samples = RunReader(runs), []
    items = np.cumsum([0, *(record.items for record in records)]).tolist()
    for low, high in itertools.pairwise(items):
        found: Samples = {}
        for kind, pairs in zip(_SHOWN, (same, alike), strict=True):
            here = pairs[(pairs[:, 1] >= np.uint64(low << 32)) & (pairs[:, 1] < np.uint64(high << 32))]
            _, places = np.unique(here[:, 1], return_index=True)
            if len(places):
                found[kind] = [_sample(reader, runs, records, *here[place].tolist()) for place in places[:SAMPLES]]
        samples.append(found)
    reader.close()
    return samples


def _sample(
    reader: RunReader, runs: Path, records: Sequence[ReadRecord], earlier: int, dropped: int
) -> tuple[str, str, str]:
    document, other = (next(_stored(reader, runs, records, id)) for id in (dropped, earlier))
    # A character may be cut in two at the end.
    return (
        document.name,
        document.text[: 4 * SAMPLE_CHARACTERS].decode("utf-8", "ignore")[:SAMPLE_CHARACTERS],
        f"as {other.name}",
    )


def _stored(reader: RunReader, runs: Path, records: Sequence[ReadRecord], id: int) -> Iterator[StoredDocument]:
    item = f"item-{id >> 32:06d}-"
    for run in (run for record in records for run in record.runs if run.startswith(item)):
        rows = rows_of(runs, run)
        for place in np.flatnonzero(rows["id"] == np.uint64(id)):
            yield reader.read(run, rows[place])
