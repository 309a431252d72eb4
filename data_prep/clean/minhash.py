"""Find near duplicates by MinHash and locality-sensitive hashing (Broder 1997; 14 bands of 8 hashes as in FineWeb).

Two texts whose sets of 5-grams of words have Jaccard similarity s share at least one of the 14 keys with probability
1 − (1 − s^8)^14: 0.924 at 0.8, 0.053 at 0.5.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

from data_prep.clean.tokenize_words import hash_alphanumeric_words, hash_ngrams, mix_hashes

SHINGLE_WORDS = 5
BANDS = 14
HASHES_PER_BAND = 8

# 112 × 256 products of 8 bytes fit into the L2 cache.
_BLOCK = 256


def band_keys(text: str, numbers: Literal["alike", "distinct"] = "alike") -> np.ndarray:
    """Return the keys of a text. Texts that share a key are near duplicates.

    Case, punctuation and whitespace do not count. A text of fewer than 5 words is one shingle; one without words equals
    only itself.

    Args:
        text: the text.
        numbers: "alike" treats all numbers as equal.

    Returns:
        One key per band, uint64 [14].
    """
    shingles = _shingles(text, numbers == "alike")
    lowest = np.full((BANDS * HASHES_PER_BAND, 1), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        hashes = _multipliers() * shingles[start : start + _BLOCK]
        np.minimum(lowest, hashes.min(axis=1, keepdims=True), out=lowest)
    # A random sum of the minima of a band. Each minimum has its own factor, so that bands do not share keys.
    return mix_hashes((lowest * _multipliers()).reshape(BANDS, HASHES_PER_BAND).sum(axis=1, dtype=np.uint64))


def match_probability(similarity: float) -> float:
    """Return the probability that texts of this Jaccard similarity share a key."""
    return float(1 - (1 - similarity**HASHES_PER_BAND) ** BANDS)


def find_pairs(keys: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Pair the documents that share a key of one band.

    Args:
        keys: uint64 [documents] of one band, or [documents, bands].
        ids: uint64 [documents].

    Returns:
        Pairs of ids, uint64 [n, 2]: the smallest id with the key, and another.
    """
    columns = keys.T if keys.ndim == 2 else keys[None]
    pairs = [np.zeros((0, 2), np.uint64)]
    for column in columns:
        order = np.lexsort((ids, column))
        ranked, sorted_ids = column[order], ids[order]
        same = ranked[1:] == ranked[:-1]
        first = np.concatenate([np.ones(1, bool), ~same])[: len(ids)]
        heads = sorted_ids[np.flatnonzero(first)][np.cumsum(first) - 1]
        pairs.append(np.stack([heads, sorted_ids], axis=1)[~first])
    return np.concatenate(pairs)


def find_later_ids(pairs: np.ndarray) -> np.ndarray:
    """Return all ids but the smallest of each group that `pairs`, [n, 2], connect; sorted, in the same dtype."""
    ids, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(-1, 2)
    parents = np.arange(len(ids))
    while True:
        # The smaller root of each pair becomes the parent of the larger one; then paths are halved.
        low, high = np.sort(parents[ends], axis=1).T if len(ends) else (parents, parents)
        joined = parents.copy()
        np.minimum.at(joined, high, low)
        while not np.array_equal(joined, shorter := joined[joined]):
            joined = shorter
        if np.array_equal(joined, parents):
            return np.asarray(ids[parents != np.arange(len(ids))])
        parents = joined


def _shingles(text: str, merge_numbers: bool) -> np.ndarray:
    hashes = hash_alphanumeric_words(text, merge_numbers).hashes
    if not len(hashes):
        hashes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        return hash_ngrams(hashes, max(len(hashes), 1))
    return hash_ngrams(hashes, min(len(hashes), SHINGLE_WORDS))


@cache
def _multipliers() -> np.ndarray:
    # Odd, so that each multiplication is a permutation of the 64-bit values.
    return (mix_hashes(np.arange(BANDS * HASHES_PER_BAND, dtype=np.uint64)) | np.uint64(1))[:, None]
