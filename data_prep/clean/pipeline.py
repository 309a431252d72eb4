"""Run a document through all stages of cleaning that need no other document."""

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
    """A document that was kept.

    Attributes:
        document: the clean document.
        language: its language; None if it was not identified.
        probability: probability of the language.
    """

    document: Document
    language: str | None = None
    probability: float | None = None


class Cleaner:
    """Cleans the documents of one source. Picklable; the same document always gives the same result.

    Args:
        config: how to clean.
        evaluation_sets: the sets that `config.contamination` names, from `contamination.load_evaluation_sets`.
    """

    def __init__(self, config: CleaningConfig, evaluation_sets: EvaluationSets | None = None) -> None:
        self.config = config
        self.evaluation_sets = evaluation_sets

    def __call__(self, document: Document) -> CleanDocument | RemovedDocument:
        """Return the clean document, or the reason why it is removed.

        A document that needs no change is returned as the same object.

        Raises:
            UserError: a broken encoding, if the configuration refuses these.
        """
        clean = normalize_document(document, self.config)
        if isinstance(clean, RemovedDocument):
            return clean
        assert clean.text is not None, "normalize_document removes documents without text"
        language_tag = identify_language(clean.text) if self.config.tag else None
        removal = self._check(clean.text, language_tag)
        if removal is not None:
            return RemovedDocument(removal[0], clean, removal[1])
        return CleanDocument(clean) if language_tag is None else CleanDocument(clean, *language_tag)

    def _check(self, text: str, language_tag: LanguageTag | None) -> tuple[str, str] | None:
        """Return the reason and the particulars if `text` is to be removed, or None."""
        config = self.config
        if config.language and language_tag is not None:
            detail = f"{language_tag.language} {language_tag.probability:.2f}"
            if language_tag.language not in config.language:
                return "language", detail
            if language_tag.probability < config.min_probability:
                return "language uncertain", detail
        reason = None
        if config.quality == "gopher":
            reason = check_quality(text, config.quality_limits, language_tag.language if language_tag else None)
        if reason is None and config.repetition == "gopher":
            reason = check_repetition(text, config.repetition_limits)
        if reason is not None:
            return reason, ""
        match = self.evaluation_sets.find_match(text) if self.evaluation_sets is not None else None
        return None if match is None else ("contamination", f"{match.evaluation_set}: {match.words}")
