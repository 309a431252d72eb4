"""What the stages of preparation hand to each other: documents, and pieces of work that yield them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Span(NamedTuple):
    """The characters `text[start:stop]`, on which there is loss."""

    start: int
    stop: int


class Document(NamedTuple):
    """One text and where it is from, such as "train/algebra/1.json" or "notes.jsonl line 3".

    `text` is None where there is none (`problem` says why; `raw` holds bytes that could not be decoded, for the
    cleaning to repair). `spans` None: all of it carries loss. Parallel texts share a `key`.
    """

    name: str
    text: str | None
    spans: tuple[Span, ...] | None = None
    key: str | None = None
    problem: str = ""
    raw: bytes | None = None


class Unit(NamedTuple):
    """A piece of work of `bytes` bytes: a whole file or archive, or `[start, stop)` of a file cut at line ends.

    `stop` −1: to the end. `name` is the file's name without the folders above the input.
    """

    path: Path
    name: str
    bytes: int
    start: int = 0
    stop: int = -1
