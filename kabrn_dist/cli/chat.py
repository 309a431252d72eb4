"""`mixkabrn chat`: talk to a model file by the runtime in C, without torch, or to a run that learns meanwhile."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kabrn_dist.cli.arguments import Subparsers, add_command, given_path, is_installed
from kabrn_dist.utils.errors import UserError

DESCRIPTION = """Of a model file: compiles the runtime, one C file, into the cache folder if that has not been done,
and starts its chat in place of this command. What was said is kept as a state of fixed size: no turn reads it again.
Options after FILE are the runtime's: `mixkabrn chat FILE --help` shows them. The same program runs without Python:

  cc -O2 mixkabrn.c -o mixkabrn -lm -lpthread && ./mixkabrn chat FILE

Of a run or an export: chats in torch, and learns from corrections and notes; see `mixkabrn chat RUN --help`."""

EXAMPLES = """  mixkabrn chat tiny.mkb
  mixkabrn chat runs/tiny
  mixkabrn chat tiny.mkb --temperature 0.5 --threads 2
  mixkabrn chat tiny.mkb --adapter adapters/poems=0.5
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `mixkabrn chat`."""
    parser = add_command(
        subparsers, "chat", run, "talk to a model in the terminal, and teach it", DESCRIPTION, EXAMPLES
    )
    parser.add_argument(
        "model", type=given_path, metavar="FILE|RUN|EXPORT", help="file that `mixkabrn pack` wrote, or a folder"
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTION", help="options of either")


def run(options: argparse.Namespace) -> int:
    """Start the runtime in place of this process, or for a folder a chat that learns; return the exit code."""
    # A machine that only runs model files has no torch: it is told to pack the folder.
    if options.model.is_dir() and is_installed("torch"):
        from kabrn_dist.cli.chat_learn import run_folder

        return run_folder(options.model, options.options)
    check_model_file(options.model)
    return start_runtime("chat", options.model, options.options)


def check_order(arguments: Sequence[str]) -> None:
    """Refuse options in front of the file: they are not this command's, which does not know how many words they take.

    Args:
        arguments: What follows `chat`.

    Raises:
        UserError: for an option that comes first.
    """
    first = arguments[0] if arguments else ""
    if first.startswith("-") and first not in ("-h", "--help", "--"):
        raise UserError(f"{first}: options come after FILE, as in: mixkabrn chat FILE {first} …")


def start_runtime(command: str, model: Path, options: Sequence[str]) -> NoReturn:
    """Start the program in C in place of this process.

    Args:
        command: Its command, such as "chat".
        model: A model file.
        options: The options of the command; adapters as they are trained are converted.

    Raises:
        UserError: if it cannot be compiled or started, and for adapters that the model does not fit.
    """
    from kabrn_dist.runtime.adapter_cache import convert_adapter_options
    from kabrn_dist.runtime.build import compile_runtime

    options = convert_adapter_options(model, options)
    program = compile_runtime("program")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(program, ["mixkabrn", command, str(model), *options])
    except OSError as error:
        raise UserError(
            f"{program}: cannot be started ({error.strerror}); remove it, and it is compiled again"
        ) from error


def check_model_file(model: Path) -> None:
    """Refuse a folder, or a file that is not there, with what makes a model file.

    Raises:
        UserError: for either.
    """
    if model.is_dir():
        raise UserError(f"{model}: is a folder; pack it first: mixkabrn pack {model} --out model.mkb")
    if not model.exists():
        raise UserError(f"{model}: no such file; name one that `mixkabrn pack` wrote")
