"""Lines of JSON: one document per line, from a field, or from a question and an answer.

A plain file is divided into byte ranges, so that many workers share a large file; one worker reads a whole .gz or .zst.
Documents are named by the offset of their line ("notes.jsonl byte 0"), as a worker cannot count the lines before its
own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import model_validator

from data_prep.documents import Document
from data_prep.sources.archive import Member
from data_prep.sources.base import FileSource, SourceOptions, read_json_lines
from data_prep.sources.decode import make_document
from data_prep.sources.layout import LayoutMismatch, describe_record
from data_prep.sources.template import LossTarget, render_question


class FieldOptions(SourceOptions):
    """Names of the fields of a record.

    Attributes:
        field: field of the text.
        key: field of the key that joins parallel texts.
        question: field of the question.
        answer: field of the answer.
        loss: what carries loss.
    """

    field: str = "text"
    key: str | None = None
    question: str | None = None
    answer: str | None = None
    loss: LossTarget = "all"

    @model_validator(mode="after")
    def _pair(self) -> FieldOptions:
        if (self.question is None) != (self.answer is None):
            raise ValueError("question and answer belong together; give both or neither")
        if self.question is not None and "field" in self.model_fields_set:
            raise ValueError("field does not go with question and answer; drop one")
        if self.loss == "answer" and self.question is None:
            raise ValueError("loss: answer needs question and answer; name both fields")
        return self

    def text_fields(self) -> list[str]:
        """Return the names of the one or two fields of the text."""
        return [self.field] if self.question is None or self.answer is None else [self.question, self.answer]


class Jsonl(FileSource):
    """Texts of .jsonl files."""

    kind = "jsonl"
    expected = "one JSON object per line with the fields that the options name (field: text)"
    endings = (".jsonl",)
    options_class = FieldOptions

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield one document per line."""
        for item in read_json_lines(member):
            yield (
                item if isinstance(item, Document | LayoutMismatch) else make_document_from_fields(*item, self.options)
            )


def make_document_from_fields(name: str, record: Mapping[str, Any], options: FieldOptions) -> Document | LayoutMismatch:
    """Return the document of the named fields of `record`. Keys may be numbers."""
    key = record.get(options.key) if options.key is not None else None
    key = str(key) if isinstance(key, int) else key
    if options.key is not None and not isinstance(key, str):
        return LayoutMismatch(name, f"no text under {options.key!r} but {describe_record(record)}")
    for field in options.text_fields():
        value = record.get(field)
        if value is None and field in record:
            return Document(name, None, problem=f"{field!r} is null")
        if not isinstance(value, str):
            found = f"a value of type {type(value).__name__}" if field in record else describe_record(record)
            return LayoutMismatch(name, f"no text under {field!r} but {found}")
    if options.question is None or options.answer is None:
        return make_document(name, record[options.field], key=key)
    return render_question(name, record[options.question], record[options.answer], options.loss, key=key)
