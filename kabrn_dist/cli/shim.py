"""The scripts in launch/: their flags as the arguments of `mixkabrn`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kabrn_dist.cli.main import EXIT_USER_ERROR, main


def run_script(command: Sequence[str], flags: Sequence[str], arguments: Sequence[str]) -> int:
    """Run a command of `mixkabrn` whose positional arguments are given as flags.

    Args:
        command: the command, such as `["train"]`.
        flags: the flags, such as `--run`, in the order of the positional arguments that their values become.
        arguments: what the user typed.

    Returns:
        The exit code.
    """
    values: dict[str, str] = {}
    others: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag in flags:
            values[flag] = value if equals else next(remaining, "")
            if not values[flag]:
                print(f"error: {flag}: give it a value; see mixkabrn {command[0]} --help", file=sys.stderr)
                return EXIT_USER_ERROR
        else:
            others.append(argument)
    positionals = [values[flag] for flag in flags if flag in values]
    return main([*command, *positionals, *others])
