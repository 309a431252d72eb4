"""Examples of evaluations that training shards contain, by shared n-grams (GPT-3, arXiv 2005.14165, appendix C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kabrn_dist.data.index import SplitName
from kabrn_dist.evaluation.contamination_search import MAX_PLACES, find_too_short, search_shards
from kabrn_dist.utils.terminal import escape_controls

NGRAM_WORDS = 13
_SHOWN_IDS = 5


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
        too_short: Of these, those with fewer than 5 words, which were not searched for.
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
            f"examples that share {self.words} words in a row with the {self.documents:,} documents of {self.shards}",
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
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ContaminationReport:
    """Search the documents of a folder of shards for examples, reading each once.

    An example is found in a document that has any n-gram of its words; case and what is between words do not count. A
    shorter example has to be in it as a whole.

    Args:
        shards: The folder.
        examples: Task → its examples, as pairs of an id and the text to search for.
        words: Length of the n-grams.
        split: Split of the shards.
        workers: Processes that search side by side.
        progress: Called with the tokens that were searched and all tokens.

    Raises:
        UserError: if something of the shards is missing or damaged.
    """
    texts = [text for pairs in examples.values() for _, text in pairs]
    too_short = find_too_short(texts, words)
    counts, places, seen = [0] * len(texts), dict[int, list[Overlap]](), dict[str, int]()
    for source, part in search_shards(shards, split, texts, words, workers, progress):
        # Documents are numbered through a source, which may have been searched in parts.
        offset = seen.get(source, 0)
        seen[source] = offset + part.documents
        for example, (count, matches) in part.found.items():
            counts[example] += count
            known = places.setdefault(example, [])
            known += [Overlap(source, offset + number, shared) for number, shared in matches]
            del known[MAX_PLACES:]
    tasks, first = [], 0
    for name, pairs in examples.items():
        numbers = range(first, first + len(pairs))
        found = tuple(
            ContaminatedExample(id, counts[number], tuple(places[number]))
            for number, (id, _) in zip(numbers, pairs, strict=True)
            if counts[number]
        )
        tasks.append(TaskContamination(name, len(pairs), len(too_short.intersection(numbers)), found))
        first += len(pairs)
    return ContaminationReport(shards, words, sum(seen.values()), tuple(tasks))
