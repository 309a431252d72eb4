"""Records of a task's file: lines of JSON, of text or of labels, each with the fields that the task needs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_prep.documents import Document
from data_prep.sources.archive import Member
from data_prep.sources.base import parse_json_file, read_json_lines
from data_prep.sources.files import has_ending
from data_prep.sources.layout import LayoutMismatch
from data_prep.sources.text import parse_text_lines

_SHOWN_FIELDS = 8
_SPLIT_OF_WORD = {
    "train": "train",
    "dev": "validation",
    "development": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}

Record = dict[str, Any]


def _find_nothing(record: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class FileLayout:
    """How the files of a task are recognized.

    Attributes:
        accepts: Whether a record has the task's fields, with values of their kinds. If not, it is another task's.
        problem: What is wrong with the values of such a record; "" if nothing is.
        pattern: Regular expression, upper and lower case alike, that the name of a file in a folder or archive
            contains.
        archives: Regular expression that the name of an archive in a folder contains; others are not opened.
        endings: Endings of the names: .json (a record), .jsonl (one in each line), .lst (a "label" in each line), .txt
            (a "text" in each line that is not blank).
        has_several: Whether a split has several files, all of which are needed.
    """

    accepts: Callable[[Mapping[str, Any]], bool]
    problem: Callable[[Mapping[str, Any]], str] = _find_nothing
    pattern: str = ""
    archives: str = "(?!)"
    endings: tuple[str, ...] = (".jsonl",)
    has_several: bool = False


class DataFile(NamedTuple):
    """Records of a file.

    Attributes:
        name: Of the file, with the folders below the given path.
        records: In the order of the file.
    """

    name: str
    records: list[Record]


class UnusableRecord(Exception):
    """A record that is damaged, or of another task.

    Args:
        reason: What is wrong with it, after the name of its file and a colon.
        number: Of the record, from 1 on; 0 for a file that has none.
        is_other: Whether it may well be right, with the fields of another task.
    """

    def __init__(self, reason: str, number: int, is_other: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.number, self.is_other = reason, number, is_other


def read_records(member: Member, layout: FileLayout) -> Iterator[Record]:
    """Yield the records of a file, at least one.

    Raises:
        UnusableRecord: at the first one that is not the task's, or for a file without any.
    """
    number = 0
    for number, item in enumerate(_parse(member), 1):
        if isinstance(item, str):
            raise UnusableRecord(item, number)
        if not layout.accepts(item):
            raise UnusableRecord(f"it has {list_fields(item)}", number, is_other=True)
        if problem := layout.problem(item) or _find_half_pair(item):
            raise UnusableRecord(problem, number)
        yield item
    if number == 0:
        raise UnusableRecord("it is empty", 0)


def split_of(name: str) -> str:
    """Return the split that a file's name or the nearest folder names, or "".

    Example:
        >>> split_of("nq_open/NQ-open.dev.jsonl"), split_of("MATH/train/algebra/1.json"), split_of("texts/all.jsonl")
        ('validation', 'train', '')
    """
    for part in reversed(name.lower().split("/")):
        for word in re.split(r"[^a-z]+", part):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return ""


def has_texts(record: Mapping[str, Any], *fields: str) -> bool:
    """Return whether all these fields of a record are texts."""
    return all(isinstance(record.get(field), str) for field in fields)


def find_blank(record: Mapping[str, Any], *fields: str) -> str:
    """Return that one of these texts is blank, with its name; "" if none is.

    Example:
        >>> find_blank({"question": "Why?", "answer": " "}, "question", "answer")
        "'answer' is blank"
    """
    return next((f"{field!r} is blank" for field in fields if not record[field].strip()), "")


def list_fields(record: object) -> str:
    """Return the names of a record's first fields, for messages.

    Example:
        >>> list_fields({"question": "Why?", "answer": "So."})
        "'question', 'answer'"
    """
    if not isinstance(record, Mapping):
        return f"a {type(record).__name__}"
    return ", ".join(map(repr, list(record)[:_SHOWN_FIELDS])) or "no fields"


def _parse(member: Member) -> Iterator[Record | str]:
    items: Iterator[Any]
    if has_ending(member.name, (".lst", ".txt")):
        field = "label" if has_ending(member.name, (".lst",)) else "text"
        items = (
            item if item.text is None else {field: item.text.removeprefix("\ufeff").strip()}
            for item in parse_text_lines(member)
        )
    elif has_ending(member.name, (".jsonl",)):
        items = (item if isinstance(item, Document | LayoutMismatch) else item[1] for item in read_json_lines(member))
    else:
        items = iter([parse_json_file(member)])
    for item in items:
        if isinstance(item, Document):
            yield item.problem
        elif isinstance(item, LayoutMismatch):
            yield item.description
        else:
            yield item if isinstance(item, dict) else f"a {type(item).__name__}, no object"


def _find_half_pair(record: Record) -> str:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"half a surrogate pair (U+{ord(error.object[error.start]):04X})"
    return ""
