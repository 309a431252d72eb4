"""What becomes of a document that is not kept."""

from __future__ import annotations

from typing import NamedTuple

from data_prep.documents import Document


class RemovedDocument(NamedTuple):
    """A document that was removed, why (a short name to count by), and the particulars where there are any."""

    reason: str
    document: Document
    detail: str = ""
