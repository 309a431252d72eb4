"""`mixkabrn prepare`: texts to tokenized shards."""

from __future__ import annotations

import argparse

from data_prep import DEFAULT_VOCAB_SIZE
from kabrn_dist.cli.arguments import Subparsers, add_command, given_path, number, whole_number

DESCRIPTION = """Cleans documents as the recipe says, removes duplicates, shuffles the rest and writes tar shards with
an index. The same input gives the same bytes. A command that was stopped or killed continues where it was when it is
started again; finished stages are not repeated."""

EXAMPLES = """  mixkabrn prepare --source python-stdlib --out data/python-stdlib
      the source code of Python's standard library, about 12 MB: needs no network
  mixkabrn prepare --source text --input books/ notes.jsonl.zst --out data/books
      your own .txt (one document per file) and .jsonl (one per line), also as .gz or .zst
  mixkabrn prepare --recipe configs/data_mix.yaml --set root=/data --workers 8
      several sources, cleaned, without duplicates, mixed by weight, as the recipe says
  mpirun -n 64 mixkabrn prepare --recipe configs/data_mix.yaml --set root=/data
      the same bytes, made on several machines that share the folders
  mixkabrn prepare --source text --input books/ --out data/books --tokenizer bytes --dry-run
      bytes as tokens; read and count the documents, write nothing
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn prepare`."""
    parser = add_command(subparsers, "prepare", run, "turn texts into tokenized shards", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument(
        "--recipe", type=given_path, metavar="FILE", help="YAML file with sources, cleaning and weights"
    )
    origin.add_argument("--source", choices=("python-stdlib", "text"), help="a single source, which is not cleaned")
    add("--set", action="append", default=[], metavar="A.B=C", help="override a value of the recipe; may be repeated")
    add("--out", type=given_path, metavar="DIR", help="folder for the shards (default: the recipe's)")
    add(
        "--input",
        nargs="+",
        type=given_path,
        default=[],
        metavar="PATH",
        help="for --source text: files or folders to read",
    )
    add("--field", metavar="KEY", help='for --source text: key of the text in a .jsonl line (default "text")')
    add(
        "--unit",
        choices=("document", "line", "paragraph"),
        help="for --source text: what one document of a .txt is (default document: the file)",
    )
    add(
        "--vocabulary",
        type=whole_number,
        metavar="N",
        help=f"size of the tokenizer to train (default {DEFAULT_VOCAB_SIZE})",
    )
    add("--tokenizer", metavar="bytes|FILE.json", help="use bytes or this tokenizer.json instead of training one")
    add("--validation-share", type=number, metavar="X", help="fraction of the documents held out (default 0.05)")
    add("--shard-mb", type=number, metavar="MB", help="size of a shard in MB of tokens (default 64)")
    add(
        "--workers",
        type=whole_number,
        default=1,
        metavar="N",
        help="processes on this machine (default 1); or use mpirun",
    )
    add("--dry-run", action="store_true", help="read, clean and count the documents; write nothing")
    add("--force", action="store_true", help="replace the shard set in --out, or start an unfinished command again")


def run(options: argparse.Namespace) -> int:
    """Prepare the shards; return the exit code."""
    from data_prep.command import run_prepare

    return run_prepare(options)
