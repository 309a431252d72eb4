"""Pieces of evaluation documents in training documents, found by runs of words (GPT-3, arXiv 2005.14165, C)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.clean.settings import Contamination
from data_prep.clean.tokenize_words import ngrams, plain_words
from kabrn_dist.utils.errors import UserError

_ENDINGS = (".txt", ".json", ".jsonl", ".txt.gz", ".json.gz", ".jsonl.gz")
_SIEVE_BITS = 22


class Overlap(NamedTuple):
    """What was found first: the evaluation set, the words that agree, and the share of the text's words that do."""

    evaluation: str
    words: str
    share: float


class Runs(NamedTuple):
    """Runs of so many words: their hashes, uint64, sorted, the number of the set each is from, uint16, and a sieve.

    The sieve, bool, tells by the upper bits of a hash that most are not among them.
    """

    length: int
    hashes: np.ndarray
    sets: np.ndarray
    sieve: np.ndarray


class Contaminants:
    """The runs of words of evaluation sets. Picklable.

    `evaluations` are pairs of a name and texts. A text of fewer than `settings.words` words is one run of all its
    words; one of fewer than `settings.min_words` is left out, and counted in `passed_over`.
    """

    def __init__(self, evaluations: Iterable[tuple[str, Iterable[str]]], settings: Contamination) -> None:
        self._most = settings.max_share
        self.names: list[str] = []
        self.passed_over = 0
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        for name, texts in evaluations:
            for text in texts:
                hashes = plain_words(text).hashes
                if len(hashes) < settings.min_words:
                    self.passed_over += 1
                    continue
                length = min(len(hashes), settings.words)
                found.setdefault(length, []).append((ngrams(hashes, length), len(self.names)))
            self.names.append(name)
        self._runs = [_runs(length, parts) for length, parts in sorted(found.items(), reverse=True)]

    def find(self, text: str) -> Overlap | None:
        """Return what `text` has of the evaluation sets, or None where that is no more than the settings allow."""
        words = plain_words(text)
        covered = np.zeros(len(words.hashes) + 1, np.int64)
        first: Overlap | None = None
        for runs in self._runs:
            places, sets = _meeting(runs, ngrams(words.hashes, runs.length))
            if not len(places):
                continue
            np.add.at(covered, places, 1)
            np.add.at(covered, places + runs.length, -1)
            if first is None:
                start, stop = words.starts[places[0]], words.stops[places[0] + runs.length - 1]
                first = Overlap(self.names[sets[0]], text[start:stop], 0.0)
        if first is None:
            return None
        share = np.count_nonzero(np.cumsum(covered)[:-1]) / len(words.hashes)
        return first._replace(share=share) if share > self._most else None


def collect(settings: Contamination) -> Contaminants:
    """Read the evaluation sets of `settings.paths`: files .txt (one text), .json and .jsonl (every string in them
    is a text), plain or .gz, and folders of these. Raises UserError where one cannot be read or holds no text.
    """
    return Contaminants(((str(path), _texts(path)) for path in settings.paths), settings)


def evaluation_files(path: Path) -> list[Path]:
    """The files of one of `settings.paths`, in the order in which they are read."""
    return [path] if not path.is_dir() else sorted(file for file in path.rglob("*") if file.name.endswith(_ENDINGS))


def _texts(path: Path) -> Iterator[str]:
    empty = True
    for file in evaluation_files(path):
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


def _runs(length: int, parts: list[tuple[np.ndarray, int]]) -> Runs:
    hashes = np.concatenate([part for part, _ in parts])
    sets = np.concatenate([np.full(len(part), number, np.uint16) for part, number in parts])
    hashes, first = np.unique(hashes, return_index=True)
    sieve = np.zeros(1 << _SIEVE_BITS, bool)
    sieve[hashes >> np.uint64(64 - _SIEVE_BITS)] = True
    return Runs(length, hashes, sets[first], sieve)


def _meeting(runs: Runs, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where `hashes` holds one of `runs`, and the set that one is from."""
    places = np.flatnonzero(runs.sieve[hashes >> np.uint64(64 - _SIEVE_BITS)])
    ranks = np.searchsorted(runs.hashes, hashes[places])
    ranks[ranks == len(runs.hashes)] = 0
    same = runs.hashes[ranks] == hashes[places]
    return places[same], runs.sets[ranks[same]]
