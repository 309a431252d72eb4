"""Stage 1: source → clean → runs. A work item is a unit of a source; its record is written last."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.clean.contamination import Contaminants, collect, evaluation_files
from data_prep.clean.minhash import signature
from data_prep.clean.pipeline import Cleaner
from data_prep.clean.removed import Removed
from data_prep.documents import Document, Unit
from data_prep.progress import StageProgress
from data_prep.recipe import Recipe, SourceRecipe
from data_prep.sorted_runs import RunWriter, document_id
from data_prep.sources import DataSource, Group
from data_prep.sources.build import make_source
from data_prep.sources.files import walk
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.fault_injection import inject_fault

SAMPLES = 3
SAMPLE_CHARACTERS = 200
_LISTED_UNREADABLE = 20


class Item(NamedTuple):
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
    items: int = 1
    documents: int = 0
    bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    masked: bool = False
    removed: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    unreadable: int = 0
    unreadable_names: list[str] = field(default_factory=list)
    languages: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    runs: list[str] = field(default_factory=list)

    def remove(self, reason: str, name: str, text: str, detail: str = "") -> None:
        """Count a document that is left out; the first few of each reason are kept as samples."""
        self.removed[reason] += 1
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES:
            samples.append((name, text[:SAMPLE_CHARACTERS], detail[:SAMPLE_CHARACTERS]))

    def fail(self, document: Document) -> None:
        """Count a document that could not be read."""
        self.unreadable += 1
        if len(self.unreadable_names) < _LISTED_UNREADABLE:
            self.unreadable_names.append(f"{document.name}: {document.problem}")

    def include(self, other: ReadRecord) -> None:
        """Add the counts of a later item of the same source."""
        for name in ("items", "documents", "bytes", "kept", "kept_bytes", "unreadable"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.masked |= other.masked
        for name in ("removed", "languages", "lengths"):
            getattr(self, name).update(getattr(other, name))
        for reason, samples in other.samples.items():
            self.samples[reason] = (self.samples.get(reason, []) + samples)[:SAMPLES]
        self.unreadable_names = (self.unreadable_names + other.unreadable_names)[:_LISTED_UNREADABLE]
        self.runs = self.runs + other.runs


def load_record(path: Path) -> ReadRecord:
    """The record of a finished item."""
    fields = json.loads(path.read_bytes())
    fields["lengths"] = Counter({int(size): count for size, count in fields["lengths"].items()})
    fields["removed"], fields["languages"] = Counter(fields["removed"]), Counter(fields["languages"])
    return ReadRecord(**fields)


def runs_of(recipe: Recipe, records: Sequence[ReadRecord], stage: str) -> tuple[list[str], int]:
    """Runs of the sources that take part in stage "exact" or "near", and how many documents they hold."""
    taking = [
        record
        for source, record in zip(recipe.sources, records, strict=True)
        if getattr(recipe.cleaning(source), stage)
    ]
    return [run for record in taking for run in record.runs], sum(record.kept for record in taking)


class SourceReader:
    """Opens the recipe's sources, lists the items, and reads them one at a time.

    Raises UserError for inputs that are not there or not in the layout of their kind.
    """

    def __init__(self, recipe: Recipe, folder: Path, texts: bool = True) -> None:
        self._recipe, self._folder, self._texts = recipe, folder, texts
        self._sources = [_open(recipe, source) for source in recipe.sources]
        self._cleaners: dict[int, Cleaner] = {}
        self._contaminants: dict[str, Contaminants] = {}
        self.items: list[Item] = []
        for number, source in enumerate(self._sources):
            for unit in source.units():
                self.items.append(Item(len(self.items), number, unit))

    def finished(self, item: Item) -> bool:
        """Whether an earlier run has read `item`."""
        return self._record(item).exists()

    def records(self) -> list[ReadRecord]:
        """One record a source, all its items added up."""
        sums = [ReadRecord(number, items=0) for number in range(len(self._sources))]
        for item in self.items:
            sums[item.source].include(load_record(self._record(item)))
        return sums

    def licenses(self) -> dict[str, str]:
        """What the publishers ask for, by the recipe's names of sources; "" where that is not known."""
        named = zip(self._recipe.sources, self._sources, strict=True)
        return {recipe.name: source.license for recipe, source in named}

    def prepare_cleaners(self) -> None:
        """Read the evaluation sets. Raises UserError when they cannot be read."""
        for number in range(len(self._sources)):
            self._cleaner(number)

    def read(self, item: Item, tally: StageProgress) -> None:
        """Read, clean and store the documents of one item. Raises UserError as sources and cleaning do."""
        source, cleaner = self._recipe.sources[item.source], self._cleaner(item.source)
        record = ReadRecord(item.source)
        writer = RunWriter(self._folder, item.name, self._texts)
        left = item.unit.bytes
        for document in self._sources[item.source].read(item.unit):
            size = len(document.text or document.raw or b"")
            record.documents += 1
            record.bytes += size
            work = min(size, left)
            left -= work
            tally.advance(1, size, work)
            if document.text is None and document.raw is None:
                record.fail(document)
                continue
            _keep(document, cleaner, record, writer, item, source)
        writer.flush()
        record.runs = writer.names
        inject_fault("data.part")
        atomic_write(self._record(item), json.dumps(vars(record), sort_keys=True).encode())
        tally.advance(0, 0, left)

    def _record(self, item: Item) -> Path:
        return self._folder / f"{item.name}.json"

    def _cleaner(self, number: int) -> Cleaner:
        if number not in self._cleaners:
            settings = self._recipe.cleaning(self._recipe.sources[number])
            key = settings.contamination.model_dump_json()
            if settings.contamination.paths and key not in self._contaminants:
                self._contaminants[key] = collect(settings.contamination)
            self._cleaners[number] = Cleaner(settings, self._contaminants.get(key))
        return self._cleaners[number]


