"""Texts as arrays: the words of a text, where they are and a 64-bit hash of each, without a loop over words.

Scripts that put no blanks between words (Han, Kana, Thai, Lao, Khmer, Burmese, Tibetan) count every character as
a word. All arithmetic on hashes is modulo 2^64.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

# Classes of characters.
OTHER, WHITESPACE, LETTER, DIGIT, UNSPACED = range(5)

_UNSPACED_RANGES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x109F),  # Tibetan, Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
# Odd, with 3 as the remainder by 4: powers of it differ in all but the lowest bits.
_BASE = 0x9E3779B97F4A7C13
_INVERSE = pow(_BASE, -1, 1 << 64)
_JOIN = np.uint64(0xD6E8FEB86659FD93)
_PIECE = 1 << 15
_USUAL = 1 << 16
_WHITESPACE = re.compile(r"\s")


class HashedWords(NamedTuple):
    """Words of a text in order: they are the characters [start, stop), int64 each; their hashes, uint64."""

    starts: np.ndarray
    stops: np.ndarray
    hashes: np.ndarray


class WordShapes(NamedTuple):
    """Words of a text in order: lengths in characters, int64; bool each: holds a letter, is one unspaced character."""

    lengths: np.ndarray
    has_letter: np.ndarray
    is_unspaced: np.ndarray


def measure_whitespace_words(text: str) -> WordShapes:
    """Return the shapes of the words between blanks, punctuation and all."""
    return WordShapes(*_concatenate([_measure_piece(piece) for _, piece in _split_pieces(text)]))


def hash_whitespace_words(text: str) -> HashedWords:
    """Return the words between blanks, punctuation and all."""
    return HashedWords(*_concatenate([_hash_whitespace_piece(place, piece) for place, piece in _split_pieces(text)]))


def hash_alphanumeric_words(text: str, merge_numbers: bool = False) -> HashedWords:
    """Return the words of letters and digits; neither their case nor what stands between them is in the hashes.

    `numbers_alike`: every run of digits hashes as one 0.
    """
    return HashedWords(
        *_concatenate([_hash_alphanumeric_piece(place, piece, merge_numbers) for place, piece in _split_pieces(text)])
    )


def is_mostly_unspaced(text: str, words: HashedWords) -> bool:
    """Return whether half of the words or more are single characters of a script without blanks."""
    if text.isascii():
        return False
    kinds = classify(code_points(text))
    return bool(np.count_nonzero(kinds[words.starts] == UNSPACED) * 2 >= max(len(words.starts), 1))


def _split_pieces(text: str) -> Iterator[tuple[int, str]]:
    """Yield pieces of the text that end at blanks, with their places: arrays of them stay in the cache."""
    start = 0
    while start < len(text) or start == 0:
        blank = _WHITESPACE.search(text, start + _PIECE)
        stop = blank.start() if blank else len(text)
        yield start, text[start:stop]
        start = max(stop, 1)


def _concatenate(parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return parts[0] if len(parts) == 1 else tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def _measure_piece(piece: str) -> tuple[np.ndarray, ...]:
    kinds = classify(code_points(piece))
    starts, stops = find_segments(kinds, kinds != WHITESPACE)
    letters = np.zeros(len(kinds) + 1, np.int32)
    np.cumsum((kinds == LETTER) | (kinds == UNSPACED), out=letters[1:])
    return stops - starts, letters[stops] > letters[starts], kinds[starts] == UNSPACED


def _hash_whitespace_piece(place: int, piece: str) -> tuple[np.ndarray, ...]:
    points = code_points(piece)
    kinds = classify(points)
    starts, stops = find_segments(kinds, kinds != WHITESPACE)
    return starts + place, stops + place, hash_segments(points, starts, stops)


def _hash_alphanumeric_piece(place: int, piece: str, numbers_alike: bool) -> tuple[np.ndarray, ...]:
    points = code_points(lower_in_place(piece))
    kinds = classify(points)
    starts, stops = find_segments(kinds, kinds >= LETTER)
    digits = kinds == DIGIT
    if not numbers_alike or not digits.any():
        return starts + place, stops + place, hash_segments(points, starts, stops)
    points = np.where(digits, points.dtype.type(ord("0")), points)
    counts = np.ones(len(points), bool)
    counts[1:] = ~(digits[1:] & digits[:-1])
    places = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return starts + place, stops + place, hash_segments(points[counts], places[starts], places[stops])


def lower_in_place(text: str) -> str:
    """Return `text` in lower case, of the same length: the few letters that become two stay."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(small if len(small := letter.lower()) == 1 else letter for letter in text)


