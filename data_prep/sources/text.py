"""Text files in any language: .txt (a document each, or a line or paragraph each) and .jsonl (a document a line).

Files may be packed (.gz, .zst) or lie in archives. Line ends and byte order marks inside a document stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from data_prep.documents import Document
from data_prep.sources.archive import Member, lines_of, text_of
from data_prep.sources.base import FileSource, Options, records_of
from data_prep.sources.decode import decoded
from data_prep.sources.files import Find, ends_in
from data_prep.sources.jsonl import FieldOptions, from_fields
from data_prep.sources.layout import Mismatch

_PARAGRAPH_BYTES = 64 << 20


class TextOptions(Options):
    """`unit`: what a document of a .txt is; `field`: the text in a line of a .jsonl."""

    unit: Literal["document", "line", "paragraph"] = "document"
    field: str = "text"


class Text(FileSource):
    """People's own texts."""

    kind = "text"
    expected = ".txt or .jsonl files"
    endings = (".txt", ".jsonl")
    settings = TextOptions

    def find(self) -> Find:
        """Cut a .txt between lines or paragraphs if these are the documents."""
        cut = {"document": None, "line": b"\n", "paragraph": b"\n\n"}[self.options.unit]
        return super().find()._replace(cut=cut)

    def documents(self, member: Member) -> Iterator[Document | Mismatch]:
        """Yield the documents of one file."""
        if ends_in(member.name, (".jsonl",)):
            fields = FieldOptions(field=self.options.field)
            for item in records_of(member):
                yield item if isinstance(item, Document | Mismatch) else from_fields(*item, fields)
        elif self.options.unit == "document":
            yield text_of(member)
        elif self.options.unit == "line":
            yield from text_lines(member)
        else:
            yield from _paragraphs(member)


def text_lines(member: Member) -> Iterator[Document]:
    """Yield a document for each line that is not blank, without its line end."""
    for item in lines_of(member):
        if isinstance(item, Document):
            yield item
        elif item[1].strip():
            yield decoded(item[0], item[1].removesuffix(b"\n").removesuffix(b"\r"))


def _paragraphs(member: Member) -> Iterator[Document]:
    name, held, size = "", [], 0
    for item in lines_of(member):
        if isinstance(item, Document):
            yield item
            continue
        place, line = item
        if line.strip():
            name, size = name or place, size + len(line)
            # Beyond the limit lines are counted but not kept.
            if size <= _PARAGRAPH_BYTES:
                held.append(line)
        elif name:
            yield _paragraph(name, held, size)
            name, held, size = "", [], 0
    if name:
        yield _paragraph(name, held, size)


def _paragraph(name: str, held: list[bytes], size: int) -> Document:
    if size > _PARAGRAPH_BYTES:
        return Document(name, None, problem=f"a paragraph above {_PARAGRAPH_BYTES >> 20} MiB")
    return decoded(name, b"".join(held).removesuffix(b"\n").removesuffix(b"\r"))
