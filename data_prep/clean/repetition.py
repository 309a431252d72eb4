"""Gopher's repetition rules (Rae et al., arXiv 2112.11446, table A1), which find repetitive texts."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from data_prep.clean.config import RepetitionLimits
from data_prep.clean.tokenize_words import combine_hashes, hash_whitespace_words, is_mostly_unspaced

_LONGEST = 10
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")


class NgramFractions(NamedTuple):
    """Fractions of the characters of a text that are in n-grams, by n.

    Attributes:
        top: in the most frequent n-gram, n from 2 to 4.
        repeated: in all repeated n-grams, n from 5 to 10.
    """

    top: dict[int, float]
    repeated: dict[int, float]


def check_repetition(text: str, limits: RepetitionLimits) -> str | None:
    """Return the name of the first rule that `text` breaks, or None."""
    for name, pieces, max_fraction, max_characters in (
        ("lines", text.split("\n"), limits.max_line_share, limits.max_line_characters),
        ("paragraphs", _PARAGRAPH.split(text), limits.max_paragraph_share, limits.max_paragraph_characters),
    ):
        fraction, characters = measure_duplicate_pieces(pieces)
        if fraction > max_fraction:
            return f"repeated {name}"
        if characters > max_characters:
            return f"characters in repeated {name}"
    repeats = measure_repeated_ngrams(text)
    for n, fraction in repeats.top.items():
        if fraction > getattr(limits, f"max_top_{n}gram"):
            return f"top {n}-gram"
    for n, fraction in repeats.repeated.items():
        if fraction > getattr(limits, f"max_repeated_{n}gram"):
            return f"repeated {n}-grams"
    return None


def measure_duplicate_pieces(pieces: list[str]) -> tuple[float, float]:
    """Return the fraction of pieces that equal an earlier one, and of characters in them; blank pieces do not count."""
    filled = [piece for piece in map(str.strip, pieces) if piece]
    distinct = set(filled)
    if len(distinct) == len(filled):
        return 0.0, 0.0
    characters = sum(map(len, filled))
    return 1 - len(distinct) / len(filled), 1 - sum(map(len, distinct)) / characters


def measure_repeated_ngrams(text: str) -> NgramFractions:
    """Measure which fractions of a text's characters are in its most frequent and in its repeated n-grams.

    The most frequent n-gram must occur twice; among equally frequent ones the longest counts. A word is in a repeated
    n-gram if an n-gram that covers it has occurred before; a word in several of them counts once. In scripts without
    spaces, two characters count as a word.
    """
    words = hash_whitespace_words(text)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(words.stops - words.starts)])
    count, total = len(words.hashes), int(ends[-1])
    unit = 2 if is_mostly_unspaced(text, words) else 1
    repeats = NgramFractions(dict.fromkeys(range(2, 5), 0.0), dict.fromkeys(range(5, _LONGEST + 1), 0.0))
    # An n-gram that occurs twice begins with a shorter one that does, so the number of candidates shrinks fast.
    positions, hashes = np.arange(count), words.hashes
    for size in range(2, _LONGEST * unit + 1):
        within = positions <= count - size
        positions = positions[within]
        positions, hashes, firsts = _select_repeated(
            positions, combine_hashes(hashes[within], words.hashes[positions + size - 1])
        )
        if not len(positions):
            break
        n, part = divmod(size, unit)
        if not part and n in repeats.top:
            repeats.top[n] = _count_top_characters(ends[positions + size] - ends[positions], firsts) / total
        elif not part and n in repeats.repeated:
            repeats.repeated[n] = _count_covered_characters(_remove_positions(positions, firsts), size, ends) / total
    return repeats


def _select_repeated(positions: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Select the positions whose hash occurs more than once.

    Returns:
        These positions with equal hashes next to each other, the hashes, and the index where each group begins.
    """
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    same = np.zeros(len(hashes) + 1, bool)
    np.equal(hashes[1:], hashes[:-1], out=same[1:-1])
    repeated = same[1:] | same[:-1]
    return positions[order[repeated]], hashes[repeated], np.flatnonzero(~same[:-1][repeated])


def _remove_positions(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    remaining = np.ones(len(values), bool)
    remaining[positions] = False
    return values[remaining]


def _count_top_characters(lengths: np.ndarray, firsts: np.ndarray) -> int:
    """Return the number of occurrences × length of the most frequent n-gram."""
    counts = np.diff(firsts, append=len(lengths))
    return int((counts * lengths[firsts])[counts == counts.max()].max())


def _count_covered_characters(positions: np.ndarray, size: int, ends: np.ndarray) -> int:
    """Return the number of characters of the words that n-grams of `size` words at `positions` cover."""
    change = np.zeros(len(ends), np.int64)
    np.add.at(change, positions, 1)
    np.add.at(change, positions + size, -1)
    return int(np.diff(ends)[np.cumsum(change)[:-1] > 0].sum())
