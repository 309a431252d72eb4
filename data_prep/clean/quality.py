"""Gopher's quality rules (Rae et al., arXiv 2112.11446, A1.1), which tell prose from other content."""

from __future__ import annotations

import re

import numpy as np

from data_prep.clean.config import QualityLimits
from data_prep.clean.tokenize_words import WordShapes, measure_whitespace_words

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

_STOP_WORD = re.compile(rf"\b(?:{'|'.join(STOP_WORDS)})\b", re.IGNORECASE)
_BULLETS = ("•", "‣", "▪", "●", "◦", "⁃", "-", "*")
_ELLIPSES = ("...", "…")


def check_quality(text: str, limits: QualityLimits, language: str | None) -> str | None:
    """Return the name of the first rule that a text breaks, or None.

    Words are separated by whitespace. In scripts without spaces every character is a word, and the mean length of words
    is not checked.

    Args:
        text: the text.
        limits: the limits.
        language: its language; the rule about stop words is only for "en".
    """
    shapes = measure_whitespace_words(text)
    return (
        _check_words(shapes, limits)
        or _check_symbols(text, len(shapes.lengths), limits)
        or _check_lines(text, limits)
        or ("stop words" if language == "en" and not _has_stop_words(text, limits.min_stop_words) else None)
    )


def _check_words(shapes: WordShapes, limits: QualityLimits) -> str | None:
    count = len(shapes.lengths)
    if not limits.min_words <= count <= limits.max_words:
        return "too few words" if count < limits.min_words else "too many words"
    if not count:
        return None
    mean = shapes.lengths.sum() / count
    spaced = np.count_nonzero(shapes.is_unspaced) * 2 < count
    if spaced and not limits.min_mean_word_length <= mean <= limits.max_mean_word_length:
        return "words too short" if mean < limits.min_mean_word_length else "words too long"
    few_letters = np.count_nonzero(shapes.has_letter) < limits.min_letter_words * count
    return "words without letters" if few_letters else None


def _check_symbols(text: str, words: int, limits: QualityLimits) -> str | None:
    limit = limits.max_symbols_per_word * words
    if text.count("#") > limit:
        return "hash signs"
    if sum(map(text.count, _ELLIPSES)) > limit:
        return "ellipses"
    return None


def _check_lines(text: str, limits: QualityLimits) -> str | None:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if sum(line.startswith(_BULLETS) for line in lines) > limits.max_bullet_lines * len(lines):
        return "bullet lines"
    if sum(line.endswith(_ELLIPSES) for line in lines) > limits.max_ellipsis_lines * len(lines):
        return "ellipsis lines"
    return None


def _has_stop_words(text: str, minimum: int) -> bool:
    found: set[str] = set()
    for match in _STOP_WORD.finditer(text) if minimum else ():
        found.add(match[0].lower())
        if len(found) >= minimum:
            return True
    return len(found) >= minimum
