"""Stage 1: source → clean → runs. A work item is a unit of a source; its record is written last."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.clean.contamination import EvaluationSets, list_evaluation_files, load_evaluation_sets
from data_prep.clean.minhash import band_keys
from data_prep.clean.pipeline import Cleaner
from data_prep.clean.removed import RemovedDocument
from data_prep.documents import Document, Unit
from data_prep.progress import StageProgress
from data_prep.recipe import Recipe, SourceRecipe
from data_prep.sorted_runs import RunWriter, document_id
from data_prep.sources import DataSource, FileGroup
from data_prep.sources.build import build_source
from data_prep.sources.files import walk_files
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.fault_injection import inject_fault

SAMPLES_PER_REASON = 3
SHOWN_CHARACTERS = 200
_LISTED_UNREADABLE = 20


class ReadTask(NamedTuple):
    """One piece of reading: unit `unit` of the recipe's source `source`. Numbers rise in the order of the recipe."""

    number: int
    source: int
    unit: Any

    @property
    def name(self) -> str:
        """Of its record and its runs."""
        return f"item-{self.number:06d}"


@dataclass
class ReadRecord:
    """What reading one item has given. All counts but `documents` and `bytes` are of what was kept or left out.

    `lengths[n]` counts kept documents of 2^(n−1) ≤ bytes < 2^n. `samples`: by reason, (name, beginning, particulars).
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

    def count_removed(self, reason: str, name: str, text: str, detail: str = "") -> None:
        """Count a document that is left out; the first few of each reason are kept as samples."""
        self.removed[reason] += 1
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES_PER_REASON:
            samples.append((name, text[:SHOWN_CHARACTERS], detail[:SHOWN_CHARACTERS]))

    def count_unreadable(self, document: Document) -> None:
        """Count a document that could not be read."""
        self.unreadable += 1
        if len(self.unreadable_names) < _LISTED_UNREADABLE:
            self.unreadable_names.append(f"{document.name}: {document.problem}")

    def merge(self, other: ReadRecord) -> None:
        """Add the counts of a later item of the same source."""
        for name in ("tasks", "documents", "bytes", "clean_documents", "clean_bytes", "unreadable"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.masked |= other.masked
        for name in ("removed", "languages", "lengths"):
            getattr(self, name).update(getattr(other, name))
        for reason, samples in other.samples.items():
            self.samples[reason] = (self.samples.get(reason, []) + samples)[:SAMPLES_PER_REASON]
        self.unreadable_names = (self.unreadable_names + other.unreadable_names)[:_LISTED_UNREADABLE]
        self.runs = self.runs + other.runs


def read_record(path: Path) -> ReadRecord:
    """The record of a finished item."""
    fields = json.loads(path.read_bytes())
    fields["lengths"] = Counter({int(size): count for size, count in fields["lengths"].items()})
    fields["removed"], fields["languages"] = Counter(fields["removed"]), Counter(fields["languages"])
    return ReadRecord(**fields)


def select_runs(recipe: Recipe, records: Sequence[ReadRecord], stage: str) -> tuple[list[str], int]:
    """Runs of the sources that take part in stage "exact" or "near", and how many documents they hold."""
    taking = [
        record
        for source, record in zip(recipe.sources, records, strict=True)
        if getattr(recipe.cleaning_config(source), stage)
    ]
    return [run for record in taking for run in record.runs], sum(record.clean_documents for record in taking)


class SourceReader:
    """Opens the recipe's sources, lists the items, and reads them one at a time.

    Raises UserError for inputs that are not there or not in the layout of their kind.
    """

    def __init__(self, recipe: Recipe, folder: Path, texts: bool = True) -> None:
        self._recipe, self._folder, self._texts = recipe, folder, texts
        self._sources = [_open_source(recipe, source) for source in recipe.sources]
        self._cleaners: dict[int, Cleaner] = {}
        self._contaminants: dict[str, EvaluationSets] = {}
        self.tasks: list[ReadTask] = []
        for number, source in enumerate(self._sources):
            for unit in source.units():
                self.tasks.append(ReadTask(len(self.tasks), number, unit))

    def is_finished(self, task: ReadTask) -> bool:
        """Whether an earlier run has read `item`."""
        return self._record_path(task).exists()

    def records(self) -> list[ReadRecord]:
        """One record a source, all its items added up."""
        sums = [ReadRecord(number, tasks=0) for number in range(len(self._sources))]
        for item in self.tasks:
            sums[item.source].merge(read_record(self._record_path(item)))
        return sums

    def licenses(self) -> dict[str, str]:
        """What the publishers ask for, by the recipe's names of sources; "" where that is not known."""
        named = zip(self._recipe.sources, self._sources, strict=True)
        return {recipe.name: source.license for recipe, source in named}

    def load_cleaners(self) -> None:
        """Read the evaluation sets. Raises UserError when they cannot be read."""
        for number in range(len(self._sources)):
            self._cleaner(number)

    def read(self, task: ReadTask, progress: StageProgress) -> None:
        """Read, clean and store the documents of one item. Raises UserError as sources and cleaning do."""
        source, cleaner = self._recipe.sources[task.source], self._cleaner(task.source)
        record = ReadRecord(task.source)
        writer = RunWriter(self._folder, task.name, self._texts)
        left = task.unit.bytes
        for document in self._sources[task.source].read(task.unit):
            size = len(document.text or document.raw or b"")
            record.documents += 1
            record.bytes += size
            work = min(size, left)
            left -= work
            progress.advance(1, size, work)
            if document.text is None and document.raw is None:
                record.count_unreadable(document)
                continue
            _store(document, cleaner, record, writer, task, source)
        writer.flush()
        record.runs = writer.names
        inject_fault("data.part")
        atomic_write(self._record_path(task), json.dumps(vars(record), sort_keys=True).encode())
        progress.advance(0, 0, left)

    def _record_path(self, task: ReadTask) -> Path:
        return self._folder / f"{task.name}.json"

    def _cleaner(self, number: int) -> Cleaner:
        if number not in self._cleaners:
            settings = self._recipe.cleaning_config(self._recipe.sources[number])
            key = settings.contamination.model_dump_json()
            if settings.contamination.paths and key not in self._contaminants:
                self._contaminants[key] = load_evaluation_sets(settings.contamination)
            self._cleaners[number] = Cleaner(settings, self._contaminants.get(key))
        return self._cleaners[number]


