"""Hashes of words, near duplicates and contamination, beside plain Python that does the same slowly."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from data_prep.clean import minhash as near
from data_prep.clean.config import CleaningConfig, ContaminationConfig
from data_prep.clean.contamination import EvaluationSets, load_evaluation_sets
from data_prep.clean.pipeline import Cleaner
from data_prep.clean.removed import RemovedDocument
from data_prep.clean.tokenize_words import (
    DIGIT,
    LETTER,
    UNSPACED,
    WHITESPACE,
    classify_character,
    hash_alphanumeric_words,
    hash_ngrams,
    hash_whitespace_words,
    lower_in_place,
    measure_whitespace_words,
)
from data_prep.documents import Document
from kabrn_dist.utils.errors import UserError

WRAP = (1 << 64) - 1
LETTERS = "abcXYZ ,.\n019'é漢ひกİßΣ\u0301\u00a0\U0001f600"


def mix_naive(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & WRAP
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & WRAP
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & WRAP
    return value ^ value >> 31


def words_naive(text: str, plain: bool) -> list[tuple[int, int]]:
    text = lower_in_place(text) if plain else text
    found: list[tuple[int, int]] = []
    open_word = False
    for place, letter in enumerate(text):
        kind = classify_character(letter)
        inside = kind >= LETTER if plain else kind != WHITESPACE
        if inside and open_word and kind != UNSPACED:
            found[-1] = (found[-1][0], place + 1)
        elif inside:
            found.append((place, place + 1))
        open_word = inside and kind != UNSPACED
    return found


def hash_naive(word: str) -> int:
    total = sum(mix_naive(ord(letter)) * pow(0x9E3779B97F4A7C13, place, 1 << 64) for place, letter in enumerate(word))
    return mix_naive((total + len(word)) & WRAP)


def plain_naive(text: str, numbers_alike: bool) -> list[int]:
    hashes = []
    for start, stop in words_naive(text, plain=True):
        word = lower_in_place(text)[start:stop]
        if numbers_alike:
            word = "".join(
                "0" if classify_character(letter) == DIGIT else letter
                for place, letter in enumerate(word)
                if classify_character(letter) != DIGIT or place == 0 or classify_character(word[place - 1]) != DIGIT
            )
        hashes.append(hash_naive(word))
    return hashes


def ngrams_naive(hashes: list[int], n: int) -> list[int]:
    found = []
    for place in range(len(hashes) - n + 1):
        joined = hashes[place]
        for value in hashes[place + 1 : place + n]:
            joined = (joined * 0xD6E8FEB86659FD93 + value) & WRAP
        found.append(mix_naive(joined))
    return found


def signature_naive(text: str, numbers_alike: bool = True) -> list[int]:
    hashes = plain_naive(text, numbers_alike)
    shingles = ngrams_naive(hashes, min(len(hashes), 5))
    factors = [mix_naive(number) | 1 for number in range(112)]
    lowest = [min(factor * shingle & WRAP for shingle in shingles) for factor in factors]
    return [
        mix_naive(sum(lowest[number] * factors[number] for number in range(band * 8, band * 8 + 8)) & WRAP)
        for band in range(14)
    ]


def cluster_naive(edges: list[tuple[int, int]]) -> list[int]:
    parent = {end: end for edge in edges for end in edge}

    def root(end: int) -> int:
        while parent[end] != end:
            end = parent[end]
        return end

    for one, other in edges:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return sorted(end for end in parent if root(end) != end)


def random_text(draw: random.Random, size: int) -> str:
    return "".join(draw.choice(LETTERS) for _ in range(size))


def similar_pair(draw: random.Random, similarity: float, shingles: int) -> tuple[str, str]:
    """Two texts of separate shingles (5 words that occur nowhere else, apart from their seams) of given Jaccard."""
    shared = round(shingles * 2 * similarity / (1 + similarity))
    words = [f"w{draw.randrange(1 << 60):x}" for _ in range(5 + 2 * shingles)]
    first = words[: shingles + 4]
    return " ".join(first), " ".join(first[: shared + 4] + words[shingles + 5 :][: shingles - shared])


# Words


def test_words_and_hashes_as_plain_python() -> None:
    draw = random.Random(3)
    for size in [0, 1, 2, 5, *range(10, 60, 7)] * 4:
        text = random_text(draw, size)
        blank = hash_whitespace_words(text)
        places = words_naive(text, plain=False)
        assert list(zip(blank.starts.tolist(), blank.stops.tolist(), strict=True)) == places
        assert blank.hashes.tolist() == [hash_naive(text[start:stop]) for start, stop in places]
        shapes = measure_whitespace_words(text)
        assert shapes.lengths.tolist() == [stop - start for start, stop in places]
        lettered = [
            any(classify_character(letter) in (LETTER, UNSPACED) for letter in text[start:stop])
            for start, stop in places
        ]
        assert shapes.has_letter.tolist() == lettered
        for alike in (True, False):
            words = hash_alphanumeric_words(text, alike)
            assert list(zip(words.starts.tolist(), words.stops.tolist(), strict=True)) == words_naive(text, plain=True)
            assert words.hashes.tolist() == plain_naive(text, alike)


def test_long_texts_are_cut_where_no_word_is() -> None:
    draw = random.Random(4)
    sentence = [random_text(draw, draw.randrange(1, 9)) for _ in range(200)]
    text = " ".join(draw.choice(sentence) for _ in range(15_000)) + " " + "z" * 70_000 + " end"
    words = hash_alphanumeric_words(text, True)
    places = words_naive(text, plain=True)
    assert list(zip(words.starts.tolist(), words.stops.tolist(), strict=True)) == places
    by_word: dict[str, int] = {}
    for (start, stop), value in zip(places, words.hashes.tolist(), strict=True):
        assert by_word.setdefault(lower_in_place(text[start:stop]), value) == value
    assert by_word["end"] == hash_alphanumeric_words("end").hashes[0]


def test_different_words_hash_apart() -> None:
    words = {f"{a}{b}{c}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "aeiou01" for c in range(300)}
    hashes = hash_whitespace_words(" ".join(sorted(words))).hashes
    assert len(np.unique(hashes)) == len(words)
    # Also in the upper bits, which the sieve and the ranges of hashes look at.
    assert np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16).std() < 0.05 * len(words) / 16 + 100


def test_ngrams_as_plain_python() -> None:
    hashes = np.array([mix_naive(value) for value in range(9)], np.uint64)
    for n in (1, 2, 5, 9, 10):
        assert hash_ngrams(hashes, n).tolist() == ngrams_naive(hashes.tolist(), n)


# Near duplicates


def test_signatures_as_plain_python() -> None:
    draw = random.Random(5)
    for size in (3, 20, 60, 200, 1500):
        text = "x" + random_text(draw, size)
        assert near.band_keys(text).tolist() == signature_naive(text)
        assert near.band_keys(text, "distinct").tolist() == signature_naive(text, False)
        assert near.band_keys(text).dtype == np.uint64


def test_what_does_not_count() -> None:
    first = near.band_keys("The cat, 12 years old, sat on   the mat!")
    assert np.array_equal(first, near.band_keys("the CAT 7 years old sat\non the mat"))
    assert not np.isin(first, near.band_keys("the CAT 7 years old sat\non the mat", "distinct")).any()
    assert np.array_equal(near.band_keys("two words"), near.band_keys("Two, words."))
    assert not np.isin(near.band_keys("two words"), near.band_keys("words two")).any()
    # Texts of no words are near duplicates of nothing but themselves.
    assert not np.isin(near.band_keys("!!!"), near.band_keys("???")).any()
    assert near.band_keys("").shape == (14,)


@pytest.mark.slow
def test_pairs_are_found_as_often_as_the_formula_says() -> None:
    assert near.match_probability(0.8) == pytest.approx(0.924, abs=5e-4)
    assert near.match_probability(0.5) == pytest.approx(0.053, abs=5e-4)
    draw = random.Random(6)
    count = 400
    for similarity in (0.5, 0.7, 0.8, 0.9):
        pairs = [similar_pair(draw, similarity, 180) for _ in range(count)]
        found = sum(bool((near.band_keys(one) == near.band_keys(other)).any()) for one, other in pairs)
        expected = near.match_probability(similarity)
        # Four standard deviations of a binomial.
        assert abs(found / count - expected) < 4 * (expected * (1 - expected) / count) ** 0.5 + 0.01, similarity


def test_edges_join_all_that_share_a_key() -> None:
    keys = np.array([[1, 2], [3, 2], [3, 4], [5, 6], [1, 9]], np.uint64)
    ids = np.array([50, 40, 30, 20, 10], np.uint64)
    assert near.find_pairs(keys, ids).tolist() == [[10, 50], [30, 40], [40, 50]]
    assert near.find_later_ids(near.find_pairs(keys, ids)).tolist() == [30, 40, 50]
    assert near.find_pairs(keys[:0], ids[:0]).shape == (0, 2)


def test_clusters_as_plain_union_find() -> None:
    draw = random.Random(7)
    for documents, count in ((2, 1), (30, 10), (30, 40), (400, 300), (5, 0)):
        edges = [(draw.randrange(documents), draw.randrange(documents)) for _ in range(count)]
        found = near.find_later_ids(np.array(edges, np.uint64).reshape(-1, 2))
        assert found.tolist() == cluster_naive(edges)
        assert found.dtype == np.uint64
    chain = np.stack([np.arange(5000), np.arange(1, 5001)], axis=1).astype(np.uint64)
    draw_order = np.random.default_rng(1).permutation(5000)
    assert near.find_later_ids(chain[draw_order]).tolist() == list(range(1, 5001))


# Contamination


QUESTION = "A train leaves the station at noon and travels north at sixty miles an hour for exactly 3 hours"


def found_naive(evaluations: list[str], text: str, n: int) -> bool:
    def normal(words: str) -> list[str]:
        return [lower_in_place(words)[start:stop] for start, stop in words_naive(words, plain=True)]

    words = normal(text)
    for evaluation in map(normal, evaluations):
        size = min(n, len(evaluation))
        runs = {tuple(evaluation[i : i + size]) for i in range(len(evaluation) - size + 1)}
        if size and any(tuple(words[i : i + size]) in runs for i in range(len(words) - size + 1)):
            return True
    return False


def test_contamination_as_plain_python() -> None:
    draw = random.Random(8)
    for _ in range(60):
        settings = ContaminationConfig(words=4, min_words=1)
        evaluations = [" ".join(draw.choice("abcd1") for _ in range(draw.randrange(1, 9))) for _ in range(3)]
        contaminants = EvaluationSets([("set", evaluations)], settings)
        text = " ".join(draw.choice("abcdEF1") for _ in range(draw.randrange(12)))
        assert (contaminants.find_match(text) is not None) == found_naive(evaluations, text, 4)


def test_what_was_found_is_named() -> None:
    contaminants = EvaluationSets(
        [("one", ["no match in this text at all"]), ("two", [QUESTION])], ContaminationConfig()
    )
    contaminants = pickle.loads(pickle.dumps(contaminants))
    found = contaminants.find_match("Exercise 5. " + QUESTION.upper().replace(" ", ",\n", 3) + ". How far?")
    assert found is not None
    assert found.evaluation_set == "two"
    assert found.words == "A,\nTRAIN,\nLEAVES,\nTHE STATION AT NOON AND TRAVELS NORTH AT SIXTY MILES"
    assert found.fraction == pytest.approx(19 / 23)
    assert contaminants.find_match(" ".join(QUESTION.split()[:12])) is None
    # Numbers tell exercises apart.
    assert contaminants.find_match(" ".join(QUESTION.replace("3", "4").split()[-13:])) is None


def test_short_evaluation_texts_match_whole_and_tiny_ones_not_at_all() -> None:
    contaminants = EvaluationSets([("nq", ["who wrote the first novel", "Paris"])], ContaminationConfig())
    assert contaminants.skipped_texts == 1
    assert contaminants.find_match("Do you know who wrote the first novel? Paris.") is not None
    assert contaminants.find_match("Paris, where he wrote the first novel") is None


def test_a_share_may_be_allowed() -> None:
    text = QUESTION + " " + " ".join(f"word{i}" for i in range(81))
    for share, found in ((0.0, True), (0.18, True), (0.2, False)):
        contaminants = EvaluationSets([("set", [QUESTION])], ContaminationConfig(max_share=share))
        assert (contaminants.find_match(text) is not None) == found


def test_evaluation_sets_are_read_and_clean_by(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    line = json.dumps({"question": QUESTION, "answers": ["the capital of France is Paris"], "n": 1})
    (tmp_path / "sub" / "test.jsonl").write_text(line + "\n\n", encoding="utf-8")
    (tmp_path / "other.txt.gz").write_bytes(gzip.compress(b"one two three four five six"))
    settings = ContaminationConfig(paths=(tmp_path / "sub", tmp_path / "other.txt.gz"))
    cleaner = Cleaner(
        CleaningConfig(tag=False, quality="off", repetition="off", contamination=settings),
        load_evaluation_sets(settings),
    )
    for text, place in (
        (QUESTION, "sub"),
        ("The capital of France is Paris", "sub"),
        ("one two three four five six", "gz"),
    ):
        found = cleaner(Document("a", text))
        assert isinstance(found, RemovedDocument)
        assert found.reason == "contamination"
        assert place in found.detail.split(": ", 1)[0]
    assert not isinstance(cleaner(Document("a", "one two three four five")), RemovedDocument)


def test_evaluation_sets_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n", encoding="utf-8")
    (tmp_path / "empty.txt").mkdir()
    (tmp_path / "set.bin").write_bytes(b"x")
    for name in ("bad.jsonl", "empty.txt", "set.bin", "missing.txt"):
        with pytest.raises(UserError, match=rf"contamination\.paths .*{name}"):
            load_evaluation_sets(ContaminationConfig(paths=(tmp_path / name,)))
