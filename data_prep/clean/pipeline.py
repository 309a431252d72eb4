"""One document through all stages that need no other document."""

from __future__ import annotations

from typing import NamedTuple

from data_prep.clean.contamination import Contaminants
from data_prep.clean.language import Tag, tag
from data_prep.clean.quality import judge
from data_prep.clean.removed import Removed
from data_prep.clean.repetition import judge_repetition
from data_prep.clean.settings import Clean
from data_prep.clean.unicode import normalize_text
from data_prep.documents import Document


class Kept(NamedTuple):
    """A clean document with its language and the probability of that, None where none was asked for."""

    document: Document
    language: str | None = None
    probability: float | None = None


class Cleaner:
    """Cleans documents of one source. Picklable; the same document always gives the same outcome.

    `contaminants` are the evaluation sets that `settings.contamination` names, see `contamination.collect`.
    """

    def __init__(self, settings: Clean, contaminants: Contaminants | None = None) -> None:
        self.settings = settings
        self.contaminants = contaminants

    def __call__(self, document: Document) -> Kept | Removed:
        """Return the clean document, or the reason why it is removed.

        A document that needs no change comes back as the same object. Raises UserError, naming the document,
        for broken encodings when the settings refuse them.
        """
        clean = normalize_text(document, self.settings)
        if isinstance(clean, Removed):
            return clean
        assert clean.text is not None, "normalise removes what has no text"
        found = tag(clean.text) if self.settings.tag else None
        removal = self._judge(clean.text, found)
        if removal is not None:
            return Removed(removal[0], clean, removal[1])
        return Kept(clean) if found is None else Kept(clean, *found)

    def _judge(self, text: str, found: Tag | None) -> tuple[str, str] | None:
        """Return why `text` is removed and the particulars, or None."""
        settings = self.settings
        if settings.language and found is not None:
            which = f"{found.language} {found.probability:.2f}"
            if found.language not in settings.language:
                return "language", which
            if found.probability < settings.min_probability:
                return "language uncertain", which
        reason = None
        if settings.quality == "gopher":
            reason = judge(text, settings.quality_limits, found.language if found else None)
        if reason is None and settings.repetition == "gopher":
            reason = judge_repetition(text, settings.repetition_limits)
        if reason is not None:
            return reason, ""
        piece = self.contaminants.find(text) if self.contaminants is not None else None
        return None if piece is None else ("contamination", f"{piece.evaluation}: {piece.words}")
