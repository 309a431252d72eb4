"""The exception for mistakes that a user can correct."""

from __future__ import annotations


class UserError(Exception):
    """Error in what the user gave; commands print its message without a traceback.

    The message names the key or file, the value found, and the remedy.
    """
