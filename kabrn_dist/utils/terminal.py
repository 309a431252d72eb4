"""Text of others on a terminal: what would move the cursor, change colors or type commands is shown as a dot."""

from __future__ import annotations


def escape_controls(text: str) -> str:
    r"""Return a text without characters that a terminal would obey, but with its lines and tabs.

    >>> escape_controls("one\n\ttwo\x1b[2J\r")
    'one\n\ttwo·[2J·'
    """
    return "".join(char if char.isprintable() or char in "\n\t" else "·" for char in text)
