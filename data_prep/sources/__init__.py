"""Sources of texts, one module each. A source divides its inputs into units and yields the documents of a unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from data_prep.documents import Document, Unit
from data_prep.sources.files import FileGroup

__all__ = ["DataSource", "Document", "FileGroup", "Unit"]


class DataSource(Protocol):
    """A published data set or a user's files.

    Methods raise UserError if an input is not what the source reads. A single bad file is a document without text.

    Attributes:
        left_out: number of files that the methods below have left out, by reason.
        expected: the layout in words, for messages.
    """

    left_out: Counter[str]

    @property
    def expected(self) -> str:
        """The layout in words, for messages."""

    @property
    def kind(self) -> str:
        """Name of the kind in recipes."""

    @property
    def license(self) -> str:
        """License of the publisher; "" if it is not known."""

    @property
    def masked(self) -> bool:
        """Whether the documents have spans, because only answers carry loss."""

    def units(self) -> Sequence[Unit | FileGroup]:
        """Return the units of work, sorted by name and the same for any number of workers. This is cheap."""

    def read(self, unit: Unit | FileGroup) -> Iterator[Document]:
        """Yield the documents of a unit in order, in bounded memory."""
