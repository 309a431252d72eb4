"""Find n-grams of evaluation documents in training documents (GPT-3, arXiv 2005.14165, appendix C)."""

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
from kabrn_dist.utils.safe_open import open_regular

_ENDINGS = (".txt", ".json", ".jsonl", ".txt.gz", ".json.gz", ".jsonl.gz")
_PREFILTER_BITS = 22


class ContaminationMatch(NamedTuple):
    """Overlap of a text with evaluation sets.

    Attributes:
        evaluation_set: name of the set of the first match.
        words: the first match in the text.
        fraction: fraction of the text's words that match any set.
    """

    evaluation_set: str
    words: str
    fraction: float


class NgramIndex(NamedTuple):
    """All n-grams of one length of the evaluation sets.

    Attributes:
        length: n.
        hashes: hashes of the n-grams, uint64, sorted.
        set_numbers: for each, the number of the set that it is from, uint16.
        prefilter: by the upper bits of a hash, whether any n-gram has them, bool [2^22]. Most hashes fail this test.
    """

    length: int
    hashes: np.ndarray
    set_numbers: np.ndarray
    prefilter: np.ndarray


class EvaluationSets:
    """The n-grams of evaluation sets. Picklable.

    Args:
        evaluations: pairs of a name and texts.
        config: `words` is n. A shorter text is one n-gram of all its words; one with fewer than `min_words` is skipped.

    Attributes:
        names: names of the sets.
        skipped_texts: number of texts that are too short.
    """

    def __init__(self, evaluations: Iterable[tuple[str, Iterable[str]]], config: ContaminationConfig) -> None:
        self._max_fraction = config.max_share
        self.names: list[str] = []
        self.skipped_texts = 0
        by_length: dict[int, list[tuple[np.ndarray, int]]] = {}
        for name, texts in evaluations:
            for text in texts:
                hashes = hash_alphanumeric_words(text).hashes
                if len(hashes) < config.min_words:
                    self.skipped_texts += 1
                    continue
                length = min(len(hashes), config.words)
                by_length.setdefault(length, []).append((hash_ngrams(hashes, length), len(self.names)))
            self.names.append(name)
        self._indexes = [_build_index(length, parts) for length, parts in sorted(by_length.items(), reverse=True)]

    def find_match(self, text: str) -> ContaminationMatch | None:
        """Return the overlap of `text` with the evaluation sets, or None if it is within the configured limit."""
        words = hash_alphanumeric_words(text)
        covered = np.zeros(len(words.hashes) + 1, np.int64)
        first: ContaminationMatch | None = None
        for index in self._indexes:
            positions, sets = _find_ngrams(index, hash_ngrams(words.hashes, index.length))
            if not len(positions):
                continue
            np.add.at(covered, positions, 1)
            np.add.at(covered, positions + index.length, -1)
            if first is None:
                start, stop = words.starts[positions[0]], words.stops[positions[0] + index.length - 1]
                first = ContaminationMatch(self.names[sets[0]], text[start:stop], 0.0)
        if first is None:
            return None
        fraction = np.count_nonzero(np.cumsum(covered)[:-1]) / len(words.hashes)
        return first._replace(fraction=fraction) if fraction > self._max_fraction else None


def load_evaluation_sets(config: ContaminationConfig, out: Path | None = None) -> EvaluationSets:
    """Read the evaluation sets of `config.paths`.

    They are .txt files (one text), .json and .jsonl files (every string is a text), plain or .gz, and folders of these.

    Args:
        config: names the sets.
        out: the folder for the shards, whose files belong to no set.

    Raises:
        UserError: a set cannot be read or holds no text.
    """
    return EvaluationSets(((str(path), _texts(path, out)) for path in config.paths), config)


def list_evaluation_files(path: Path, out: Path | None = None) -> list[Path]:
    """Return the files of one of `config.paths` in the order in which they are read, without those below `out`."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.name.lower().endswith(_ENDINGS))
    if out is None or not out.resolve().is_relative_to(path.resolve()):
        return files
    return [file for file in files if not file.resolve().is_relative_to(out.resolve())]


def _texts(path: Path, out: Path | None) -> Iterator[str]:
    empty = True
    for file in list_evaluation_files(path, out):
        for text in _read(file):
            empty = False
            yield text
    if empty:
        raise UserError(f"contamination.paths {path}: no text in it; give files that end in {', '.join(_ENDINGS)}")


def _read(path: Path) -> Iterator[str]:
    name = path.name.lower()
    if not name.endswith(_ENDINGS):
        raise UserError(f"contamination.paths {path}: unknown file type; give files that end in {', '.join(_ENDINGS)}")
    plain = name.removesuffix(".gz")
    try:
        with open_regular(path) as file:
            content = file.readall()
        text = (gzip.decompress(content) if plain != name else content).decode()
        if plain.endswith(".txt"):
            yield text
            return
        for record in text.split("\n") if plain.endswith(".jsonl") else [text]:
            if record.strip():
                yield from _strings(json.loads(record))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"contamination.paths {path}: cannot be read ({error}); replace it or leave it out") from error


def _strings(value: object) -> Iterator[str]:
    """Yield every string in a JSON value except the keys of objects."""
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
    """Return the positions of n-grams of `index` in `hashes`, and the number of the set that each is from."""
    positions = np.flatnonzero(index.prefilter[hashes >> np.uint64(64 - _PREFILTER_BITS)])
    ranks = np.searchsorted(index.hashes, hashes[positions])
    ranks[ranks == len(index.hashes)] = 0
    same = index.hashes[ranks] == hashes[positions]
    return positions[same], index.set_numbers[ranks[same]]
