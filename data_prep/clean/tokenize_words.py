"""Split texts into words as arrays: their positions and a 64-bit hash of each, without a loop over words.

In scripts without spaces between words (Han, Kana, Thai, Lao, Khmer, Burmese, Tibetan) every character counts as a
word. All arithmetic on hashes is modulo 2^64.
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
# Odd and 3 modulo 4, so that its powers differ in all but the lowest bits.
_BASE = 0x9E3779B97F4A7C13
_INVERSE = pow(_BASE, -1, 1 << 64)
_JOIN = np.uint64(0xD6E8FEB86659FD93)
_PIECE = 1 << 15
_USUAL = 1 << 16
_WHITESPACE = re.compile(r"\s")


class HashedWords(NamedTuple):
    """Words of a text, in order.

    Attributes:
        starts: index of the first character, int64 [words].
        stops: index after the last character, int64 [words].
        hashes: uint64 [words].
    """

    starts: np.ndarray
    stops: np.ndarray
    hashes: np.ndarray


class WordShapes(NamedTuple):
    """Properties of the words of a text, in order.

    Attributes:
        lengths: number of characters, int64 [words].
        has_letter: whether the word contains a letter, bool [words].
        is_unspaced: whether it is a single character of a script without spaces, bool [words].
    """

    lengths: np.ndarray
    has_letter: np.ndarray
    is_unspaced: np.ndarray


def measure_whitespace_words(text: str) -> WordShapes:
    """Return the properties of the words between whitespace, with their punctuation."""
    return WordShapes(*_concatenate([_measure_piece(piece) for _, piece in _split_pieces(text)]))


def hash_whitespace_words(text: str) -> HashedWords:
    """Return the words between whitespace, with their punctuation."""
    return HashedWords(
        *_concatenate([_hash_whitespace_piece(position, piece) for position, piece in _split_pieces(text)])
    )


def hash_alphanumeric_words(text: str, merge_numbers: bool = False) -> HashedWords:
    """Return the words of letters and digits. The hashes ignore case and everything between the words.

    Args:
        text: the text.
        merge_numbers: hash every sequence of digits as a single 0.
    """
    return HashedWords(
        *_concatenate(
            [_hash_alphanumeric_piece(position, piece, merge_numbers) for position, piece in _split_pieces(text)]
        )
    )


def is_mostly_unspaced(text: str, words: HashedWords) -> bool:
    """Return whether at least half of the words are single characters of a script without spaces."""
    if text.isascii():
        return False
    kinds = classify(code_points(text))
    return bool(np.count_nonzero(kinds[words.starts] == UNSPACED) * 2 >= max(len(words.starts), 1))


def _split_pieces(text: str) -> Iterator[tuple[int, str]]:
    """Yield (position, piece) of pieces that end at whitespace and whose arrays fit into the cache."""
    start = 0
    while start < len(text) or start == 0:
        whitespace = _WHITESPACE.search(text, start + _PIECE)
        stop = whitespace.start() if whitespace else len(text)
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


def _hash_whitespace_piece(position: int, piece: str) -> tuple[np.ndarray, ...]:
    points = code_points(piece)
    kinds = classify(points)
    starts, stops = find_segments(kinds, kinds != WHITESPACE)
    return starts + position, stops + position, hash_segments(points, starts, stops)


def _hash_alphanumeric_piece(position: int, piece: str, merge_numbers: bool) -> tuple[np.ndarray, ...]:
    points = code_points(lower_in_place(piece))
    kinds = classify(points)
    starts, stops = find_segments(kinds, kinds >= LETTER)
    digits = kinds == DIGIT
    if not merge_numbers or not digits.any():
        return starts + position, stops + position, hash_segments(points, starts, stops)
    points = np.where(digits, points.dtype.type(ord("0")), points)
    counts = np.ones(len(points), bool)
    counts[1:] = ~(digits[1:] & digits[:-1])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return starts + position, stops + position, hash_segments(points[counts], offsets[starts], offsets[stops])


def lower_in_place(text: str) -> str:
    """Return `text` in lower case with the same length: the few letters that would become two stay."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(small if len(small := letter.lower()) == 1 else letter for letter in text)


def code_points(text: str) -> np.ndarray:
    """Return the code points of `text` [characters], uint8 if it is ASCII, else uint32."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def classify(points: np.ndarray) -> np.ndarray:
    """Return the class of each code point, uint8 [characters]."""
    return (_ascii_table() if points.dtype == np.uint8 else _table())[points]


def find_segments(classes: np.ndarray, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and stops, int64, of the segments where `within` is true; a character of class UNSPACED is one."""
    size = len(classes)
    if not size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    edges = np.empty(size + 1, bool)
    edges[0], edges[size] = True, True
    np.not_equal(within[1:], within[:-1], out=edges[1:size])
    unspaced = classes == UNSPACED
    if unspaced.any():
        edges[:size] |= unspaced
        edges[1:] |= unspaced
    cuts = np.flatnonzero(edges)
    is_segment = within[cuts[:-1]]
    return cuts[:-1][is_segment], cuts[1:][is_segment]


def hash_segments(points: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return a hash of each segment, uint64: Σ r(c_i)·B^i over its characters with random r(c), mixed."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    powers, inverses = _powers(len(points))
    values = _random_values()[points] if points.dtype == np.uint8 else mix_hashes(points.astype(np.uint64))
    sums = np.zeros(len(points) + 1, np.uint64)
    np.cumsum(values * powers[: len(points)], out=sums[1:])
    return mix_hashes((sums[stops] - sums[starts]) * inverses[starts] + (stops - starts).astype(np.uint64))


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return a hash of every `n` consecutive hashes, uint64 [max(len − n + 1, 0)]."""
    count = max(len(hashes) - n + 1, 0)
    combined = hashes[:count]
    for step in range(1, n):
        combined = combine_hashes(combined, hashes[step : step + count])
    return mix_hashes(combined)


def combine_hashes(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return hashes of sequences, uint64: `before` hashes each but its last word, `after` hashes that word."""
    return before * _JOIN + after


def mix_hashes(values: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finalizer of each uint64 value plus its increment, a pseudorandom bijection."""
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
    # Above the second plane there are only Han characters, variation selectors (marks) and unassigned code points.
    table = np.zeros(0x110000, np.uint8)
    table[:0x20000] = [classify_character(chr(point)) for point in range(0x20000)]
    table[0x20000:0x40000] = UNSPACED
    table[0xE0100:0xE01F0] = LETTER
    return table


def classify_character(letter: str) -> int:
    """Return the class of a character below U+20000. Marks count as letters, all of category N as digits."""
    if letter.isspace():
        return WHITESPACE
    category = unicodedata.category(letter)
    if category[0] == "N":
        return DIGIT
    if category[0] not in "LM":
        return OTHER
    point = ord(letter)
    return UNSPACED if any(low <= point <= high for low, high in _UNSPACED_RANGES) else LETTER
