"""The folder where this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/kabrn_dist, by default ~/.cache/kabrn_dist.

    Raises:
        RuntimeError: for a user without a home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kabrn_dist"
