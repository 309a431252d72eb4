"""The command line: `python -m data_prep --help`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.inspect import inspect
from data_prep.prepare import Corpus, Plan, check_plan, collect, prepare
from data_prep.sources import Document, python_stdlib, text
from kabrn_dist.data.index import Source
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.errors import UserError

_VOCABULARY = 4096

_EXAMPLES = """examples:
  python -m data_prep --source python-stdlib --out data/python
      Python's own library, about 12 MB: needs no network
  python -m data_prep --source text --input books/ notes.jsonl.zst --out data/books
      your own .txt (a document each) and .jsonl (a document a line), also as .gz or .zst
  python -m data_prep --source text --input books/ --out data/books --tokenizer bytes --dry-run
      look before you write; bytes as tokens
  python -m data_prep inspect data/books
      check every shard of a finished folder and show samples (see: python -m data_prep inspect --help)
"""


def main(arguments: Sequence[str]) -> int:
    """Run one command; return 0, 2 after a UserError (one line on stderr), or 130 after Ctrl-C."""
    try:
        if arguments[:1] == ["inspect"]:
            _inspect(arguments[1:])
        else:
            _prepare(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: an unfinished --out has no index; run again with --force", file=sys.stderr)
        return 130
    return 0


def _inspect(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep inspect",
        description="Verify every shard of a folder, print totals and samples.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that data_prep wrote")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="samples to show (default 3)")
    options = parser.parse_args(arguments)
    inspect(options.folder, options.documents)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Turn texts into tokenised shards. Exact duplicates are dropped, documents are shuffled, "
        "the same input gives the same bytes, and the index is written last.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", required=True, choices=("python-stdlib", "text"), help="where the texts come from")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    add("--input", nargs="+", type=Path, default=[], metavar="PATH", help="text: files or folders to read")
    add("--field", metavar="KEY", help='text: the key of the text in a .jsonl line (default "text")')
    add("--vocabulary", type=int, metavar="N", help=f"ids of the trained tokenizer (default {_VOCABULARY})")
    add(
        "--tokenizer",
        metavar="bytes|FILE.json",
        help="use bytes or this tokenizer.json instead of training one",
    )
    add(
        "--validation-share",
        type=float,
        default=0.05,
        metavar="X",
        help="share of documents held out (default 0.05)",
    )
    add("--shard-mb", type=float, default=64, metavar="MB", help="size of a shard (default 64)")
    add("--dry-run", action="store_true", help="read and count the documents, write nothing")
    add("--force", action="store_true", help="replace the data in --out")
    return parser


def _prepare(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    if options.tokenizer is not None and options.vocabulary is not None:
        raise UserError(f"--vocabulary {options.vocabulary}: --tokenizer {options.tokenizer} brings its own; drop one.")
    source, documents = _source(options)
    plan = Plan(
        out=options.out,
        source=source,
        tokenizer=_tokenizer(options.tokenizer),
        vocabulary=_VOCABULARY if options.vocabulary is None else options.vocabulary,
        validation_share=options.validation_share,
        shard_bytes=int(options.shard_mb * 1e6),
        force=options.force,
    )
    check_plan(plan)
    corpus = collect(documents, plan.validation_share)
    _print_corpus(corpus)
    if options.dry_run:
        print(f"dry run: {plan.out} was not touched")
        return
    index = prepare(plan, corpus)
    print(
        f"wrote {plan.out}: {index.train.tokens:,} + {index.validation.tokens:,} tokens, vocabulary "
        f"{index.vocabulary:,}, fingerprint {index.fingerprint[:12]}"
    )


def _source(options: argparse.Namespace) -> tuple[Source, Iterator[Document]]:
    share = options.validation_share
    if options.source == "python-stdlib":
        if options.input or options.field:
            raise UserError("--input and --field belong to --source text; drop them or change --source.")
        described = Source(
            name="python-stdlib", options={"python": platform.python_version(), "validation_share": share}
        )
        return described, python_stdlib.documents()
    if not options.input:
        raise UserError("--input: --source text needs at least one file or folder to read.")
    field = options.field or "text"
    # Names without their folders: the same data prepared elsewhere keeps its fingerprint.
    names = tuple(path.name for path in options.input)
    described = Source(name="text", options={"input": names, "field": field, "validation_share": share})
    return described, text.documents(text.find_files(options.input), field)


def _tokenizer(choice: str | None) -> Tokenizer | None:
    if choice is None:
        return None
    return Tokenizer.of_bytes() if choice == "bytes" else Tokenizer.load(Path(choice))


def _print_corpus(corpus: Corpus) -> None:
    first = f" (first: {corpus.not_utf8[0]})" if corpus.not_utf8 else ""
    print(
        f"documents: {len(corpus.train):,} train, {len(corpus.validation):,} validation; left out "
        f"{corpus.duplicates:,} duplicates, {corpus.empty:,} empty, {len(corpus.not_utf8):,} not UTF-8{first}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
