"""The search for n-grams of examples in the documents of shards, by one process or several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.clean.tokenize_words import combine_hashes, hash_alphanumeric_words, hash_ngrams, mix_hashes
from kabrn_dist.data.index import SplitName
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.data.token_stream import TokenStream

# Places of an example that are kept.
MAX_PLACES = 3
# Shorter texts, such as a single name, are in any large set of texts.
_MIN_WORDS = 5
_PREFILTER_BITS = 22
_READ_TOKENS = 1 << 20
_PART_TOKENS = 1 << 24
_SHOWN_CHARACTERS = 200


class FoundInPart(NamedTuple):
    """Examples that were found in a part of a source.

    Attributes:
        documents: Number of documents that begin in the part.
        found: Number of an example → number of documents with it, and the first of them, as pairs of a number in the
            part and the words that both have.
    """

    documents: int
    found: dict[int, tuple[int, list[tuple[int, str]]]]


class _Part(NamedTuple):
    """Tokens [start, stop) of a source: the documents that begin there."""

    source: int
    start: int
    stop: int


def find_too_short(texts: Sequence[str], words: int) -> set[int]:
    """Return the numbers of the texts that are not searched for, as they have fewer than 5 words.

    Args:
        texts: Texts of examples.
        words: Length of the n-grams; if it is smaller than 5, that many words are enough.
    """
    least = min(_MIN_WORDS, words)
    return {number for number, text in enumerate(texts) if len(hash_alphanumeric_words(text).hashes) < least}


def search_shards(
    shards: Path,
    split: SplitName,
    texts: Sequence[str],
    words: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[str, FoundInPart]]:
    """Yield a source and what was found in a part of it, in the order of the shards.

    Args:
        shards: Folder of the shards.
        split: Their split.
        texts: Examples.
        words: Length of the n-grams.
        workers: Processes; 1 for this one alone.
        progress: Called with the tokens that were searched and all tokens.

    Raises:
        UserError: if something of the shards is missing or damaged.
    """
    sources = open_shard_folder(shards).index.sources
    sizes = [source.split(split).tokens for source in sources]
    parts = [
        _Part(number, start, min(start + _PART_TOKENS, size))
        for number, size in enumerate(sizes)
        for start in range(0, size, _PART_TOKENS)
    ]
    done = 0
    for part, found in zip(parts, _search_parts(shards, split, texts, words, parts, workers), strict=True):
        yield sources[part.source].name, found
        done += part.stop - part.start
        progress(done, sum(sizes))


def _search_parts(
    shards: Path, split: SplitName, texts: Sequence[str], words: int, parts: Sequence[_Part], workers: int
) -> Iterator[FoundInPart]:
    if min(workers, len(parts)) <= 1:
        ngrams = ExampleNgrams(texts, words)
        yield from (_search_part(shards, split, ngrams, part) for part in parts)
        return
    # Fresh processes: a copy of this one could hold locks of its threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(parts)), context) as pool:
        jobs = [pool.submit(_search_alone, shards, split, texts, words, part) for part in parts]
        yield from (job.result() for job in jobs)


def _search_alone(shards: Path, split: SplitName, texts: Sequence[str], words: int, part: _Part) -> FoundInPart:
    return _search_part(shards, split, ExampleNgrams(texts, words), part)


def _search_part(shards: Path, split: SplitName, ngrams: ExampleNgrams, part: _Part) -> FoundInPart:
    number, found = -1, dict[int, tuple[int, list[tuple[int, str]]]]()
    for number, text in enumerate(_read_documents(shards, split, part)):
        for example, shared in ngrams.find(text).items():
            count, places = found.setdefault(example, (0, []))
            if count < MAX_PLACES:
                places.append((number, shared[:_SHOWN_CHARACTERS]))
            found[example] = (count + 1, places)
    return FoundInPart(number + 1, found)


def _read_documents(shards: Path, split: SplitName, part: _Part) -> Iterator[str]:
    """Yield the text of each document that begins in a part; the last may go on behind it."""
    folder = open_shard_folder(shards)
    tokenizer, mark = folder.tokenizer(), folder.index.document_token
    stream = TokenStream([(folder, folder.index.sources[part.source])], split)
    waiting: list[np.ndarray] | None = None
    position = part.start
    try:
        while position < len(stream) and (position < part.stop or waiting is not None):
            ids = stream.read(position, min(position + _READ_TOKENS, len(stream)))
            begins = np.flatnonzero(ids == mark)
            rest, *documents = np.split(ids, begins)
            if waiting is not None:
                waiting.append(rest)
            for begin, document in zip((position + begins).tolist(), documents, strict=True):
                if waiting is not None:
                    yield tokenizer.decode(np.concatenate(waiting).tolist())
                # The token that begins a document stands for no text.
                waiting = [document[1:]] if begin < part.stop else None
            position += len(ids)
        if waiting is not None:
            yield tokenizer.decode(np.concatenate(waiting).tolist())
    finally:
        stream.close()


class _SortedNgrams(NamedTuple):
    """All n-grams of one length: their hashes, uint64, sorted; the example of each; a prefilter by upper bits."""

    length: int
    hashes: np.ndarray
    examples: np.ndarray
    prefilter: np.ndarray


class ExampleNgrams:
    """The n-grams of numbered examples.

    Args:
        texts: The examples.
        words: Length of the n-grams; a shorter example is one n-gram.
    """

    def __init__(self, texts: Sequence[str], words: int) -> None:
        by_length: dict[int, list[tuple[int, np.ndarray]]] = {}
        too_short = find_too_short(texts, words)
        for number, text in enumerate(texts):
            if number not in too_short:
                hashes = hash_alphanumeric_words(text).hashes
                length = min(len(hashes), words)
                by_length.setdefault(length, []).append((number, np.unique(hash_ngrams(hashes, length))))
        self._tables = [_sort_ngrams(length, parts) for length, parts in sorted(by_length.items())]

    def find(self, text: str) -> dict[int, str]:
        """Return number of an example → the words that the text first shares with it."""
        words = hash_alphanumeric_words(text)
        shared: dict[int, str] = {}
        combined, length = words.hashes, 1
        for table in self._tables:
            # Longer n-grams are made of shorter ones, as `hash_ngrams` makes them.
            while length < table.length:
                combined = combine_hashes(combined[:-1], words.hashes[length:])
                length += 1
            hashes = mix_hashes(combined)
            positions = np.flatnonzero(table.prefilter[hashes >> np.uint64(64 - _PREFILTER_BITS)])
            lows = np.searchsorted(table.hashes, hashes[positions], "left")
            highs = np.searchsorted(table.hashes, hashes[positions], "right")
            for at in np.flatnonzero(highs > lows).tolist():
                new = {*table.examples[lows[at] : highs[at]].tolist()} - shared.keys()
                if new:
                    start, last = positions[at], positions[at] + table.length - 1
                    shared |= dict.fromkeys(new, text[words.starts[start] : words.stops[last]])
        return shared


def _sort_ngrams(length: int, parts: Sequence[tuple[int, np.ndarray]]) -> _SortedNgrams:
    hashes = np.concatenate([part for _, part in parts])
    examples = np.repeat([number for number, _ in parts], [len(part) for _, part in parts])
    order = hashes.argsort(kind="stable")
    prefilter = np.zeros(1 << _PREFILTER_BITS, bool)
    prefilter[hashes >> np.uint64(64 - _PREFILTER_BITS)] = True
    return _SortedNgrams(length, hashes[order], examples[order], prefilter)
