"""The stages of a preparation: read and clean → drop duplicates → tokenizer → shards → index and report.

Every worker runs all stages. The tasks of a stage are divided among the workers, and the result of a task is a file
that does not depend on who made it. Therefore any number of workers gives the same bytes, and a run that was killed
continues with the files that are missing.

Memory of a worker: twice a run (32 MiB of text); for a piece of a shard 64 bytes per document, a few MB of tokens and,
while a BPE tokenizer encodes, about 135 bytes per byte of the largest document (at most 64 MiB); for duplicates about
100 MB per range of hashes and 8 bytes per dropped document. Rank 0 also holds 16 bytes per pair of near duplicates (at
most 14 pairs per document) while it joins them, and 32 MB of text while it trains a tokenizer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.chat import ChatPlan, describe_plain_marks, plan_chat
from data_prep.duplicates import (
    HashRange,
    find_dropped_ids,
    find_exact_duplicates,
    find_near_duplicates,
    make_hash_ranges,
    read_pairs,
)
from data_prep.encode import ShardBuilder, shard_name
from data_prep.finalize import build_index, summarize_duplicates
from data_prep.input_digest import InputDigest, digest_inputs
from data_prep.learned_samples import sample_learned
from data_prep.losses import check_readable, describe_duplicates, describe_losses
from data_prep.ownership import REPORT_NAMES, check_out_holds_no_input
from data_prep.pieces import ShardPiece, divide_shards
from data_prep.plan import plan_shards
from data_prep.progress import StageProgress
from data_prep.read import ReadRecord, SourceReader, select_runs
from data_prep.recipe import Recipe
from data_prep.report import write_report
from data_prep.split import Stream
from data_prep.streams import make_streams, read_shard_plan, write_shard_plan
from data_prep.workers import WorkerGroup
from data_prep.workspace import Workspace
from kabrn_dist.data.index import CHAT_TEMPLATE_NAME, INDEX_NAME, TOKENIZER_NAME, Index
from kabrn_dist.data.index_io import read_index, write_index
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.utils.atomic_io import atomic_open
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.fault_injection import inject_fault


def prepare(recipe: Recipe, workers: WorkerGroup, force: bool = False) -> Index | None:
    """Make the shards of a recipe in `recipe.out`. Collective over the workers.

    The index is written last, so a folder with an index is complete.

    Args:
        recipe: what to make of which sources.
        workers: the processes that share the work.
        force: start over, and replace the data in the folder.

    Returns:
        The index on rank 0; None on the others, and if the folder was finished before from the same inputs.

    Raises:
        UserError: on all workers, for unusable input or a disk that refuses. Finished work is kept for the next run.
    """
    start = time.monotonic()
    workspace = Workspace(recipe.out)
    opened: list[tuple[ChatPlan, SourceReader, InputDigest]] = []

    def open_inputs() -> None:
        check_out_holds_no_input(recipe.out, recipe.named_inputs())
        chat = plan_chat(recipe)
        reader = SourceReader(recipe, workspace.runs, rendering=chat.rendering)
        opened.append((chat, reader, digest_inputs(reader, recipe)))

    # Files may be missing on a single machine.
    workers.on_all(open_inputs)
    chat, reader, inputs = opened[0]
    workers.require_same(
        inputs.digest, f"the workers see different inputs of {recipe.out}; give all machines the same files"
    )
    if not force and workers.all_true(workspace.is_finished(inputs)):
        return None
    workers.on_main(lambda: workspace.open(inputs, force))
    workers.on_main(lambda: _say_changes(recipe, chat))
    _read_sources(workspace, reader, workers)
    records = reader.records()

    workers.on_main(lambda: _check_read(workspace, reader, recipe, inputs, records))
    dropped = _find_duplicates(workspace, recipe, records, workers)
    streams = make_streams(recipe, records)
    workers.on_main(lambda: _plan_shards(workspace, recipe, streams, dropped, chat))
    _write_shards(workspace, streams, dropped, workers)
    written: list[Index] = []

    def finish() -> None:
        index = build_index(workspace, recipe, streams, records)
        tokenizer = Tokenizer.load(workspace.tokenizer)
        tokenizer.save(recipe.out / workspace.tokenizer.name)
        duplicates = summarize_duplicates(workspace, recipe, records)
        print(describe_duplicates(recipe, duplicates), end="", flush=True)
        learned = sample_learned(recipe.out, index, tokenizer)
        write_report(recipe, records, duplicates, index, reader.licenses(), time.monotonic() - start, learned)
        inject_fault("data.index")
        written.append(_write_index(recipe.out, index))
        workspace.close(inputs)

    workers.on_main(finish)
    return written[0] if written else None


def _check_read(
    workspace: Workspace, reader: SourceReader, recipe: Recipe, inputs: InputDigest, records: Sequence[ReadRecord]
) -> None:
    """Refuse sources that have changed meanwhile, or of which too little could be read; print what was left out."""
    if digest_inputs(reader, recipe) != inputs:
        raise UserError(
            f"--out {recipe.out}: its sources have changed while they were read; wait until nothing writes to them, "
            "and add --force to start over"
        )
    print(describe_losses(recipe, records), end="", flush=True)
    try:
        check_readable(recipe, records, reader.expected_layouts())
    except UserError:
        # Whatever mends this changes the inputs: nothing of what was read can be used again.
        workspace.discard()
        raise


def _write_index(out: Path, index: Index) -> Index:
    """Write the index and read it again: what does not come back as it was is not finished."""
    written = write_index(out, index)
    try:
        read_index(out)
    except UserError:
        (out / INDEX_NAME).unlink()
        raise
    return written


def _say_changes(recipe: Recipe, chat: ChatPlan) -> None:
    for change in chat.changes:
        print(f"{recipe.tokenizer.file}: {change}", flush=True)


def _read_sources(workspace: Workspace, reader: SourceReader, workers: WorkerGroup) -> None:
    workers.on_all(reader.load_cleaners)
    tasks = sorted(reader.tasks, key=lambda task: -task.unit.bytes)
    finished = {task.number for task in tasks if reader.is_finished(task)}
    total = sum(task.unit.bytes for task in tasks)
    completed = sum(task.unit.bytes for task in tasks if task.number in finished)
    with StageProgress(workspace.progress, workers.rank, "read", total, completed) as progress:

        def read(index: int) -> None:
            if tasks[index].number not in finished:
                reader.read(tasks[index], progress)
            progress.publish()

        workers.map_tasks(workspace.task_locks, "read", range(len(tasks)), read)


def _find_duplicates(
    workspace: Workspace, recipe: Recipe, records: Sequence[ReadRecord], workers: WorkerGroup
) -> np.ndarray:
    """Return the ids of all documents to drop because an equal or similar one is kept: uint64, sorted."""
    if not workers.all_true(workspace.dropped.exists()):
        runs, pairs, locks = workspace.runs, workspace.pairs, workspace.task_locks
        dropped = np.empty(0, np.uint64)
        names, documents = select_runs(recipe, records, "exact")
        if names:
            tasks = make_hash_ranges("exact", documents)
            workers.map_tasks(locks, "exact", tasks, lambda task: find_exact_duplicates(runs, names, pairs, task))
            dropped = np.sort(read_pairs(pairs, "exact", tasks)[:, 1])
        near_names, documents = select_runs(recipe, records, "near")
        near_tasks = make_hash_ranges("near", documents) if near_names else []
        workers.map_tasks(
            locks, "near", near_tasks, lambda task: find_near_duplicates(runs, near_names, dropped, pairs, task)
        )
        workers.on_main(lambda: _write_dropped(workspace, dropped, near_tasks))
    return np.asarray(np.load(workspace.dropped))


def _write_dropped(workspace: Workspace, exact_duplicates: np.ndarray, near_tasks: Sequence[HashRange]) -> None:
    """On rank 0: write the ids of exact and near duplicates."""
    near_duplicates = find_dropped_ids(read_pairs(workspace.pairs, "near", near_tasks))
    with atomic_open(workspace.dropped) as file:
        np.save(file, np.union1d(exact_duplicates, near_duplicates), allow_pickle=False)


def _plan_shards(
    workspace: Workspace, recipe: Recipe, streams: Sequence[Stream], dropped: np.ndarray, chat: ChatPlan
) -> None:
    """On rank 0: train or copy the tokenizer, and write the list of shards to make."""
    if workspace.shard_plan.exists():
        return
    if note := describe_plain_marks(chat):
        print(note, flush=True)
    chosen, tasks = plan_shards(recipe, workspace.runs, streams, dropped, chat.tokenizer, chat.reserved)
    chosen.chat_template = chat.template
    names = [f"{shard_name(streams[task.stream], task)}.tar" for task in tasks]
    names += [CHAT_TEMPLATE_NAME] if chat.template else []
    workspace.claim_files([*names, TOKENIZER_NAME, *REPORT_NAMES, INDEX_NAME])
    chosen.save(workspace.tokenizer)
    write_shard_plan(workspace.shard_plan, tasks)


def _write_shards(workspace: Workspace, streams: Sequence[Stream], dropped: np.ndarray, workers: WorkerGroup) -> None:
    plan = read_shard_plan(workspace.shard_plan)
    builder = ShardBuilder(workspace, streams, dropped, Tokenizer.load(workspace.tokenizer))
    shards = divide_shards(sorted(plan, key=lambda task: -task.bytes))
    total = sum(task.bytes for task in plan)
    completed = sum(piece.bytes for pieces in shards for piece in pieces if builder.is_encoded(piece))
    with StageProgress(workspace.progress, workers.rank, "tokenize", total, completed) as progress:

        def encode(work: ShardPiece | int) -> None:
            if isinstance(work, int):
                builder.measure_gzip(work, plan)
                return
            if not builder.is_encoded(work):
                builder.encode(work, progress)
            pieces = shards[work.shard]
            # Whoever encodes the last piece builds the shard, so that pieces take little room on the disk.
            if all(map(builder.is_encoded, pieces)) and workers.claim_task(workspace.task_locks, "shard", work.shard):
                builder.build(pieces)
            progress.publish()

        # The reference for validation is one gzip stream per source, which cannot be divided: these begin first.
        gzips = range(len(streams))
        workers.map_tasks(workspace.task_locks, "encode", [*gzips, *itertools.chain.from_iterable(shards)], encode)
        # On a network file system, two workers may have encoded the last pieces without seeing one another's.
        workers.map_tasks(workspace.task_locks, "shard", shards, builder.build)


def scan(recipe: Recipe, folder: Path) -> list[ReadRecord]:
    """Read and clean all documents without storing their texts, for `--dry-run`.

    Args:
        recipe: the recipe.
        folder: a temporary folder.

    Returns:
        One record per source.

    Raises:
        UserError: for unusable input, or if too much of it cannot be read.
    """
    reader = SourceReader(recipe, folder, texts=False, rendering=plan_chat(recipe).rendering)
    total = sum(task.unit.bytes for task in reader.tasks)
    with StageProgress(folder, 0, "read", total) as progress:
        for task in reader.tasks:
            reader.read(task, progress)
        progress.publish()
    records = reader.records()
    check_readable(recipe, records, reader.expected_layouts())
    return records
