"""The one exception for mistakes a user can mend: its message is all they see, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message names the key or file, the value found, and the remedy."""
