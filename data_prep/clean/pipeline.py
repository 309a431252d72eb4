"""One document through all stages that need no other document."""

from __future__ import annotations

from typing import NamedTuple

from data_prep.clean.config import CleaningConfig
from data_prep.clean.contamination import EvaluationSets
from data_prep.clean.language import LanguageTag, identify_language
from data_prep.clean.quality import check_quality
from data_prep.clean.removed import RemovedDocument
from data_prep.clean.repetition import check_repetition
from data_prep.clean.unicode import normalize_document
from data_prep.documents import Document


class CleanDocument(NamedTuple):
    """A clean document with its language and the probability of that, None where none was asked for."""

    document: Document
    language: str | None = None
    probability: float | None = None


class Cleaner:
    """Cleans documents of one source. Picklable; the same document always gives the same outcome.

    `contaminants` are the evaluation sets that `settings.contamination` names, see `contamination.collect`.
    """

    def __init__(self, config: CleaningConfig, evaluation_sets: EvaluationSets | None = None) -> None:
        self.config = config
        self.evaluation_sets = evaluation_sets

    def __call__(self, document: Document) -> CleanDocument | RemovedDocument:
        """Return the clean document, or the reason why it is removed.

        A document that needs no change comes back as the same object. Raises UserError, naming the document,
        for broken encodings when the settings refuse them.
        """
        clean = normalize_document(document, self.config)
        if isinstance(clean, RemovedDocument):
            return clean
        assert clean.text is not None, "normalise removes what has no text"
        found = identify_language(clean.text) if self.config.tag else None
        removal = self._check(clean.text, found)
        if removal is not None:
            return RemovedDocument(removal[0], clean, removal[1])
        return CleanDocument(clean) if found is None else CleanDocument(clean, *found)

    def _check(self, text: str, language_tag: LanguageTag | None) -> tuple[str, str] | None:
        """Return why `text` is removed and the particulars, or None."""
        settings = self.config
        if settings.language and language_tag is not None:
            which = f"{language_tag.language} {language_tag.probability:.2f}"
            if language_tag.language not in settings.language:
                return "language", which
            if language_tag.probability < settings.min_probability:
                return "language uncertain", which
        reason = None
        if settings.quality == "gopher":
            reason = check_quality(text, settings.quality_limits, language_tag.language if language_tag else None)
        if reason is None and settings.repetition == "gopher":
            reason = check_repetition(text, settings.repetition_limits)
        if reason is not None:
            return reason, ""
        piece = self.evaluation_sets.find_match(text) if self.evaluation_sets is not None else None
        return None if piece is None else ("contamination", f"{piece.evaluation_set}: {piece.words}")
