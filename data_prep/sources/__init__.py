"""Where texts come from: one file a source; each cuts its input into units and yields the documents of a unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from data_prep.documents import Document, Unit
from data_prep.sources.files import FileGroup

__all__ = ["DataSource", "Document", "FileGroup", "Unit"]


class DataSource(Protocol):
    """A published data set or somebody's files. Sources can be pickled: workers get a copy.

    Raises UserError where the input is not what the source reads; single bad files are documents without text.
    """

    @property
    def kind(self) -> str:
        """The name that recipes call it by."""

    @property
    def license(self) -> str:
        """What the publisher asks for, "" where that is not known."""

    @property
    def masked(self) -> bool:
        """Whether the documents have spans: the loss counts on answers only."""

    def units(self) -> Sequence[Unit | FileGroup]:
        """Return the pieces of work, sorted by name and the same for any number of workers. Cheap."""

    def read(self, unit: Unit | FileGroup) -> Iterator[Document]:
        """Yield the documents of a unit in order, in bounded memory."""
