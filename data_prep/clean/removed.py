"""Documents that cleaning removed."""

from __future__ import annotations

from typing import NamedTuple

from data_prep.documents import Document


class RemovedDocument(NamedTuple):
    """A document that was removed.

    Attributes:
        reason: short name of the reason, by which removed documents are counted.
        document: the document.
        detail: particulars, or "".
    """

    reason: str
    document: Document
    detail: str = ""
