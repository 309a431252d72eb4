"""`mixkabrn config`: the reference of the configuration's keys."""

from __future__ import annotations

import argparse
import re
import sys

from kabrn_dist.cli.arguments import Subparsers, add_command

DESCRIPTION = """Prints type, default and meaning of each key of a configuration file: of all sections, of one
section, or of one key."""

EXAMPLES = """  mixkabrn config
  mixkabrn config parallel
  mixkabrn config model.experts.top_k
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn config`."""
    parser = add_command(subparsers, "config", run, "describe the keys of a configuration file", DESCRIPTION, EXAMPLES)
    parser.add_argument("name", nargs="?", metavar="SECTION|KEY", help="section or key to describe (default: all)")


def run(options: argparse.Namespace) -> int:
    """Print the reference; return the exit code."""
    from kabrn_dist.config.reference import describe_config

    text = describe_config(options.name)
    print(_without_markup(text) if sys.stdout is not None and sys.stdout.isatty() else text)
    return 0


def _without_markup(markdown: str) -> str:
    """The text as a terminal should show it."""
    return re.sub(r"^## |\*\*|`", "", markdown, flags=re.MULTILINE)
