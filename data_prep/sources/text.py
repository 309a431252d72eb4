"""Text files: .txt with one document per file, line or paragraph, and .jsonl with one document per line.

A .txt above 64 MiB becomes several documents.
Files may be compressed (.gz, .zst) or in archives. Line ends and byte order marks within a document are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from data_prep.documents import Document
from data_prep.sources.archive import Member, read_lines, read_stretches
from data_prep.sources.base import FileSource, SourceOptions, read_json_lines
from data_prep.sources.decode import decode_document
from data_prep.sources.files import FileFilter, has_ending
from data_prep.sources.jsonl import FieldOptions, make_document_from_fields
from data_prep.sources.layout import LayoutMismatch

_PARAGRAPH_BYTES = 64 << 20


class TextOptions(SourceOptions):
    """Options of text files.

    Attributes:
        unit: what one document of a .txt is.
        field: field of the text in a .jsonl.
    """

    unit: Literal["document", "line", "paragraph"] = "document"
    field: str = "text"


class Text(FileSource):
    """Texts of the user."""

    kind = "text"
    expected = ".txt or .jsonl files"
    endings = (".txt", ".jsonl")
    options_class = TextOptions

    def file_filter(self) -> FileFilter:
        """Return which files to read; a .txt may be cut between lines or paragraphs if these are the documents."""
        boundary = {"document": None, "line": b"\n", "paragraph": b"\n\n"}[self.options.unit]
        return super().file_filter()._replace(boundary=boundary)

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield the documents of one file."""
        if has_ending(member.name, (".jsonl",)):
            fields = FieldOptions(field=self.options.field)
            for item in read_json_lines(member):
                yield item if isinstance(item, Document | LayoutMismatch) else make_document_from_fields(*item, fields)
        elif self.options.unit == "document":
            yield from read_stretches(member)
        elif self.options.unit == "line":
            yield from parse_text_lines(member)
        else:
            yield from _paragraphs(member)


def parse_text_lines(member: Member) -> Iterator[Document]:
    """Yield one document per line that is not blank, without its line end."""
    for item in read_lines(member):
        if isinstance(item, Document):
            yield item
        elif item[1].strip():
            yield decode_document(item[0], item[1].removesuffix(b"\n").removesuffix(b"\r"))


def _paragraphs(member: Member) -> Iterator[Document]:
    name, lines, size = "", [], 0
    for item in read_lines(member):
        if isinstance(item, Document):
            yield item
            continue
        line_name, line = item
        if line.strip():
            name, size = name or line_name, size + len(line)
            # Lines beyond the limit are counted but not stored.
            if size <= _PARAGRAPH_BYTES:
                lines.append(line)
        elif name:
            yield _paragraph(name, lines, size)
            name, lines, size = "", [], 0
    if name:
        yield _paragraph(name, lines, size)


def _paragraph(name: str, lines: list[bytes], size: int) -> Document:
    if size > _PARAGRAPH_BYTES:
        return Document(name, None, problem=f"a paragraph above {_PARAGRAPH_BYTES >> 20} MiB", lost_bytes=size)
    return decode_document(name, b"".join(lines).removesuffix(b"\n").removesuffix(b"\r"))
