"""`mixkabrn inspect`: verify a shard set and show what is in it."""

from __future__ import annotations

import argparse

from kabrn_dist.cli.arguments import Subparsers, add_command, given_path, whole_number

DESCRIPTION = """Compares every shard with the hash in index.json, and prints the number of shards, documents, tokens
and bytes of each source, with the beginnings of some documents."""

EXAMPLES = """  mixkabrn inspect data/python-stdlib
  mixkabrn inspect data/python-stdlib --documents 10
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn inspect`."""
    parser = add_command(
        subparsers, "inspect", run, "verify every shard of a folder, print totals and samples", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("folder", type=given_path, metavar="DIR", help="folder that `mixkabrn prepare` wrote")
    parser.add_argument("--documents", type=whole_number, default=3, metavar="N", help="samples per source (default 3)")


def run(options: argparse.Namespace) -> int:
    """Verify and print; return the exit code."""
    from data_prep.inspect import inspect_shards

    inspect_shards(options.folder, options.documents)
    return 0
