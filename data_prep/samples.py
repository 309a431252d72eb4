"""A few of the documents that were dropped as duplicates, for the report."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.read import SAMPLES_PER_REASON, SHOWN_CHARACTERS, ReadRecord
from data_prep.sorted_runs import RunReader, StoredDocument, load_rows

_SHOWN = ("same text", "nearly the same")

Samples = dict[str, list[tuple[str, str, str]]]


class DuplicateSummary(NamedTuple):
    """Of a source: how many documents were dropped as the same as others, as nearly the same, and a few of them."""

    exact: int
    near: int
    samples: Samples


def sample_duplicates(
    run_folder: Path, records: Sequence[ReadRecord], exact: np.ndarray, near: np.ndarray
) -> list[Samples]:
    """By source and kind: name and beginning of dropped documents, and the name of one that came before.

    `same`, `alike`: pairs of ids (earlier, dropped), uint64 [n, 2]. Those dropped first are shown.
    """
    reader, samples = RunReader(run_folder), []
    items = np.cumsum([0, *(record.tasks for record in records)]).tolist()
    for low, high in itertools.pairwise(items):
        found: Samples = {}
        for kind, pairs in zip(_SHOWN, (exact, near), strict=True):
            here = pairs[(pairs[:, 1] >= np.uint64(low << 32)) & (pairs[:, 1] < np.uint64(high << 32))]
            _, places = np.unique(here[:, 1], return_index=True)
            if len(places):
                found[kind] = [
                    _sample(reader, run_folder, records, *here[place].tolist()) for place in places[:SAMPLES_PER_REASON]
                ]
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
        document.text[: 4 * SHOWN_CHARACTERS].decode("utf-8", "ignore")[:SHOWN_CHARACTERS],
        f"as {other.name}",
    )


def _stored(reader: RunReader, runs: Path, records: Sequence[ReadRecord], id: int) -> Iterator[StoredDocument]:
    item = f"item-{id >> 32:06d}-"
    for run in (run for record in records for run in record.runs if run.startswith(item)):
        rows = load_rows(runs, run)
        for place in np.flatnonzero(rows["id"] == np.uint64(id)):
            yield reader.read(run, rows[place])
