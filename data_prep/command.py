"""What `mixkabrn prepare` does with its options: make the recipe, lock the folder, start the workers."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_prep import DEFAULT_VOCAB_SIZE
from data_prep.losses import summarize_records
from data_prep.prepare import prepare, scan
from data_prep.recipe import Recipe, load_recipe, parse_recipe
from data_prep.train_tokenizer import check_vocab_size
from data_prep.workers import MpiWorkerGroup, WorkerGroup, start_workers
from data_prep.workspace import acquire_workspace, release_workspace
from kabrn_dist.data.index import Index
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.mpi import is_under_mpirun

# Of a folder of one's own files some may be none that can be read, but hardly half of them.
_MAX_UNREADABLE = 0.5
# More processes than this only wait for one another.
_WORKERS_PER_CPU, _MIN_WORKERS = 4, 16


def run_prepare(options: argparse.Namespace) -> int:
    """Prepare a shard set, alone, with processes of this machine, or as one of several under mpirun.

    Args:
        options: what the parser of `mixkabrn prepare` returns.

    Returns:
        The exit code: 0; 130 after Ctrl-C; 2 on the other ranks under mpirun when rank 0 reports an error.

    Raises:
        UserError: for a recipe, sources or a folder that cannot be used; on rank 0 only.
    """
    group = WorkerGroup()
    try:
        if is_under_mpirun():
            group = MpiWorkerGroup()
        recipes: list[Recipe] = []
        group.on_all(lambda: recipes.append(_make_recipe(options)))
        _prepare(options, recipes[0], group)
    except UserError:
        if group.rank == 0:
            raise
        return 2
    except KeyboardInterrupt:
        print("interrupted: the folder has no index yet; the same command continues", file=sys.stderr)
        return 130
    except BaseException:
        # The others would wait for this process for ever.
        if isinstance(group, MpiWorkerGroup):
            sys.excepthook(*sys.exc_info())
            group.abort()
        raise
    return 0


def _make_recipe(options: argparse.Namespace) -> Recipe:
    if options.tokenizer is not None and options.vocabulary is not None:
        raise UserError(f"--vocabulary {options.vocabulary}: --tokenizer {options.tokenizer} brings its own; drop one")
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1")
    most = max(_MIN_WORKERS, _WORKERS_PER_CPU * (os.cpu_count() or 1))
    if options.workers > most:
        raise UserError(f"--workers {options.workers}: at most {most} on this machine; use mpirun for several machines")
    if options.vocabulary is not None:
        check_vocab_size(options.vocabulary)
    recipe = _recipe_from_file(options) if options.recipe is not None else _recipe_from_options(options)
    if recipe.tokenizer.train is not None:
        check_vocab_size(recipe.tokenizer.train)
    return recipe


def _recipe_from_file(options: argparse.Namespace) -> Recipe:
    if options.input or options.field or options.unit:
        raise UserError("--input, --field and --unit belong to --source text; name them in the recipe, or with --set")
    flags = {
        flag: getattr(options, flag)
        for flag in ("out", "validation_share", "shard_mb")
        if getattr(options, flag) is not None
    }
    if options.tokenizer is not None or options.vocabulary is not None:
        flags["tokenizer"] = _tokenizer_section(options)
    return load_recipe(options.recipe, options.set, flags)


def _recipe_from_options(options: argparse.Namespace) -> Recipe:
    if options.out is None:
        raise UserError("--out: give a folder for the shards")
    if options.set:
        raise UserError(f"--set {options.set[0]}: belongs to --recipe")
    if options.source == "text" and not options.input:
        raise UserError("--input: --source text needs at least one file or folder to read")
    if options.source == "python-stdlib" and (options.input or options.field or options.unit):
        raise UserError("--input, --field and --unit belong to --source text; drop them or change --source")
    source: dict[str, Any] = {
        "name": options.source,
        "kind": options.source,
        "input": [str(path) for path in options.input],
    }
    source["options"] = {key: getattr(options, key) for key in ("field", "unit") if getattr(options, key) is not None}
    cleaning = {"unicode": "off", "control": False, "broken": "drop", "tag": False, "quality": "off"}
    tree: dict[str, Any] = {
        "out": str(options.out),
        "tokenizer": _tokenizer_section(options),
        # The documents as they are, without unreadable ones and exact duplicates.
        "clean": {**cleaning, "repetition": "off", "exact": True, "near": False},
        "sources": [source],
        "max_unreadable": _MAX_UNREADABLE,
    }
    for flag in ("validation_share", "shard_mb"):
        if getattr(options, flag) is not None:
            tree[flag] = getattr(options, flag)
    return parse_recipe(tree, "command line")


def _tokenizer_section(options: argparse.Namespace) -> dict[str, Any]:
    if options.tokenizer is None:
        return {"train": options.vocabulary or DEFAULT_VOCAB_SIZE}
    return {"bytes": True} if options.tokenizer == "bytes" else {"file": options.tokenizer}


def _prepare(options: argparse.Namespace, recipe: Recipe, group: WorkerGroup) -> None:
    if options.dry_run:
        if group.rank == 0:
            _print_dry_run(recipe)
        return
    locks: list[int] = []
    try:
        group.on_main(lambda: locks.append(acquire_workspace(recipe.out)))
        if group.world > 1 or options.workers == 1:
            index = prepare(recipe, group, options.force)
        else:
            # Only what was set: defaults that come back from JSON may be of another type, and so of another digest.
            job = {"recipe": recipe.model_dump(mode="json", exclude_unset=True), "force": options.force}
            with start_workers(options.workers, job, locks) as started:
                index = prepare(recipe, started, options.force)
        if group.rank == 0:
            _print_result(recipe, index)
    finally:
        for descriptor in locks:
            release_workspace(recipe.out, descriptor)


def _print_dry_run(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = scan(recipe, Path(folder))
    print(summarize_records(recipe, records))
    print(f"dry run: {recipe.out} was not touched")


def _print_result(recipe: Recipe, index: Index | None) -> None:
    if index is None:
        print(f"{recipe.out} is finished, from the same recipe and sources: nothing to do")
        return
    print(
        f"wrote {recipe.out}: {index.tokens('train'):,} + {index.tokens('validation'):,} tokens, vocabulary "
        f"{index.vocabulary:,}, fingerprint {index.fingerprint[:12]}"
    )
