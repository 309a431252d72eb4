"""The command line: `python -m data_prep --help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.inspect import inspect_shards
from data_prep.prepare import check_readable, prepare, scan
from data_prep.recipe import Recipe, load_recipe, parse_recipe
from data_prep.report import summarize_records
from data_prep.train_tokenizer import check_vocab_size
from data_prep.workers import MpiWorkerGroup, WorkerGroup, start_workers, under_mpirun
from data_prep.workspace import acquire_lock, release_lock
from kabrn_dist.data.index import Index
from kabrn_dist.utils.errors import UserError

_VOCABULARY = 4096

_EXAMPLES = """examples:
  python -m data_prep --source python-stdlib --out data/python
      Python's own library, about 12 MB: needs no network
  python -m data_prep --source text --input books/ notes.jsonl.zst --out data/books
      your own .txt (a document each) and .jsonl (a document a line), also as .gz or .zst
  python -m data_prep --recipe configs/data_mix.yaml --set root=/data --workers 8
      many sources, cleaned, without duplicates, mixed by weight; the recipe says which
  mpirun -n 64 python -m data_prep --recipe configs/data_mix.yaml --set root=/data
      the same bytes, made on many machines that share the folders
  python -m data_prep --source text --input books/ --out data/books --tokenizer bytes --dry-run
      look before you write; bytes as tokens
  python -m data_prep inspect data/books
      check every shard of a finished folder and show samples (see: python -m data_prep inspect --help)