def _store(
    document: Document, cleaner: Cleaner, record: ReadRecord, writer: RunWriter, task: ReadTask, source: SourceRecipe
) -> None:
    """Clean one document and store it, or count why not."""
    outcome = cleaner(document)
    if isinstance(outcome, RemovedDocument):
        record.count_removed(outcome.reason, document.name, document.text or document.problem, outcome.detail)
        return
    clean = outcome.document
    assert clean.text is not None
    try:
        text = clean.text.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
        record.count_removed("not Unicode", clean.name, ascii(clean.text))
        return
    if not text:
        record.count_removed("empty", clean.name, "")
        return
    if source.interleave and clean.key is None:
        raise UserError(
            f"{clean.name}: has no key, and source {source.name!r} is interleaved by keys. Name the field of the key "
            "in its options, or drop interleave."
        )
    settings = cleaner.config
    keys = band_keys(clean.text, settings.near_numbers) if settings.near else None
    record.clean_documents += 1
    record.clean_bytes += len(text)
    record.lengths[len(text).bit_length()] += 1
    record.masked |= clean.spans is not None
    if outcome.language is not None:
        record.languages[outcome.language] += 1
    writer.add(
        document_id(task.number, record.documents), clean if source.interleave else clean._replace(key=None), text, keys
    )


def _open_source(recipe: Recipe, source: SourceRecipe) -> DataSource:
    return build_source(source.kind, recipe.input_paths(source), dict(source.options))


def digest_inputs(reader: SourceReader, recipe: Recipe) -> str:
    """What the set depends on, as one line: the recipe, and name, size and time of every file to read."""
    digest = hashlib.sha256(recipe.model_dump_json(exclude={"out"}).encode())
    for path in _other_files(recipe):
        digest.update(f"{path.name} {_file_state(path)}".encode())
    for task in reader.tasks:
        unit = task.unit
        # Spelled out in this form, so that folders that earlier versions finished are still recognized.
        kind, fields = "Unit" if isinstance(unit, Unit) else "Group", unit._replace(path=None)._asdict()
        described = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        digest.update(f"Item(number={task.number}, source={task.source}, unit={kind}({described}))".encode())
        for path in _unit_files(unit):
            digest.update(f"{path.name} {_file_state(path)}".encode())
    return digest.hexdigest()


def _other_files(recipe: Recipe) -> Iterator[Path]:
    """The tokenizer and the evaluation sets."""
    if recipe.tokenizer.file is not None:
        yield recipe.tokenizer.file
    for source in recipe.sources:
        for path in recipe.cleaning_config(source).contamination.paths:
            yield from list_evaluation_files(path)


def _unit_files(unit: Unit | FileGroup) -> Iterator[Path]:
    if isinstance(unit, Unit):
        yield unit.path
    else:
        yield from (unit.path / name for name, _ in walk_files(unit.path, unit.first, unit.last))


def _file_state(path: Path) -> str:
    try:
        state = path.stat()
    except OSError as error:
        # Reading it will tell.
        return str(error.strerror)
    return f"{state.st_size} {state.st_mtime_ns}"
