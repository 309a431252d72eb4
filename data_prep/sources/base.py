"""Base class of all sources that read files: it lists units, reads their members, and handles errors."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from data_prep.documents import Document, Unit
from data_prep.sources.archive import Member, open_members, read_lines, read_text
from data_prep.sources.compression import READ_ERRORS, describe_error
from data_prep.sources.files import UNIT_BYTES, FileFilter, FileGroup, list_example_names, list_units
from data_prep.sources.layout import LayoutMismatch, describe_kind, describe_record, guess_source
from kabrn_dist.utils.errors import UserError


class SourceOptions(BaseModel):
    """Options of a source: immutable, and unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileSource(ABC):
    """A source that reads files. Subclasses define the names of their files and the documents in a file.

    Attributes:
        kind: name of the kind in recipes.
        expected: the layout in words, for messages.
        endings: endings of the files' names.
        license: license of the publisher; "" for the user's own files.
        options_class: class of the options.
        inputs: files and folders to read.
        options: the options.
        unit_bytes: approximate size of a unit.
        out: the folder for the shards, which is left out of the inputs.
        left_out: number of files that `units` did not list and `read` did not open, by reason; whoever calls these
            may clear it.
    """

    kind: ClassVar[str]
    expected: ClassVar[str]
    endings: ClassVar[tuple[str, ...]]
    license: ClassVar[str] = ""
    options_class: ClassVar[type[SourceOptions]]

    def __init__(self, inputs: Sequence[Path], options: SourceOptions, unit_bytes: int = UNIT_BYTES) -> None:
        """Store inputs and validated options.

        Raises:
            UserError: there are no inputs.
        """
        if not inputs:
            raise UserError(f"input: source {self.kind} needs at least one file or folder; give {self.expected}")
        self.inputs = tuple(inputs)
        self.options: Any = options
        self.unit_bytes = unit_bytes
        self.out: Path | None = None
        self.left_out: Counter[str] = Counter()

    @property
    def masked(self) -> bool:
        """Whether the documents have spans, because only answers carry loss."""
        return getattr(self.options, "loss", "all") == "answer"

    def units(self) -> list[Unit | FileGroup]:
        """Return the units of work, sorted by name.

        Raises:
            UserError: an input is wrong or empty.
        """
        units = list_units(self.inputs, self._filter(), self.unit_bytes, self.left_out)
        if not units:
            raise self._empty_error(", ".join(map(str, self.inputs)), list_example_names(self.inputs))
        return units

    def read(self, unit: Unit | FileGroup) -> Iterator[Document]:
        """Yield the documents of `unit` in order, in bounded memory.

        A file of a folder that cannot be read is a document without text, and so is what has another layout: whether
        the whole input has it is decided when all units have been read.

        Raises:
            UserError: an input that was given by name is damaged.
        """
        try:
            for result in self._read(unit):
                if isinstance(result, LayoutMismatch):
                    yield Document(result.name, None, problem=f"found {result.description}", mismatch=True)
                else:
                    yield result
        except READ_ERRORS as error:
            if self._is_given_by_name(unit):
                raise UserError(
                    f"{unit.path}: cannot be read ({describe_error(error)}); replace it or leave it out"
                ) from error
            yield Document(unit.name, None, problem=describe_error(error), lost_bytes=unit.bytes)

    def file_filter(self) -> FileFilter:
        """Return which files belong to this source."""
        return FileFilter(self.endings, self.accepts)

    def accepts(self, name: str) -> bool:
        """Return whether a file of this name, with folders separated by "/", belongs to the source."""
        return True

    @abstractmethod
    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield the documents of one file."""

    def parse_members(self, members: Iterator[Member]) -> Iterator[Document | LayoutMismatch]:
        """Yield the documents of a unit's files. Sources whose documents consist of several files override it."""
        for member in members:
            yield from self.parse_member(member)

    def _read(self, unit: Unit | FileGroup) -> Iterator[Document | LayoutMismatch]:
        seen: list[str] = []
        any_member = False

        def watched() -> Iterator[Member]:
            nonlocal any_member
            for member in open_members(unit, self._filter(), seen, self.left_out):
                any_member = True
                yield member

        yield from self.parse_members(watched())
        if not any_member and self._is_given_by_name(unit):
            raise self._empty_error(str(unit.path), seen)
        if not any_member:
            yield Document(unit.name, None, problem=f"nothing in it for source {self.kind}")

    def _filter(self) -> FileFilter:
        return self.file_filter()._replace(out=self.out)

    def _is_given_by_name(self, unit: Unit | FileGroup) -> bool:
        return unit.path in self.inputs

    def _empty_error(self, where: str, names: list[str]) -> UserError:
        found = f"found {', '.join(names)}" if names else "it is empty"
        guess = guess_source(names)
        if guess in (self.kind, f"{self.kind} with layout: {getattr(self.options, 'layout', '')}"):
            given = ", ".join(f"{key}: {value}" for key, value in self.options)
            found += f"; that is its layout, but the options exclude it ({given})"
        elif guess:
            found += f"; it looks like {guess}"
        message = f"input {where}: no file for source {self.kind}; {found}; expected {self.expected}"
        return UserError(f"{message}; {describe_kind(guess)}" if "; it looks like" in found else message)


def parse_json_file(member: Member) -> Any | Document | LayoutMismatch:
    """Return the JSON value of a whole file, or what is wrong with it."""
    document = read_text(member)
    return document._replace(raw=None) if document.text is None else parse_json(document.name, document.text)


def parse_json(name: str, text: str) -> Any | LayoutMismatch:
    """Return the JSON value of `text`, which may begin with a byte order mark."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:  # ValueError alone: a number of thousands of digits
        return LayoutMismatch(name, f"no JSON ({describe_error(error)})")


def read_json_lines(member: Member) -> Iterator[tuple[str, dict[str, Any]] | Document | LayoutMismatch]:
    """Yield (name, JSON object) of each line that is not blank, or what is wrong with the line."""
    for item in read_lines(member):
        if isinstance(item, Document):
            yield item
            continue
        name, line = item
        if not line.strip():
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            problem = f"not UTF-8: byte {line[error.start]:#04x} at {error.start}"
            yield Document(name, None, problem=problem, lost_bytes=len(line))
            continue
        record = parse_json(name, text)
        if isinstance(record, dict):
            yield name, record
        else:
            yield record if isinstance(record, LayoutMismatch) else LayoutMismatch(name, describe_record(record))
