"""What all sources that read files share: finding units, reading their members, and one answer to what goes wrong."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from data_prep.documents import Document, Unit
from data_prep.sources.archive import Member, open_members, read_lines, read_text
from data_prep.sources.compression import READ_ERRORS, describe_error
from data_prep.sources.files import UNIT_BYTES, FileFilter, FileGroup, list_example_names, list_units
from data_prep.sources.layout import LayoutMismatch, describe_record, guess_source
from kabrn_dist.utils.errors import UserError

# So many files or lines of another layout, and not one of the right one, are the wrong input.
_MAX_MISMATCHES = 100


class SourceOptions(BaseModel):
    """Settings of a source: fixed, and unknown ones refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileSource(ABC):
    """A source that reads files. Subclasses say what their files are called and what documents are in one.

    `expected` is the layout in words; `licence` what its publisher asks for ("" where it is the user's own).
    """

    kind: ClassVar[str]
    expected: ClassVar[str]
    endings: ClassVar[tuple[str, ...]]
    license: ClassVar[str] = ""
    options_class: ClassVar[type[SourceOptions]]

    def __init__(self, inputs: Sequence[Path], options: SourceOptions, unit_bytes: int = UNIT_BYTES) -> None:
        """Take inputs and checked options; raises UserError without inputs."""
        if not inputs:
            raise UserError(f"input: source {self.kind} needs at least one file or folder: {self.expected}.")
        self.inputs = tuple(inputs)
        self.options: Any = options
        self.unit_bytes = unit_bytes

    @property
    def masked(self) -> bool:
        """Whether documents have spans: the loss counts on answers only."""
        return getattr(self.options, "loss", "all") == "answer"

    def units(self) -> list[Unit | FileGroup]:
        """Return the pieces of work, sorted by name. Raises UserError for a wrong or empty input."""
        units = list_units(self.inputs, self.file_filter(), self.unit_bytes)
        if not units:
            raise self._empty_error(", ".join(map(str, self.inputs)), list_example_names(self.inputs))
        return units

    def read(self, unit: Unit | FileGroup) -> Iterator[Document]:
        """Yield the documents of `unit` in order, in bounded memory.

        What cannot be read in a folder is a document without text; raises UserError for damage to an input given
        by name (it is all there is) and for another layout.
        """
        wrong: list[LayoutMismatch] | None = []
        try:
            for found in self._read(unit):
                if isinstance(found, LayoutMismatch):
                    yield Document(found.name, None, problem=f"found {found.description}")
                    wrong = self._record_mismatch(wrong, found)
                    continue
                if found.text is not None:
                    wrong = None
                yield found
        except READ_ERRORS as error:
            if self._is_given_by_name(unit):
                raise UserError(
                    f"{unit.path}: cannot be read ({describe_error(error)}). Replace it or leave it out."
                ) from error
            yield Document(unit.name, None, problem=describe_error(error))
        if wrong and getattr(unit, "start", 0) == 0:
            raise self._layout_error(wrong[0])

    def file_filter(self) -> FileFilter:
        """Return what counts as a file of this source."""
        return FileFilter(self.endings, self.accepts)

    def accepts(self, name: str) -> bool:
        """Return whether a file found under this name (folders by "/") belongs to the source."""
        return True

    @abstractmethod
    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield the documents of one file."""

    def parse_members(self, members: Iterator[Member]) -> Iterator[Document | LayoutMismatch]:
        """Yield the documents of a unit's files; for sources whose documents lie in several files."""
        for member in members:
            yield from self.parse_member(member)

    def _read(self, unit: Unit | FileGroup) -> Iterator[Document | LayoutMismatch]:
        seen: list[str] = []
        any_member = False

        def noted() -> Iterator[Member]:
            nonlocal any_member
            for member in open_members(unit, self.file_filter(), seen):
                any_member = True
                yield member

        yield from self.parse_members(noted())
        if not any_member and self._is_given_by_name(unit):
            raise self._empty_error(str(unit.path), seen)
        if not any_member:
            yield Document(unit.name, None, problem=f"nothing in it for source {self.kind}")

    def _is_given_by_name(self, unit: Unit | FileGroup) -> bool:
        return unit.path in self.inputs

    def _record_mismatch(
        self, wrong: list[LayoutMismatch] | None, found: LayoutMismatch
    ) -> list[LayoutMismatch] | None:
        if wrong is not None:
            wrong.append(found)
            if len(wrong) >= _MAX_MISMATCHES:
                raise self._layout_error(wrong[0])
        return wrong

    def _layout_error(self, first: LayoutMismatch) -> UserError:
        return UserError(f"{first.name}: found {first.description}. Source {self.kind} expects {self.expected}.")

    def _empty_error(self, where: str, names: list[str]) -> UserError:
        found = f"found {', '.join(names)}" if names else "it is empty"
        guess = guess_source(names)
        if guess in (self.kind, f"{self.kind} with layout: {getattr(self.options, 'layout', '')}"):
            given = ", ".join(f"{key}: {value}" for key, value in self.options)
            found += f"; that is its layout, but the options leave it out ({given})"
        elif guess:
            found += f"; it looks like {guess}"
        return UserError(f"input {where}: no file for source {self.kind}; {found}. Expected: {self.expected}.")


def parse_json_file(member: Member) -> Any | Document | LayoutMismatch:
    """Return the JSON value that a whole file holds, or what is wrong with it."""
    whole = read_text(member)
    return whole._replace(raw=None) if whole.text is None else parse_json(whole.name, whole.text)


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
            yield Document(name, None, problem=f"not UTF-8: byte {line[error.start]:#04x} at {error.start}")
            continue
        record = parse_json(name, text)
        if isinstance(record, dict):
            yield name, record
        else:
            yield record if isinstance(record, LayoutMismatch) else LayoutMismatch(name, describe_record(record))