A run that was stopped or killed goes on with the same command; what is finished is not done again.
"""


def main(arguments: Sequence[str]) -> int:
    """Run one command; return 0, 2 after a UserError (one line on stderr), or 130 after Ctrl-C."""
    team = WorkerGroup()
    try:
        if arguments[:1] == ["inspect"]:
            _inspect(arguments[1:])
            return 0
        options = _parser().parse_args(arguments)
        if under_mpirun():
            team = MpiWorkerGroup()
        recipes: list[Recipe] = []
        team.on_all(lambda: recipes.append(_recipe(options)))
        _prepare(options, recipes[0], team)
    except UserError as error:
        if team.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: an unfinished --out has no index; the same command goes on", file=sys.stderr)
        return 130
    except BaseException:
        # The others would wait for this one for ever.
        if isinstance(team, MpiWorkerGroup):
            sys.excepthook(*sys.exc_info())
            team.abort()
        raise
    return 0


def _inspect(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep inspect",
        description="Verify every shard of a folder, print totals and samples.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that data_prep wrote")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="samples to show (default 3)")
    options = parser.parse_args(arguments)
    inspect_shards(options.folder, options.documents)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Turn texts into tokenised shards. Documents are cleaned as the recipe says, duplicates are "
        "dropped, the rest is shuffled; the same input gives the same bytes, and the index is written last.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", type=Path, metavar="FILE", help="a YAML file with sources, cleaning and weights")
    what.add_argument("--source", choices=("python-stdlib", "text"), help="a single source, not cleaned")
    add("--set", action="append", default=[], metavar="A.B=C", help="override a value of the recipe; may be repeated")
    add("--out", type=Path, metavar="DIR", help="folder for the shards (default: the recipe's)")
    add("--input", nargs="+", type=Path, default=[], metavar="PATH", help="text: files or folders to read")
    add("--field", metavar="KEY", help='text: the key of the text in a .jsonl line (default "text")')
    add("--vocabulary", type=int, metavar="N", help=f"ids of the trained tokenizer (default {_VOCABULARY})")
    add("--tokenizer", metavar="bytes|FILE.json", help="use bytes or this tokenizer.json instead of training one")
    add("--validation-share", type=float, metavar="X", help="share of documents held out (default 0.05)")
    add("--shard-mb", type=float, metavar="MB", help="size of a shard in MB of tokens (default 64)")
    add("--workers", type=int, default=1, metavar="N", help="processes on this machine (default 1); or use mpirun")
    add("--dry-run", action="store_true", help="read, clean and count the documents, write nothing")
    add("--force", action="store_true", help="replace the data in --out, and begin an unfinished run anew")
    return parser


def _recipe(options: argparse.Namespace) -> Recipe:
    if options.tokenizer is not None and options.vocabulary is not None:
        raise UserError(f"--vocabulary {options.vocabulary}: --tokenizer {options.tokenizer} brings its own; drop one.")
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1.")
    if options.vocabulary is not None:
        check_vocab_size(options.vocabulary)
    recipe = _of_file(options) if options.recipe is not None else _of_flags(options)
    if recipe.tokenizer.train is not None:
        check_vocab_size(recipe.tokenizer.train)
    return recipe


def _of_file(options: argparse.Namespace) -> Recipe:
    if options.input or options.field:
        raise UserError("--input and --field belong to --source text; name inputs in the recipe, or with --set.")
    changes = [f"out={options.out}"] if options.out is not None else []
    for flag in ("validation_share", "shard_mb"):
        if getattr(options, flag) is not None:
            changes.append(f"{flag}={getattr(options, flag)}")
    if options.tokenizer is not None or options.vocabulary is not None:
        changes.append(f"tokenizer={_tokenizer(options)}")
    return load_recipe(options.recipe, [*options.set, *changes])


def _of_flags(options: argparse.Namespace) -> Recipe:
    if options.out is None:
        raise UserError("--out: give a folder for the shards.")
    if options.set:
        raise UserError(f"--set {options.set[0]}: belongs to --recipe.")
    if options.source == "text" and not options.input:
        raise UserError("--input: --source text needs at least one file or folder to read.")
    if options.source == "python-stdlib" and (options.input or options.field):
        raise UserError("--input and --field belong to --source text; drop them or change --source.")
    source = {"name": options.source, "kind": options.source, "input": [str(path) for path in options.input]}
    if options.field:
        source["options"] = {"field": options.field}
    cleaning = {"unicode": "off", "control": False, "broken": "drop", "tag": False, "quality": "off"}
    tree: dict[str, Any] = {
        "out": str(options.out),
        "tokenizer": _tokenizer(options),
        # As they are, but for what cannot be read and what is there twice.
        "clean": {**cleaning, "repetition": "off", "exact": True, "near": False},
        "sources": [source],
        "max_unreadable": 1.0,
    }
    for flag in ("validation_share", "shard_mb"):
        if getattr(options, flag) is not None:
            tree[flag] = getattr(options, flag)
    return parse_recipe(tree, "command line")


def _tokenizer(options: argparse.Namespace) -> dict[str, Any]:
    if options.tokenizer is None:
        return {"train": options.vocabulary or _VOCABULARY}
    return {"bytes": True} if options.tokenizer == "bytes" else {"file": options.tokenizer}


def _prepare(options: argparse.Namespace, recipe: Recipe, team: WorkerGroup) -> None:
    if options.dry_run:
        if team.rank == 0:
            _look(recipe)
        return
    held: list[int] = []
    try:
        team.on_main(lambda: held.append(acquire_lock(recipe.out)))
        if team.world > 1 or options.workers == 1:
            index = prepare(recipe, team, options.force)
        else:
            job = {"recipe": recipe.model_dump(mode="json"), "force": options.force}
            with start_workers(options.workers, job, held) as started:
                index = prepare(recipe, started, options.force)
        if team.rank == 0:
            _say(recipe, index)
    finally:
        for descriptor in held:
            release_lock(recipe.out, descriptor)


def _look(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = scan(recipe, Path(folder))
    check_readable(recipe, records)
    print(summarize_records(recipe, records))
    print(f"dry run: {recipe.out} was not touched")


def _say(recipe: Recipe, index: Index | None) -> None:
    if index is None:
        print(f"{recipe.out} is finished, from the same recipe and sources: nothing to do")
        return
    print(
        f"wrote {recipe.out}: {index.tokens('train'):,} + {index.tokens('validation'):,} tokens, vocabulary "
        f"{index.vocabulary:,}, fingerprint {index.fingerprint[:12]}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
