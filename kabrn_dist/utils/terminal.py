"""Standard streams that may be closed or full, and text of others on a terminal."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def open_closed_streams() -> None:
    """Open /dev/null in the place of the standard streams that whoever started this process has closed.

    The next file to be opened would get the number of one, and what a library prints would be written into that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def is_stdout_full() -> bool:
    """Return whether nothing can be written to stdout, such as a file on a full disk; otherwise a line end is."""
    with suppress(OSError):
        os.write(1, b"\n")
        return False
    return True


def discard_output(*streams: TextIO | None) -> None:
    """Send what is still written to these streams nowhere, so that the end of the interpreter cannot fail."""
    for stream in streams:
        if stream is not None:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def escape_controls(text: str) -> str:
    r"""Return a text without characters that a terminal would obey, but with its lines and tabs.

    >>> escape_controls("one\n\ttwo\x1b[2J\r")
    'one\n\ttwo·[2J·'
    """
    return "".join(char if char.isprintable() or char in "\n\t" else "·" for char in text)
