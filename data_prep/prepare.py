"""The preparation, stage by stage: read and clean → without duplicates → tokenizer → shards → index and report.

Every worker runs this from beginning to end; work is shared stage by stage, and what a task makes goes to a file that
does not depend on who made it. So any number of workers gives the same bytes, and a run that was killed goes on with
what is missing.

Memory of a worker: twice a run (32 MiB of text); of a shard, 64 bytes a document, some MB of tokens, and while a BPE
tokenizer is at work some 135 bytes for each byte of the largest document (64 MiB are allowed); of duplicates, about
100 MB a range of hashes, and on each worker 8 bytes for each document that is dropped. Rank 0 alone holds 16 bytes for
each pair of near duplicates (at most 14 pairs a document) while it joins them, and 32 MB of text while it trains a
tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.duplicates import (
    find_dropped_ids,
    find_exact_duplicates,
    find_near_duplicates,
    make_hash_ranges,
    read_pairs,
)
from data_prep.encode import ShardBuilder
from data_prep.finalize import build_index, summarize_duplicates
from data_prep.plan import load_tokenizer, plan_shards
from data_prep.progress import StageProgress
from data_prep.read import ReadRecord, SourceReader, digest_inputs, select_runs
from data_prep.recipe import Recipe
from data_prep.report import write_report
from data_prep.streams import Stream, make_streams, read_shard_plan, write_shard_plan
from data_prep.workers import WorkerGroup
from data_prep.workspace import Workspace
from kabrn_dist.data.index import Index
from kabrn_dist.data.index_io import write_index
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.utils.atomic_io import atomic_open
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.fault_injection import inject_fault


def prepare(recipe: Recipe, workers: WorkerGroup, force: bool = False) -> Index | None:
    """Make `recipe.out`; its index comes last, so that a folder that has one is complete. Collective over the team.

    Returns the index on rank 0; None on the others, and where the folder was finished before from the same inputs.
    Raises UserError on all workers for unusable input and disks that refuse; what is finished is kept for another run.
    """
    began = time.monotonic()
    work = Workspace(recipe.out)
    opened: list[tuple[Tokenizer | None, SourceReader, str]] = []

    def look() -> None:
        reader = SourceReader(recipe, work.runs)
        opened.append((load_tokenizer(recipe), reader, digest_inputs(reader, recipe)))

    # Files may be missing on one machine alone.
    workers.on_all(look)
    tokenizer, reader, inputs = opened[0]
    workers.require_same(inputs, f"the workers see different inputs of {recipe.out}: give all machines the same files")
    if not force and workers.all_true(work.is_finished(inputs)):
        return None
    workers.on_main(lambda: work.open(inputs, force))
    _read_sources(work, reader, workers)
    records = reader.records()
    workers.on_main(lambda: check_readable(recipe, records))
    dropped = _find_duplicates(work, recipe, records, workers)
    streams = make_streams(recipe, records)
    workers.on_main(lambda: _plan_shards(work, recipe, streams, dropped, tokenizer))
    _write_shards(work, recipe, streams, dropped, workers)
    sealed: list[Index] = []

    def seal() -> None:
        index = build_index(work, recipe, streams, records)
        Tokenizer.load(work.tokenizer).save(recipe.out / work.tokenizer.name)
        dropped = summarize_duplicates(work, recipe, records)
        write_report(recipe.out, recipe, records, dropped, index, reader.licenses(), time.monotonic() - began)
        inject_fault("data.index")
        sealed.append(write_index(recipe.out, index))
        work.close(inputs)

    workers.on_main(seal)
    return sealed[0] if sealed else None


def check_readable(recipe: Recipe, records: Sequence[ReadRecord]) -> None:
    """Raise UserError where more of a source's documents are unreadable than `max_unreadable`."""
    for source, record in zip(recipe.sources, records, strict=True):
        if record.unreadable > recipe.max_unreadable * record.documents:
            raise UserError(
                f"source {source.name!r}: {record.unreadable} of {record.documents} documents cannot be read (first: "
                f"{record.unreadable_names[0]}). Repair or remove them, or raise max_unreadable, which is "
                f"{recipe.max_unreadable:g}."
            )


