"""Arguments that several commands share, and how their parsers are made."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from kabrn_dist.utils.errors import UserError

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
RunCommand: TypeAlias = Callable[[argparse.Namespace], int]


def add_command(
    subparsers: Subparsers, name: str, run: RunCommand, summary: str, description: str = "", examples: str = ""
) -> argparse.ArgumentParser:
    """Add the parser of one command.

    Args:
        subparsers: the parsers of the command above it.
        name: what the user types.
        run: called with the parsed options; returns the exit code.
        summary: one line for the list of commands, without a full stop.
        description: more about the command, shown in its own help below the summary.
        examples: commands that work, one a line.

    Returns:
        The parser, for the command's own arguments.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.\n\n{description}".rstrip(),
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Add the positional CONFIG and the option --set."""
    parser.add_argument("config", type=given_path, metavar="CONFIG", help=help_text)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="override one value of the configuration, e.g. training.steps=50; may be repeated",
    )


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """Add the positional RUN."""
    parser.add_argument(
        "folder", type=given_path, metavar="RUN", help="folder of the run (run.folder of its configuration)"
    )


def whole_number(text: str) -> int:
    """Return the integer in `text`.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; write it in digits, as 2000") from None


def number(text: str) -> float:
    """Return the number in `text`.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; write it as 0.05") from None


def non_negative_int(text: str) -> int:
    """Return the integer in `text`.

    Raises:
        argparse.ArgumentTypeError: if it is less than 0.
    """
    return _int_from(0, text)


def positive_int(text: str) -> int:
    """Return the integer in `text`.

    Raises:
        argparse.ArgumentTypeError: if it is less than 1.
    """
    return _int_from(1, text)


def _int_from(minimum: int, text: str) -> int:
    value = whole_number(text)
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
    return value


def given_path(text: str) -> Path:
    """Return the path that `text` names.

    Raises:
        argparse.ArgumentTypeError: if it is empty, as a variable of a script is that was never set, or longer than any
            path can be.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give one, such as . for the current folder")
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(f"the path {text[:40]}… is too long; give another one") from error
    return Path(text)


def check_new_file(out: Path, force: bool, *kept: Path) -> None:
    """Check that a file can be written under a name.

    Args:
        out: The file.
        force: Whether one that exists may be replaced.
        kept: What it is made of and may not take the place of.

    Raises:
        UserError: if something is there that may not be replaced.
    """
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file in it")
    if os.path.lexists(out):
        if not stat.S_ISREG(os.lstat(out).st_mode):
            raise UserError(f"{out}: is a link, a device or a pipe, no file of its own; name another file")
        if not force:
            raise UserError(f"{out}: exists already; name another file, or replace it with --force")
        for each in kept:
            if os.path.exists(each) and os.path.samefile(out, each):
                raise UserError(f"{out}: is what it would be made of, and would be lost; name another file")


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False
