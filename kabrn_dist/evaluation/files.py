"""Find and read the published files of a task: a file, an archive, a folder, or a folder of several tasks' data.

A task's files are recognized by their names and by the fields of their first record, so that `--data` may name a folder
with other data in it. A benchmark is read whole or not at all: a damaged record is an error, never left out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.documents import Document
from data_prep.sources.archive import Member, open_members
from data_prep.sources.base import parse_json_file, read_json_lines
from data_prep.sources.compression import READ_ERRORS, describe_error
from data_prep.sources.files import FileFilter, has_ending, list_example_names, list_units
from data_prep.sources.layout import LayoutMismatch, describe_record
from data_prep.sources.text import parse_text_lines
from kabrn_dist.evaluation.task import Task
from kabrn_dist.utils.errors import UserError

# A unit is never divided: the order of records is that of the file.
_WHOLE = 1 << 62
_SHOWN = 4
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


class MissingSplit(UserError):
    """The data of a task is there, but not the split that was asked for.

    Attributes:
        found: Splits that are there.
    """

    def __init__(self, message: str, found: tuple[str, ...]) -> None:
        super().__init__(message)
        self.found = found


class _OtherData(Exception):
    """The first record of a file is not the task's."""


@dataclass(frozen=True)
class FileLayout:
    """How the files of a task are recognized.

    Attributes:
        accepts: Whether a record has the task's fields.
        pattern: Regular expression, upper and lower case alike, that the name of a file in a folder or archive
            contains.
        archives: Regular expression that the name of an archive in a folder contains; others are not opened.
        endings: Endings of the names: .json (a record), .jsonl (one in each line), .lst (a "label" in each line), .txt
            (a "text" in each line that is not blank).
    """

    accepts: Callable[[Mapping[str, Any]], bool]
    pattern: str = ""
    archives: str = "(?!)"
    endings: tuple[str, ...] = (".jsonl",)


class DataFile(NamedTuple):
    """Records of a file.

    Attributes:
        name: Of the file, with the folders below the given path.
        records: In the order of the file.
    """

    name: str
    records: list[Record]


def find_files(task: Task, path: Path, split: str, layout: FileLayout) -> list[DataFile]:
    """Read all files of a task's split.

    Args:
        task: For messages, and its first split, which files belong to whose names say none.
        path: A file, an archive, or a folder of both.
        split: Split to read.
        layout: Which files belong to the task.

    Raises:
        MissingSplit: if only other splits are there.
        UserError: if nothing of the task is there, or a file is damaged.
    """
    if split not in task.splits:
        raise UserError(f"--split {split}: task {task.name} has no such split; use one of {', '.join(task.splits)}")
    files: list[DataFile] = []
    others: dict[str, list[str]] = {}
    rejected: list[str] = []
    try:
        for member in _open_members(path, layout):
            found = split_of(member.name) or task.splits[0]
            try:
                records = _read_records(member, layout, task, path)
                first = next(records)
            except _OtherData as reason:
                rejected.append(f"{member.name} ({reason})")
                continue
            if found == split:
                files.append(DataFile(member.name, [first, *records]))
            else:
                others.setdefault(found, []).append(member.name)
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read ({describe_error(error)}); get it again: {task.published}") from error
    if files:
        return files
    where = f"expected {task.layout}; published at {task.published}"
    if others:
        raise _missing_split(task, path, split, others, where)
    seen = ", ".join(rejected[:_SHOWN] or list_example_names([path])) or "nothing"
    raise UserError(f"{path}: no data of task {task.name} there; found {seen}; {where}; give --data its file or folder")


def find_records(task: Task, path: Path, split: str, layout: FileLayout) -> list[Record]:
    """Read the one file of a task's split.

    Args:
        task: As for `find_files`.
        path: As for `find_files`.
        split: As for `find_files`.
        layout: As for `find_files`.

    Raises:
        UserError: as `find_files`, and for several files of the split.
    """
    return require_one(task, path, split, find_files(task, path, split, layout)).records


def require_one(task: Task, path: Path, split: str, files: list[DataFile]) -> DataFile:
    """Return the only file of a list.

    Args:
        task: For the message.
        path: For the message.
        split: For the message.
        files: Files that were found, at least one.

    Raises:
        UserError: for several.
    """
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:_SHOWN])
        raise UserError(
            f"{path}: {len(files)} files of task {task.name} hold split {split} ({names}); give --data one of them"
        )
    return files[0]


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


def unique_ids(ids: list[str]) -> list[str]:
    """Return ids of which the second and later ones that are the same end in "#2", "#3", …

    Example:
        >>> unique_ids(["a", "b", "a"])
        ['a', 'b', 'a#2']
    """
    seen: Counter[str] = Counter()
    unique = []
    for each in ids:
        seen[each] += 1
        unique.append(each if seen[each] == 1 else f"{each}#{seen[each]}")
    return unique


def has_texts(record: Mapping[str, Any], *fields: str) -> bool:
    """Return whether all these fields of a record are texts."""
    return all(isinstance(record.get(field), str) for field in fields)


def _missing_split(task: Task, path: Path, split: str, others: dict[str, list[str]], where: str) -> MissingSplit:
    listed = "; ".join(
        f"{name}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}" for name, names in others.items()
    )
    usable = [name for name in others if name in task.splits]
    remedy = f"use --split {usable[0]}, or add the files of {split}" if usable else f"add the files of {split}"
    return MissingSplit(
        f"{path}: no split {split} of task {task.name} there; found {listed}; {remedy}; {where}", tuple(others)
    )


def _open_members(path: Path, layout: FileLayout) -> Iterator[Member]:
    file_filter = FileFilter(
        layout.endings,
        lambda name: re.search(layout.pattern, name, re.IGNORECASE) is not None,
        accepts_archive=lambda name: re.search(layout.archives, name, re.IGNORECASE) is not None,
    )
    for unit in list_units([path], file_filter, _WHOLE):
        yield from open_members(unit, file_filter, [], Counter())


def _read_records(member: Member, layout: FileLayout, task: Task, path: Path) -> Iterator[Record]:
    is_json = has_ending(member.name, (".json",))
    number = 0
    for number, item in enumerate(_parse(member), 1):
        problem = item if isinstance(item, str) else _find_problem(item, layout)
        if not problem and not isinstance(item, str):
            yield item
        elif number == 1 and not is_json:
            raise _OtherData(problem)
        else:
            where = str(path) if member.name == path.name else f"{path}: {member.name}"
            line = "" if is_json else f" line {number}"
            raise UserError(f"{where}{line}: {problem}; the file is damaged; get it again: {task.published}")
    if number == 0:
        raise _OtherData("empty")


def _parse(member: Member) -> Iterator[Record | str]:
    items: Iterator[Any]
    if has_ending(member.name, (".lst", ".txt")):
        field = "label" if has_ending(member.name, (".lst",)) else "text"
        items = (item if item.text is None else {field: item.text.strip()} for item in parse_text_lines(member))
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


def _find_problem(record: Record, layout: FileLayout) -> str:
    if not layout.accepts(record):
        return f"it has {describe_record(record)}"
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"half a surrogate pair (U+{ord(error.object[error.start]):04X})"
    return ""