def _read_sources(workspace: Workspace, reader: SourceReader, workers: WorkerGroup) -> None:
    workers.on_all(reader.load_cleaners)
    items = sorted(reader.tasks, key=lambda item: -item.unit.bytes)
    finished = {item.number for item in items if reader.is_finished(item)}
    total, done = (
        sum(item.unit.bytes for item in some) for some in (items, [i for i in items if i.number in finished])
    )
    with StageProgress(workspace.progress, workers.rank, "read", total, done) as tally:

        def read(number: int) -> None:
            if items[number].number not in finished:
                reader.read(items[number], tally)
            tally.publish()

        workers.map_tasks(workspace.task_locks, "read", range(len(items)), read)


def _find_duplicates(
    workspace: Workspace, recipe: Recipe, records: Sequence[ReadRecord], workers: WorkerGroup
) -> np.ndarray:
    """Ids of all documents of which the corpus has another that stays: uint64, sorted."""
    if not workers.all_true(workspace.dropped.exists()):
        exact = select_runs(recipe, records, "exact")
        dropped = np.empty(0, np.uint64)
        if exact[0]:
            tasks = make_hash_ranges("exact", exact[1])
            workers.map_tasks(
                workspace.task_locks,
                "exact",
                tasks,
                lambda task: find_exact_duplicates(workspace.runs, exact[0], workspace.pairs, task),
            )
            dropped = np.sort(read_pairs(workspace.pairs, "exact", tasks)[:, 1])
        near = select_runs(recipe, records, "near")
        if near[0]:
            tasks = make_hash_ranges("near", near[1])
            workers.map_tasks(
                workspace.task_locks,
                "near",
                tasks,
                lambda task: find_near_duplicates(workspace.runs, near[0], dropped, workspace.pairs, task),
            )
        workers.on_main(lambda: _write_dropped(workspace, dropped, near))
    return np.asarray(np.load(workspace.dropped))


def _write_dropped(workspace: Workspace, exact_duplicates: np.ndarray, near: tuple[list[str], int]) -> None:
    """Rank 0: add the near duplicates to the exact ones, and write all down."""
    dropped = exact_duplicates
    if near[0]:
        dropped = np.union1d(
            exact_duplicates, find_dropped_ids(read_pairs(workspace.pairs, "near", make_hash_ranges("near", near[1])))
        )
    with atomic_open(workspace.dropped) as file:
        np.save(file, dropped, allow_pickle=False)


def _plan_shards(
    workspace: Workspace, recipe: Recipe, streams: Sequence[Stream], dropped: np.ndarray, tokenizer: Tokenizer | None
) -> None:
    """Rank 0: the tokenizer, and which shards there will be."""
    if workspace.shard_plan.exists():
        return
    if tokenizer is None:
        print(f"training a tokenizer of {recipe.tokenizer.train:,} ids …", flush=True)
    chosen, tasks = plan_shards(recipe, workspace.runs, streams, dropped, tokenizer)
    if tokenizer is None and chosen.vocab_size < (recipe.tokenizer.train or 0):
        print(f"the texts give no more than {chosen.vocab_size:,} ids")
    chosen.save(workspace.tokenizer)
    write_shard_plan(workspace.shard_plan, tasks)


def _write_shards(
    workspace: Workspace, recipe: Recipe, streams: Sequence[Stream], dropped: np.ndarray, workers: WorkerGroup
) -> None:
    tasks = read_shard_plan(workspace.shard_plan)
    order = sorted(range(len(tasks)), key=lambda number: -tasks[number].bytes)
    maker = ShardBuilder(workspace, streams, dropped, Tokenizer.load(workspace.tokenizer))
    finished = {number for number in order if maker.is_finished(tasks[number])}
    total = sum(task.bytes for task in tasks)
    with StageProgress(
        workspace.progress, workers.rank, "tokenise", total, sum(tasks[number].bytes for number in finished)
    ) as tally:

        def make(number: int) -> None:
            if number not in finished:
                maker.build(tasks[number], tally)
            tally.publish()

        workers.map_tasks(workspace.task_locks, "shard", order, make)
    # The yardstick of validation is one gzip stream a source, which cannot be shared out further.
    workers.map_tasks(
        workspace.task_locks, "gzip", range(len(streams)), lambda number: maker.measure_gzip(number, tasks)
    )


def scan(recipe: Recipe, folder: Path) -> list[ReadRecord]:
    """Read and clean everything, one record a source; texts are not kept. For `--dry-run`, in a temporary `folder`."""
    reader = SourceReader(recipe, folder, texts=False)
    total = sum(item.unit.bytes for item in reader.tasks)
    with StageProgress(folder, 0, "read", total) as tally:
        for item in reader.tasks:
            reader.read(item, tally)
        tally.publish()
    return reader.records()
