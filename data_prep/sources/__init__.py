"""Where texts come from: one file a source, each yields documents in a stable order."""

from __future__ import annotations

from typing import NamedTuple


class Document(NamedTuple):
    """One text. `text` is None when the source had to skip it because it is not UTF-8."""

    name: str
    text: str | None
