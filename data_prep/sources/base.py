"""What all sources that read files share: finding units, reading their members, and one answer to what goes wrong."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from data_prep.documents import Document, Unit
from data_prep.sources.archive import Member, lines_of, members, text_of
from data_prep.sources.files import UNIT_BYTES, Find, Group, find_units, found_names
from data_prep.sources.layout import Mismatch, guess_keys, guess_names
from data_prep.sources.packed import DAMAGE, reason
from kabrn_dist.utils.errors import UserError

# So many files or lines of another layout, and not one of the right one, are the wrong input.
_WRONG = 100


class Options(BaseModel):
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
    settings: ClassVar[type[Options]]

    def __init__(self, inputs: Sequence[Path], options: Options, unit_bytes: int = UNIT_BYTES) -> None:
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

    def units(self) -> list[Unit | Group]:
        """Return the pieces of work, sorted by name. Raises UserError for a wrong or empty input."""
        units = find_units(self.inputs, self.find(), self.unit_bytes)
        if not units:
            raise self._nothing(", ".join(map(str, self.inputs)), found_names(self.inputs))
        return units

    def read(self, unit: Unit | Group) -> Iterator[Document]:
        """Yield the documents of `unit` in order, in bounded memory.

        What cannot be read in a folder is a document without text; raises UserError for damage to an input given
        by name (it is all there is) and for another layout.
        """
        wrong: list[Mismatch] | None = []
        try:
            for found in self._read(unit):
                if isinstance(found, Mismatch):
                    yield Document(found.name, None, problem=f"found {found.found}")
                    wrong = self._note(wrong, found)
                    continue
                if found.text is not None:
                    wrong = None
                yield found
        except DAMAGE as error:
            if self._named(unit):
                raise UserError(
                    f"{unit.path}: cannot be read ({reason(error)}). Replace it or leave it out."
                ) from error
            yield Document(unit.name, None, problem=reason(error))
        if wrong and getattr(unit, "start", 0) == 0:
            raise self._mismatch(wrong[0])

    def find(self) -> Find:
        """Return what counts as a file of this source."""
        return Find(self.endings, self.wants)

    def wants(self, name: str) -> bool:
        """Return whether a file found under this name (folders by "/") belongs to the source."""
        return True

    @abstractmethod
    def documents(self, member: Member) -> Iterator[Document | Mismatch]:
        """Yield the documents of one file."""

    def gather(self, found: Iterator[Member]) -> Iterator[Document | Mismatch]:
        """Yield the documents of a unit's files; for sources whose documents lie in several files."""
        for member in found:
            yield from self.documents(member)

    def _read(self, unit: Unit | Group) -> Iterator[Document | Mismatch]:
        seen: list[str] = []
        any_member = False

        def noted() -> Iterator[Member]:
            nonlocal any_member
            for member in members(unit, self.find(), seen):
                any_member = True
                yield member

        yield from self.gather(noted())
        if not any_member and self._named(unit):
            raise self._nothing(str(unit.path), seen)
        if not any_member:
            yield Document(unit.name, None, problem=f"nothing in it for source {self.kind}")

    def _named(self, unit: Unit | Group) -> bool:
        return unit.path in self.inputs

    def _note(self, wrong: list[Mismatch] | None, found: Mismatch) -> list[Mismatch] | None:
        if wrong is not None:
            wrong.append(found)
            if len(wrong) >= _WRONG:
                raise self._mismatch(wrong[0])
        return wrong

    def _mismatch(self, first: Mismatch) -> UserError:
        return UserError(f"{first.name}: found {first.found}. Source {self.kind} expects {self.expected}.")

    def _nothing(self, where: str, names: list[str]) -> UserError:
        found = f"found {', '.join(names)}" if names else "it is empty"
        guess = guess_names(names)
        if guess in (self.kind, f"{self.kind} with layout: {getattr(self.options, 'layout', '')}"):
            given = ", ".join(f"{key}: {value}" for key, value in self.options)
            found += f"; that is its layout, but the options leave it out ({given})"
        elif guess:
            found += f"; it looks like {guess}"
        return UserError(f"input {where}: no file for source {self.kind}; {found}. Expected: {self.expected}.")


def parse_record(member: Member) -> Any | Document | Mismatch:
    """Return the JSON value that a whole file holds, or what is wrong with it."""
    whole = text_of(member)
    return whole._replace(raw=None) if whole.text is None else parse(whole.name, whole.text)


def parse(name: str, text: str) -> Any | Mismatch:
    """Return the JSON value of `text`, which may begin with a byte order mark."""
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:  # ValueError alone: a number of thousands of digits
        return Mismatch(name, f"no JSON ({reason(error)})")


def records_of(member: Member) -> Iterator[tuple[str, dict[str, Any]] | Document | Mismatch]:
    """Yield (name, JSON object) of each line that is not blank, or what is wrong with the line."""
    for item in lines_of(member):
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
        record = parse(name, text)
        if isinstance(record, dict):
            yield name, record
        else:
            yield record if isinstance(record, Mismatch) else Mismatch(name, guess_keys(record))
