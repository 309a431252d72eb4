"""Stage 1: read and clean the sources and write runs. A task is one unit of a source; its record is written last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_prep.clean.contamination import EvaluationSets, load_evaluation_sets
from data_prep.clean.minhash import band_keys
from data_prep.clean.pipeline import Cleaner
from data_prep.clean.removed import RemovedDocument
from data_prep.documents import Document, Unit
from data_prep.progress import StageProgress
from data_prep.recipe import Recipe, SourceRecipe
from data_prep.sorted_runs import RunWriter, document_id
from data_prep.sources import DataSource, FileGroup
from data_prep.sources.build import build_source
from data_prep.sources.conversations import Rendering
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.fault_injection import inject_fault

SAMPLES_PER_REASON = 3
SHOWN_CHARACTERS = 200
_LISTED_UNREADABLE = 20
_LOSSES = ("unreadable", "lost_bytes", "mismatches", "stretches", "malformed")


class ReadTask(NamedTuple):
    """One task: read one unit of a source.

    Attributes:
        number: number of the task; numbers rise in the order of the recipe.
        source: number of the source in the recipe.
        unit: what to read.
    """

    number: int
    source: int
    unit: Unit | FileGroup

    @property
    def name(self) -> str:
        """Name of its record, and beginning of the names of its runs."""
        return f"item-{self.number:06d}"


@dataclass
class ReadRecord:
    """Result of one task, or the sum over all tasks of a source.

    Attributes:
        source: number of the source in the recipe.
        tasks: number of tasks in the sum.
        documents: number of documents read.
        bytes: characters of text read, or bytes where they could not be decoded.
        clean_documents: number of documents kept.
        clean_bytes: bytes of text of these.
        masked: whether any of these has a loss mask.
        removed: number of documents removed, by reason.
        samples: a few removed documents by reason, as (name, beginning, particulars).
        unreadable: number of documents that could not be read.
        unreadable_names: the first of these, with the reasons.
        languages: number of documents kept, by language.
        lengths: number of documents kept, by size: `lengths[n]` counts those of 2^(n−1) ≤ bytes < 2^n.
        runs: names of the runs written.
        removed_bytes: characters of text removed, by reason.
        lost_bytes: bytes that could not be read, as far as known.
        mismatches: number of documents of another layout among the unreadable ones.
        stretches: number of documents that are parts of larger texts.
        left_out: number of files that the source did not open, by reason.
        malformed: number of malformed conversations, which are among those removed.
        malformed_names: the first of these, with the reasons.
    """

    source: int
    tasks: int = 1
    documents: int = 0
    bytes: int = 0
    clean_documents: int = 0
    clean_bytes: int = 0
    masked: bool = False
    removed: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    unreadable: int = 0
    unreadable_names: list[str] = field(default_factory=list)
    languages: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    runs: list[str] = field(default_factory=list)
    removed_bytes: Counter[str] = field(default_factory=Counter)
    lost_bytes: int = 0
    mismatches: int = 0
    stretches: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    malformed: int = 0
    malformed_names: list[str] = field(default_factory=list)

    def count_removed(self, reason: str, name: str, text: str, detail: str = "", size: int | None = None) -> None:
        """Count a removed document, of `size` or the size of `text`; the first few of each reason become samples."""
        self.removed[reason] += 1
        self.removed_bytes[reason] += len(text) if size is None else size
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES_PER_REASON:
            samples.append((name, text[:SHOWN_CHARACTERS], detail[:SHOWN_CHARACTERS]))

    def count_unreadable(self, document: Document) -> None:
        """Count a document that could not be read."""
        self.unreadable += 1
        self.lost_bytes += document.lost_bytes
        self.mismatches += document.mismatch
        if len(self.unreadable_names) < _LISTED_UNREADABLE:
            self.unreadable_names.append(f"{document.name}: {document.problem}")

    def count_malformed(self, document: Document) -> None:
        """Count a malformed conversation among those removed, by its reason."""
        self.malformed += 1
        self.count_removed(document.malformed, document.name, "", document.problem, document.lost_bytes)
        if len(self.malformed_names) < _LISTED_UNREADABLE:
            self.malformed_names.append(f"{document.name}: {document.problem}")

    def merge(self, other: ReadRecord) -> None:
        """Add the counts of a later task of the same source."""
        for name in ("tasks", "documents", "bytes", "clean_documents", "clean_bytes", *_LOSSES):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.masked |= other.masked
        for name in ("removed", "removed_bytes", "left_out", "languages", "lengths"):
            getattr(self, name).update(getattr(other, name))
        for reason, samples in other.samples.items():
            self.samples[reason] = (self.samples.get(reason, []) + samples)[:SAMPLES_PER_REASON]
        self.unreadable_names = (self.unreadable_names + other.unreadable_names)[:_LISTED_UNREADABLE]
        self.malformed_names = (self.malformed_names + other.malformed_names)[:_LISTED_UNREADABLE]
        self.runs = self.runs + other.runs


def read_record(path: Path) -> ReadRecord:
    """Read the record of a finished task."""
    fields = json.loads(path.read_bytes())
    fields["lengths"] = Counter({int(size): count for size, count in fields["lengths"].items()})
    for name in ("removed", "removed_bytes", "left_out", "languages"):
        fields[name] = Counter(fields[name])
    return ReadRecord(**fields)


def select_runs(recipe: Recipe, records: Sequence[ReadRecord], stage: str) -> tuple[list[str], int]:
    """Return the runs of the sources that take part in stage "exact" or "near", and the number of their documents."""
    selected = [
        record
        for source, record in zip(recipe.sources, records, strict=True)
        if getattr(recipe.cleaning_config(source), stage)
    ]
    return [run for record in selected for run in record.runs], sum(record.clean_documents for record in selected)


class SourceReader:
    """Opens the sources of a recipe, lists the tasks, and does them one at a time.

    Args:
        recipe: the recipe.
        folder: folder for runs and records.
        texts: whether to store the texts.
        rendering: how conversations become text; None: by the default template.

    Attributes:
        tasks: all reading tasks.

    Raises:
        UserError: an input is missing or not in the layout of its kind.
    """

    def __init__(self, recipe: Recipe, folder: Path, texts: bool = True, rendering: Rendering | None = None) -> None:
        self._recipe, self._folder, self._texts = recipe, folder, texts
        self._sources = [_open_source(recipe, source, rendering) for source in recipe.sources]
        self._cleaners: dict[int, Cleaner] = {}
        self._evaluation_sets: dict[str, EvaluationSets] = {}
        self._unlisted: list[Counter[str]] = []
        self.tasks: list[ReadTask] = []
        for number, source in enumerate(self._sources):
            for unit in source.units():
                self.tasks.append(ReadTask(len(self.tasks), number, unit))
            self._unlisted.append(Counter(source.left_out))

    def is_finished(self, task: ReadTask) -> bool:
        """Return whether an earlier run did `task`."""
        return self._record_path(task).exists()

    def records(self) -> list[ReadRecord]:
        """Return one record per source, the sum over its tasks."""
        sums = [ReadRecord(number, tasks=0, left_out=Counter(files)) for number, files in enumerate(self._unlisted)]
        for task in self.tasks:
            sums[task.source].merge(read_record(self._record_path(task)))
        return sums

    def expected_layouts(self) -> list[str]:
        """Return what each source expects, in words."""
        return [source.expected for source in self._sources]

    def licenses(self) -> dict[str, str]:
        """Return the license of each source by its name in the recipe; "" if it is not known."""
        named = zip(self._recipe.sources, self._sources, strict=True)
        return {recipe.name: source.license for recipe, source in named}

    def load_cleaners(self) -> None:
        """Read the evaluation sets.

        Raises:
            UserError: one of them cannot be read.
        """
        for number in range(len(self._sources)):
            self._cleaner(number)

    def read(self, task: ReadTask, progress: StageProgress) -> None:
        """Read, clean and store the documents of one task.

        Raises:
            UserError: the source or the cleaning refuses an input, or the disk refuses.
        """
        source, cleaner = self._recipe.sources[task.source], self._cleaner(task.source)
        record = ReadRecord(task.source)
        writer = RunWriter(self._folder, task.name, self._texts)
        remaining = task.unit.bytes
        reader = self._sources[task.source]
        reader.left_out.clear()
        for document in reader.read(task.unit):
            size = document.lost_bytes if document.malformed else len(document.text or document.raw or b"")
            record.documents += 1
            record.bytes += size
            record.stretches += document.stretch
            completed = min(size, remaining)
            remaining -= completed
            progress.advance(1, size, completed)
            if document.malformed:
                record.count_malformed(document)
                continue
            if document.text is None and document.raw is None:
                record.count_unreadable(document)
                continue
            _store(document, cleaner, record, writer, task, source)
        writer.flush()
        record.runs = writer.names
        record.left_out = Counter(reader.left_out)
        inject_fault("data.part")
        atomic_write(self._record_path(task), json.dumps(vars(record), sort_keys=True).encode())
        progress.advance(0, 0, remaining)

    def _record_path(self, task: ReadTask) -> Path:
        return self._folder / f"{task.name}.json"

    def _cleaner(self, number: int) -> Cleaner:
        if number not in self._cleaners:
            config = self._recipe.cleaning_config(self._recipe.sources[number])
            key = config.contamination.model_dump_json()
            if config.contamination.paths and key not in self._evaluation_sets:
                self._evaluation_sets[key] = load_evaluation_sets(config.contamination, self._recipe.out)
            self._cleaners[number] = Cleaner(config, self._evaluation_sets.get(key))
        return self._cleaners[number]


def _store(
    document: Document, cleaner: Cleaner, record: ReadRecord, writer: RunWriter, task: ReadTask, source: SourceRecipe
) -> None:
    """Clean one document and store it, or count the reason why it is removed."""
    outcome = cleaner(document)
    if isinstance(outcome, RemovedDocument):
        size = len(document.text or document.raw or b"")
        record.count_removed(outcome.reason, document.name, document.text or document.problem, outcome.detail, size)
        return
    clean = outcome.document
    assert clean.text is not None
    try:
        text = clean.text.encode()
    except UnicodeEncodeError:
        # JSON can contain half of a surrogate pair, which UTF-8 cannot.
        record.count_removed("not Unicode", clean.name, ascii(clean.text))
        return
    if not text:
        record.count_removed("empty", clean.name, "")
        return
    if source.interleave and clean.key is None:
        raise UserError(
            f"{clean.name}: has no key, and source {source.name!r} is interleaved by keys; name the field of the key "
            "in its options, or drop interleave"
        )
    config = cleaner.config
    keys = band_keys(clean.text, config.near_numbers) if config.near else None
    record.clean_documents += 1
    record.clean_bytes += len(text)
    record.lengths[len(text).bit_length()] += 1
    record.masked |= clean.spans is not None
    if outcome.language is not None:
        record.languages[outcome.language] += 1
    writer.add(
        document_id(task.number, record.documents), clean if source.interleave else clean._replace(key=None), text, keys
    )


def _open_source(recipe: Recipe, source: SourceRecipe, rendering: Rendering | None) -> DataSource:
    return build_source(source.kind, recipe.input_paths(source), dict(source.options), recipe.out, rendering)