def code_points(text: str) -> np.ndarray:
    """Return the code points of `text`, uint8 [characters] where it is ASCII, else uint32."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def classify(points: np.ndarray) -> np.ndarray:
    """Return the class of each code point, uint8."""
    return (_ascii_table() if points.dtype == np.uint8 else _table())[points]


def find_segments(classes: np.ndarray, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and stops, int64, of the runs where `within` is true; characters of class ALONE are runs."""
    size = len(classes)
    if not size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    edges = np.empty(size + 1, bool)
    edges[0], edges[size] = True, True
    np.not_equal(within[1:], within[:-1], out=edges[1:size])
    alone = classes == UNSPACED
    if alone.any():
        edges[:size] |= alone
        edges[1:] |= alone
    cuts = np.flatnonzero(edges)
    kept = within[cuts[:-1]]
    return cuts[:-1][kept], cuts[1:][kept]


def hash_segments(points: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return a hash of each run of characters, uint64: Σ r(c_i)·B^i over the run, r random by code point, mixed."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    powers, inverses = _powers(len(points))
    values = _random_values()[points] if points.dtype == np.uint8 else mix_hashes(points.astype(np.uint64))
    sums = np.zeros(len(points) + 1, np.uint64)
    np.cumsum(values * powers[: len(points)], out=sums[1:])
    return mix_hashes((sums[stops] - sums[starts]) * inverses[starts] + (stops - starts).astype(np.uint64))


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return a hash of every `n` hashes in a row, uint64 [max(len − n + 1, 0)]."""
    count = max(len(hashes) - n + 1, 0)
    found = hashes[:count]
    for step in range(1, n):
        found = combine_hashes(found, hashes[step : step + count])
    return mix_hashes(found)


def combine_hashes(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return hashes of pairs in order, uint64: what hashes a run, and the hash of the word that follows it."""
    return before * _JOIN + after


def mix_hashes(values: np.ndarray) -> np.ndarray:
    """Return splitmix64's finaliser of each uint64 value plus its increment: a bijection that looks random."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return B^i and B^−i for i below `size` or more."""
    return _usual_powers() if size <= _USUAL else _powers_up_to(size)


@cache
def _usual_powers() -> tuple[np.ndarray, np.ndarray]:
    return _powers_up_to(_USUAL)


def _powers_up_to(size: int) -> tuple[np.ndarray, np.ndarray]:
    powers, inverses = (np.full(size, base, np.uint64) for base in (_BASE, _INVERSE))
    powers[0] = inverses[0] = 1
    return np.cumprod(powers, dtype=np.uint64), np.cumprod(inverses, dtype=np.uint64)


@cache
def _random_values() -> np.ndarray:
    return mix_hashes(np.arange(128, dtype=np.uint64))


@cache
def _ascii_table() -> np.ndarray:
    return np.array([classify_character(chr(point)) for point in range(128)], np.uint8)


@cache
def _table() -> np.ndarray:
    # Above the second plane there are only Han, selectors (marks), and what no one has assigned.
    table = np.zeros(0x110000, np.uint8)
    table[:0x20000] = [classify_character(chr(point)) for point in range(0x20000)]
    table[0x20000:0x40000] = UNSPACED
    table[0xE0100:0xE01F0] = LETTER
    return table


def classify_character(letter: str) -> int:
    """Return the class of a character below U+20000: marks count as letters, all of category N as digits."""
    if letter.isspace():
        return WHITESPACE
    category = unicodedata.category(letter)
    if category[0] == "N":
        return DIGIT
    if category[0] not in "LM":
        return OTHER
    point = ord(letter)
    return UNSPACED if any(low <= point <= high for low, high in _UNSPACED_RANGES) else LETTER
