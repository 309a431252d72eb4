"""Examples of evaluations that training shards contain, by shared n-grams (GPT-3, arXiv 2005.14165, appendix C)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.clean.tokenize_words import hash_alphanumeric_words, hash_ngrams
from kabrn_dist.data.index import SplitName
from kabrn_dist.data.shard_set import open_shard_folder
from kabrn_dist.data.token_stream import TokenStream
from kabrn_dist.utils.terminal import escape_controls

NGRAM_WORDS = 13
# Shorter texts, such as a single name, are in any large set of texts.
MIN_WORDS = 5
_PREFILTER_BITS = 22
_READ_TOKENS = 1 << 20
_PLACES = 3
_SHOWN_IDS = 5
_SHOWN_CHARACTERS = 200


class Overlap(NamedTuple):
    """Where an example was found.

    Attributes:
        source: Source of the shards.
        document: Number of the document in the source's split, from 0.
        words: The first words that both have.
    """

    source: str
    document: int
    words: str


class ContaminatedExample(NamedTuple):
    """An example that shards contain, or parts of it.

    Attributes:
        id: Of the example.
        documents: Number of documents that share an n-gram with it.
        places: The first of them.
    """

    id: str
    documents: int
    places: tuple[Overlap, ...]


@dataclass(frozen=True)
class TaskContamination:
    """Examples of one task that shards contain.

    Attributes:
        task: Name of the task.
        examples: Number of its examples.
        too_short: Of these, those with fewer than `MIN_WORDS` words, which were not searched for.
        found: Examples that were found, in the task's order.
    """

    task: str
    examples: int
    too_short: int
    found: tuple[ContaminatedExample, ...]


@dataclass(frozen=True)
class ContaminationReport:
    """What a search found.

    Attributes:
        shards: Folder that was searched.
        words: Length of the n-grams.
        documents: Number of documents that were read.
        tasks: One for each task.
    """

    shards: Path
    words: int
    documents: int
    tasks: tuple[TaskContamination, ...]

    def to_table(self) -> str:
        """Return a table for the console: a line for each task, and where its first examples were found."""
        lines = [
            f"{self.words} words in a row shared with {self.documents:,} documents of {self.shards}",
            f"{'task':<16}{'examples':>10}{'found':>10}{'share':>10}{'too short':>12}",
        ]
        for task in self.tasks:
            share = len(task.found) / max(task.examples - task.too_short, 1)
            counts = f"{task.examples:>10,}{len(task.found):>10,}{share:>10.2%}{task.too_short:>12,}"
            lines.append(f"{task.task:<16}{counts}")
        for task in self.tasks:
            for found in task.found[:_SHOWN_IDS]:
                place = found.places[0]
                others = f" and {found.documents - 1:,} more" if found.documents > 1 else ""
                words = escape_controls(" ".join(place.words.split()))
                where = f"{place.source} document {place.document}{others}"
                lines.append(f"{task.task} {escape_controls(found.id)} in {where}: “{words}”")
            if len(task.found) > _SHOWN_IDS:
                lines.append(f"{task.task}: {len(task.found) - _SHOWN_IDS:,} more")
        return "\n".join(lines)


def find_contamination(
    shards: Path,
    examples: Mapping[str, Sequence[tuple[str, str]]],
    words: int = NGRAM_WORDS,
    split: SplitName = "train",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ContaminationReport:
    """Search the documents of a folder of shards for examples, in one pass.

    An example is found in a document that has any n-gram of its words; case and what is between words do not count. A
    shorter example has to be in it as a whole.

    Args:
        shards: The folder.
        examples: Task → its examples, as pairs of an id and the text to search for.
        words: Length of the n-grams.
        split: Split of the shards.
        progress: Called with the tokens that were searched and all tokens.

    Raises:
        UserError: if something of the shards is missing or damaged.
    """
    index = _ExampleNgrams([text for pairs in examples.values() for _, text in pairs], words)
    counts = [0] * index.examples
    places: dict[int, list[Overlap]] = {}
    total, documents = open_shard_folder(shards).index.tokens(split), 0
    for source, number, text, done in _read_documents(shards, split):
        documents += 1
        for example, shared in index.find(text).items():
            counts[example] += 1
            if counts[example] <= _PLACES:
                places.setdefault(example, []).append(Overlap(source, number, shared[:_SHOWN_CHARACTERS]))
        progress(done, total)
    tasks, first = [], 0
    for name, pairs in examples.items():
        numbers = range(first, first + len(pairs))
        found = tuple(
            ContaminatedExample(id, counts[number], tuple(places[number]))
            for number, (id, _) in zip(numbers, pairs, strict=True)
            if counts[number]
        )
        tasks.append(TaskContamination(name, len(pairs), len(index.too_short.intersection(numbers)), found))
        first += len(pairs)
    return ContaminationReport(shards, words, documents, tuple(tasks))


class _SortedNgrams(NamedTuple):
    """All n-grams of one length: their hashes, uint64, sorted; the example of each; a prefilter by upper bits."""

    length: int
    hashes: np.ndarray
    examples: np.ndarray
    prefilter: np.ndarray


class _ExampleNgrams:
    """The n-grams of numbered examples."""

    def __init__(self, texts: Sequence[str], words: int) -> None:
        self.examples = len(texts)
        self.too_short: set[int] = set()
        by_length: dict[int, list[tuple[int, np.ndarray]]] = {}
        for number, text in enumerate(texts):
            hashes = hash_alphanumeric_words(text).hashes
            if len(hashes) < min(MIN_WORDS, words):
                self.too_short.add(number)
                continue
            length = min(len(hashes), words)
            by_length.setdefault(length, []).append((number, np.unique(hash_ngrams(hashes, length))))
        self._tables = [_sort_ngrams(length, parts) for length, parts in sorted(by_length.items(), reverse=True)]

    def find(self, text: str) -> dict[int, str]:
        """Return number of an example → the words that the text first shares with it."""
        words = hash_alphanumeric_words(text)
        shared: dict[int, str] = {}
        for table in self._tables:
            hashes = hash_ngrams(words.hashes, table.length)
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


def _read_documents(shards: Path, split: SplitName) -> Iterator[tuple[str, int, str, int]]:
    """Yield source, number, and text of each document, and the tokens that were read so far."""
    folder = open_shard_folder(shards)
    tokenizer, mark = folder.tokenizer(), folder.index.document_token
    read = 0
    for source in folder.index.sources:
        stream = TokenStream([(folder, source)], split)
        number, waiting = -1, list[np.ndarray]()
        for start in range(0, len(stream), _READ_TOKENS):
            ids = stream.read(start, min(start + _READ_TOKENS, len(stream)))
            read += len(ids)
            first, *others = np.split(ids, np.flatnonzero(ids == mark))
            waiting.append(first)
            for document in others:
                if number >= 0:
                    yield source.name, number, tokenizer.decode(np.concatenate(waiting).tolist()), read
                # The token that begins a document stands for no text.
                number, waiting = number + 1, [document[1:]]
        if number >= 0:
            yield source.name, number, tokenizer.decode(np.concatenate(waiting).tolist()), read
        stream.close()
