"""Sample the documents that were dropped as duplicates, for the report."""

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
    """Duplicates that were dropped from one source.

    Attributes:
        exact: number of documents with the same text as an earlier one.
        near: number of documents with nearly the same text.
        samples: a few of them by kind, as (name, beginning, particulars).
    """

    exact: int
    near: int
    samples: Samples


def sample_duplicates(
    run_folder: Path, records: Sequence[ReadRecord], exact: np.ndarray, near: np.ndarray
) -> list[Samples]:
    """Return samples of the dropped documents of each source, by kind of duplicate.

    Args:
        run_folder: folder of the runs.
        records: one record per source.
        exact: pairs of ids (earlier, dropped) with the same text, uint64 [n, 2].
        near: pairs of ids with nearly the same text, uint64 [n, 2].

    Returns:
        For each source: kind → (name, beginning, "as " and the name of the earlier document), smallest ids first.
    """
    reader, samples = RunReader(run_folder), []
    task_edges = np.cumsum([0, *(record.tasks for record in records)]).tolist()
    for low, high in itertools.pairwise(task_edges):
        by_kind: Samples = {}
        for kind, pairs in zip(_SHOWN, (exact, near), strict=True):
            source_pairs = pairs[(pairs[:, 1] >= np.uint64(low << 32)) & (pairs[:, 1] < np.uint64(high << 32))]
            _, positions = np.unique(source_pairs[:, 1], return_index=True)
            if len(positions):
                by_kind[kind] = [
                    _sample(reader, run_folder, records, *source_pairs[position].tolist())
                    for position in positions[:SAMPLES_PER_REASON]
                ]
        samples.append(by_kind)
    reader.close()
    return samples


def _sample(
    reader: RunReader, runs: Path, records: Sequence[ReadRecord], earlier: int, dropped: int
) -> tuple[str, str, str]:
    document, other = (next(_stored(reader, runs, records, id)) for id in (dropped, earlier))
    # The bytes may end within a character.
    return (
        document.name,
        document.text[: 4 * SHOWN_CHARACTERS].decode("utf-8", "ignore")[:SHOWN_CHARACTERS],
        f"as {other.name}",
    )


def _stored(reader: RunReader, runs: Path, records: Sequence[ReadRecord], id: int) -> Iterator[StoredDocument]:
    prefix = f"item-{id >> 32:06d}-"
    for run in (run for record in records for run in record.runs if run.startswith(prefix)):
        rows = load_rows(runs, run)
        for position in np.flatnonzero(rows["id"] == np.uint64(id)):
            yield reader.read(run, rows[position])