def _keep(
    document: Document, cleaner: Cleaner, record: ReadRecord, writer: RunWriter, item: Item, source: SourceRecipe
) -> None:
    """Clean one document and store it, or count why not."""
    outcome = cleaner(document)
    if isinstance(outcome, Removed):
        record.remove(outcome.reason, document.name, document.text or document.problem, outcome.detail)
        return
    clean = outcome.document
    assert clean.text is not None
    try:
        text = clean.text.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no UTF-8 text can hold.
        record.remove("not Unicode", clean.name, ascii(clean.text))
        return
    if not text:
        record.remove("empty", clean.name, "")
        return
    if source.interleave and clean.key is None:
        raise UserError(
            f"{clean.name}: has no key, and source {source.name!r} is interleaved by keys. Name the field of the key "
            "in its options, or drop interleave."
        )
    settings = cleaner.settings
    keys = signature(clean.text, settings.near_numbers) if settings.near else None
    record.kept += 1
    record.kept_bytes += len(text)
    record.lengths[len(text).bit_length()] += 1
    record.masked |= clean.spans is not None
    if outcome.language is not None:
        record.languages[outcome.language] += 1
    writer.add(
        document_id(item.number, record.documents), clean if source.interleave else clean._replace(key=None), text, keys
    )


def _open(recipe: Recipe, source: SourceRecipe) -> DataSource:
    return make_source(source.kind, recipe.inputs(source), dict(source.options))


def inputs_of(reader: SourceReader, recipe: Recipe) -> str:
    """What the set depends on, as one line: the recipe, and name, size and time of every file to read."""
    digest = hashlib.sha256(recipe.model_dump_json(exclude={"out"}).encode())
    for path in _files_beside(recipe):
        digest.update(f"{path.name} {_state(path)}".encode())
    for item in reader.items:
        digest.update(repr(item._replace(unit=item.unit._replace(path=None))).encode())
        for path in _files_of(item.unit):
            digest.update(f"{path.name} {_state(path)}".encode())
    return digest.hexdigest()


def _files_beside(recipe: Recipe) -> Iterator[Path]:
    """The tokenizer and the evaluation sets."""
    if recipe.tokenizer.file is not None:
        yield recipe.tokenizer.file
    for source in recipe.sources:
        for path in recipe.cleaning(source).contamination.paths:
            yield from evaluation_files(path)


def _files_of(unit: Unit | Group) -> Iterator[Path]:
    if isinstance(unit, Unit):
        yield unit.path
    else:
        yield from (unit.path / name for name, _ in walk(unit.path, unit.first, unit.last))


def _state(path: Path) -> str:
    try:
        state = path.stat()
    except OSError as error:
        # Reading it will tell.
        return str(error.strerror)
    return f"{state.st_size} {state.st_mtime_ns}"
