"""What the stages of a preparation pass on: documents, and units of work that yield documents."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Span(NamedTuple):
    """Characters `text[start:stop]` that carry loss.

    Attributes:
        start: index of the first character.
        stop: index after the last character.
    """

    start: int
    stop: int


class Document(NamedTuple):
    """One text and where it comes from.

    Attributes:
        name: its origin, such as "train/algebra/1.json" or "notes.jsonl byte 0".
        text: the text; None if it could not be read.
        spans: the characters that carry loss; None: all of them.
        key: key of a parallel text; documents of interleaved sources with the same key belong together.
        problem: why there is no text.
        raw: bytes that could not be decoded, which cleaning may repair.
        lost_bytes: number of bytes that could not be read, if it is known.
        mismatch: whether it could be read, but has another layout than its source expects.
        stretch: whether it is a part of a larger text.
        marks: of a conversation, the characters of each special token that its chat template wrote; None: no
            conversation.
        malformed: short name of what is wrong with a conversation, by which these are counted.
    """

    name: str
    text: str | None
    spans: tuple[Span, ...] | None = None
    key: str | None = None
    problem: str = ""
    raw: bytes | None = None
    lost_bytes: int = 0
    mismatch: bool = False
    stretch: bool = False
    marks: tuple[Span, ...] | None = None
    malformed: str = ""


class Unit(NamedTuple):
    """Unit of work: a whole file or archive, or a range of a file that is cut at line ends.

    Attributes:
        path: the file.
        name: its name without the folders above the input.
        bytes: size of the unit.
        start: first byte of the range.
        stop: byte after the range; −1: to the end of the file.
    """

    path: Path
    name: str
    bytes: int
    start: int = 0
    stop: int = -1
