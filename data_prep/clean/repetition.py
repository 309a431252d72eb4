"""Gopher's repetition rules (Rae et al., arXiv 2112.11446, table A1): what says the same over and over."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from data_prep.clean.config import RepetitionLimits
from data_prep.clean.tokenize_words import combine_hashes, hash_whitespace_words, is_mostly_unspaced

_LONGEST = 10
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")


class NgramFractions(NamedTuple):
    """Shares of one text, by the n of n-grams: of the most frequent (2 to 4), of all repeated ones (5 to 10)."""

    top: dict[int, float]
    repeated: dict[int, float]


def check_repetition(text: str, limits: RepetitionLimits) -> str | None:
    """Return the name of the first rule that `text` breaks, or None."""
    for name, pieces, most, most_characters in (
        ("lines", text.split("\n"), limits.max_line_share, limits.max_line_characters),
        ("paragraphs", _PARAGRAPH.split(text), limits.max_paragraph_share, limits.max_paragraph_characters),
    ):
        share, characters = measure_duplicate_pieces(pieces)
        if share > most:
            return f"repeated {name}"
        if characters > most_characters:
            return f"characters in repeated {name}"
    repeats = measure_repeated_ngrams(text)
    for n, share in repeats.top.items():
        if share > getattr(limits, f"max_top_{n}gram"):
            return f"top {n}-gram"
    for n, share in repeats.repeated.items():
        if share > getattr(limits, f"max_repeated_{n}gram"):
            return f"repeated {n}-grams"
    return None


def measure_duplicate_pieces(pieces: list[str]) -> tuple[float, float]:
    """Return the share of pieces that equal an earlier one, and of characters in them; blank pieces do not count."""
    filled = [piece for piece in map(str.strip, pieces) if piece]
    distinct = set(filled)
    if len(distinct) == len(filled):
        return 0.0, 0.0
    characters = sum(map(len, filled))
    return 1 - len(distinct) / len(filled), 1 - sum(map(len, distinct)) / characters


def measure_repeated_ngrams(text: str) -> NgramFractions:
    """Return how much of the text its frequent and its repeated n-grams hold, as shares of its words' characters.

    A top n-gram counts from its second occurrence on; of equally frequent ones the longest counts. A word is in a
    repeated n-gram when one that covers it has occurred before; a word in several counts once. Two characters of
    a script without blanks stand for a word.
    """
    words = hash_whitespace_words(text)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(words.stops - words.starts)])
    count, total = len(words.hashes), int(ends[-1])
    unit = 2 if is_mostly_unspaced(text, words) else 1
    repeats = NgramFractions(dict.fromkeys(range(2, 5), 0.0), dict.fromkeys(range(5, _LONGEST + 1), 0.0))
    # A run that occurs twice begins with a shorter one that does: what is left to look at shrinks fast.
    places, hashes = np.arange(count), words.hashes
    for size in range(2, _LONGEST * unit + 1):
        within = places <= count - size
        places = places[within]
        places, hashes, firsts = _select_repeated(
            places, combine_hashes(hashes[within], words.hashes[places + size - 1])
        )
        if not len(places):
            break
        n, part = divmod(size, unit)
        if not part and n in repeats.top:
            repeats.top[n] = _count_top_characters(ends[places + size] - ends[places], firsts) / total
        elif not part and n in repeats.repeated:
            repeats.repeated[n] = _count_covered_characters(_remove_positions(places, firsts), size, ends) / total
    return repeats


def _select_repeated(places: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the places whose hash occurs more than once, with it, equal ones together in order, and where each
    group of equal ones begins.
    """
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    same = np.zeros(len(hashes) + 1, bool)
    np.equal(hashes[1:], hashes[:-1], out=same[1:-1])
    kept = same[1:] | same[:-1]
    return places[order[kept]], hashes[kept], np.flatnonzero(~same[:-1][kept])


def _remove_positions(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    kept = np.ones(len(values), bool)
    kept[places] = False
    return values[kept]


def _count_top_characters(lengths: np.ndarray, firsts: np.ndarray) -> int:
    """Return occurrences × length of the most frequent n-gram."""
    counts = np.diff(firsts, append=len(lengths))
    return int((counts * lengths[firsts])[counts == counts.max()].max())


def _count_covered_characters(places: np.ndarray, size: int, ends: np.ndarray) -> int:
    """Return the characters of the words that runs of `size` words at `places` cover."""
    change = np.zeros(len(ends), np.int64)
    np.add.at(change, places, 1)
    np.add.at(change, places + size, -1)
    return int(np.diff(ends)[np.cumsum(change)[:-1] > 0].sum())
