"""The language of a text, by py3langid's naive Bayes over byte n-grams (97 languages, offline)."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import NamedTuple

import numpy as np
from py3langid.langid import MODEL_FILE, LanguageIdentifier

# More text costs time in proportion; on one manual in 29 languages 500 characters give what 2,000 do.
CLASSIFIED_CHARACTERS = 1000

UNDETERMINED = "und"


class LanguageTag(NamedTuple):
    """A language (ISO 639-1, or `UNDETERMINED`) and its probability, to four digits."""

    language: str
    probability: float


def identify_language(text: str) -> LanguageTag:
    """Return the language of the first `SAMPLE_CHARACTERS` of `text`; undetermined where that has no letters."""
    sample = text[:CLASSIFIED_CHARACTERS]
    if not any(map(str.isalpha, sample)):
        return LanguageTag(UNDETERMINED, 0.0)
    language, probability = _identifier().classify(sample)
    return LanguageTag(str(language), round(float(probability), 4))


class _Identifier(LanguageIdentifier):
    """The library multiplies in fp32 by BLAS, where the last digits depend on the threads; here they do not."""

    __slots__ = ()

    def _sparse_score(self, visits: Counter[int], table: np.ndarray) -> np.ndarray:
        features = np.fromiter(visits.keys(), np.intp, len(visits))
        counts = np.fromiter(visits.values(), np.float64, len(visits))
        return (np.log1p(counts)[:, None] * table[features]).sum(0) + self.nb_pc


@cache
def _identifier() -> _Identifier:
    # Reading the model takes a third of a second: once a process.
    return _Identifier.from_model_file(MODEL_FILE, norm_probs=True)
