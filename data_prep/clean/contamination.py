"""Pieces of evaluation documents in training documents, found by runs of words (GPT-3, arXiv 2005.14165, C)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.clean.config import ContaminationConfig
from data_prep.clean.tokenize_words import hash_alphanumeric_words, hash_ngrams
from kabrn_dist.utils.errors import UserError

_ENDINGS = (".txt", ".json", ".jsonl", ".txt.gz", ".json.gz", ".jsonl.gz")
_PREFILTER_BITS = 22


class ContaminationMatch(NamedTuple):
    """What was found first: the evaluation set, the words that agree, and the share of the text's words that do."""

    evaluation_set: str
    words: str
    fraction: float


class NgramIndex(NamedTuple):
    """Runs of so many words: their hashes, uint64, sorted, the number of the set each is from, uint16, and a sieve.

    The sieve, bool, tells by the upper bits of a hash that most are not among them.
    """

    length: int
    hashes: np.ndarray
    set_numbers: np.ndarray
    prefilter: np.ndarray


class EvaluationSets:
    """The runs of words of evaluation sets. Picklable.

    `evaluations` are pairs of a name and texts. A text of fewer than `settings.words` words is one run of all its
    words; one of fewer than `settings.min_words` is left out, and counted in `passed_over`.
    """

    def __init__(self, evaluations: Iterable[tuple[str, Iterable[str]]], config: ContaminationConfig) -> None:
        self._most = config.max_share
        self.names: list[str] = []
        self.skipped_texts = 0
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        for name, texts in evaluations:
            for text in texts:
                hashes = hash_alphanumeric_words(text).hashes
                if len(hashes) < config.min_words:
                    self.skipped_texts += 1
                    continue
                length = min(len(hashes), config.words)
                found.setdefault(length, []).append((hash_ngrams(hashes, length), len(self.names)))
            self.names.append(name)
        self._runs = [_build_index(length, parts) for length, parts in sorted(found.items(), reverse=True)]

    def find_match(self, text: str) -> ContaminationMatch | None:
        """Return what `text` has of the evaluation sets, or None where that is no more than the settings allow."""
        words = hash_alphanumeric_words(text)
        covered = np.zeros(len(words.hashes) + 1, np.int64)
        first: ContaminationMatch | None = None
        for runs in self._runs:
            places, sets = _find_ngrams(runs, hash_ngrams(words.hashes, runs.length))
            if not len(places):
                continue
            np.add.at(covered, places, 1)
            np.add.at(covered, places + runs.length, -1)
            if first is None:
                start, stop = words.starts[places[0]], words.stops[places[0] + runs.length - 1]
                first = ContaminationMatch(self.names[sets[0]], text[start:stop], 0.0)
        if first is None:
            return None
        share = np.count_nonzero(np.cumsum(covered)[:-1]) / len(words.hashes)
        return first._replace(fraction=share) if share > self._most else None


def load_evaluation_sets(config: ContaminationConfig) -> EvaluationSets:
    """Read the evaluation sets of `settings.paths`: files .txt (one text), .json and .jsonl (every string in them
    is a text), plain or .gz, and folders of these. Raises UserError where one cannot be read or holds no text.
    """
    return EvaluationSets(((str(path), _texts(path)) for path in config.paths), config)


def list_evaluation_files(path: Path) -> list[Path]:
    """The files of one of `settings.paths`, in the order in which they are read."""
    return [path] if not path.is_dir() else sorted(file for file in path.rglob("*") if file.name.endswith(_ENDINGS))


def _texts(path: Path) -> Iterator[str]:
    empty = True
    for file in list_evaluation_files(path):
        for text in _read(file):
            empty = False
            yield text
    if empty:
        raise UserError(f"contamination.paths {path}: no text in it. Give files that end in {', '.join(_ENDINGS)}.")


def _read(path: Path) -> Iterator[str]:
    if not path.name.endswith(_ENDINGS):
        raise UserError(f"contamination.paths {path}: unknown file type; give files that end in {', '.join(_ENDINGS)}.")
    plain = path.name.removesuffix(".gz")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if plain != path.name else content).decode()
        if plain.endswith(".txt"):
            yield text
            return
        for record in text.split("\n") if plain.endswith(".jsonl") else [text]:
            if record.strip():
                yield from _strings(json.loads(record))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"contamination.paths {path}: cannot be read ({error}). Replace it or leave it out.") from error


def _strings(value: object) -> Iterator[str]:
    """Yield every string in a JSON value; keys of objects are none of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _build_index(length: int, parts: list[tuple[np.ndarray, int]]) -> NgramIndex:
    hashes = np.concatenate([part for part, _ in parts])
    sets = np.concatenate([np.full(len(part), number, np.uint16) for part, number in parts])
    hashes, first = np.unique(hashes, return_index=True)
    sieve = np.zeros(1 << _PREFILTER_BITS, bool)
    sieve[hashes >> np.uint64(64 - _PREFILTER_BITS)] = True
    return NgramIndex(length, hashes, sets[first], sieve)


def _find_ngrams(index: NgramIndex, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where `hashes` holds one of `runs`, and the set that one is from."""
    places = np.flatnonzero(index.prefilter[hashes >> np.uint64(64 - _PREFILTER_BITS)])
    ranks = np.searchsorted(index.hashes, hashes[places])
    ranks[ranks == len(index.hashes)] = 0
    same = index.hashes[ranks] == hashes[places]
    return places[same], index.set_numbers[ranks[same]]
