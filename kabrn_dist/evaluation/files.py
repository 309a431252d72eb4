"""Find and read the published files of a task: a file, an archive, a folder, or a folder of several tasks' data.

A task's files are recognized by their names and by the fields of their first record, so that `--data` may name a folder
with other data in it. A benchmark is read whole or not at all: a damaged record is an error, never left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.archive import Member, open_members
from data_prep.sources.compression import READ_ERRORS, describe_error
from data_prep.sources.files import FileFilter, has_ending, list_units
from kabrn_dist.evaluation.missing import RejectedFile, describe_missing, shown_name
from kabrn_dist.evaluation.records import DataFile, FileLayout, Record, UnusableRecord, read_records, split_of
from kabrn_dist.evaluation.task import Task
from kabrn_dist.utils.errors import UserError

# A unit is never divided: the order of records is that of the file.
_WHOLE = 1 << 62
_SHOWN = 4


def find_files(task: Task, path: Path, split: str, layout: FileLayout) -> list[DataFile]:
    """Read all files of a task's split.

    Args:
        task: For messages, and its first split, which files belong to whose names say none.
        path: A file, an archive, or a folder of both.
        split: Split to read.
        layout: Which files belong to the task.

    Raises:
        MissingData: if nothing of the task is there that can be used; MissingSplit if other splits are.
        UserError: if a file is damaged.
    """
    if split not in task.splits:
        raise UserError(f"--split {split}: task {task.name} has no such split; use one of {', '.join(task.splits)}")
    files: list[DataFile] = []
    others: dict[str, list[str]] = {}
    rejected: list[RejectedFile] = []
    try:
        for member in _open_members(path, layout):
            found = split_of(member.name) or task.splits[0]
            try:
                records = read_records(member, layout)
                first = next(records)
                if found == split:
                    files.append(DataFile(member.name, [first, *records]))
                else:
                    others.setdefault(found, []).append(member.name)
            except UnusableRecord as error:
                # A file of a folder may be another task's; one whose first record is the task's is its own.
                if error.number > 1 or _is_json(member):
                    raise _describe_damage(task, path, member, error) from error
                rejected.append(RejectedFile(member.name, error.reason, error.is_other, found))
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read ({describe_error(error)}); get it again: {task.published}") from error
    damaged = [file for file in rejected if file.split == split and not file.is_other]
    if not files or (layout.has_several and damaged):
        raise describe_missing(task, path, split, layout, others, rejected)
    return files


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
        names = ", ".join(shown_name(file.name, path) for file in files[:_SHOWN])
        raise UserError(
            f"{path}: {len(files)} files of task {task.name} hold split {split} ({names}); give --data one of them"
        )
    return files[0]


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


def _describe_damage(task: Task, path: Path, member: Member, error: UnusableRecord) -> UserError:
    name = shown_name(member.name, path)
    where = str(path) if name == path.name else f"{path}: {name}"
    line = "" if _is_json(member) else f" line {error.number}"
    return UserError(f"{where}{line}: {error.reason}; the file is damaged; get it again: {task.published}")


def _open_members(path: Path, layout: FileLayout) -> Iterator[Member]:
    file_filter = FileFilter(
        layout.endings,
        lambda name: re.search(layout.pattern, name, re.IGNORECASE) is not None,
        accepts_archive=lambda name: re.search(layout.archives, name, re.IGNORECASE) is not None,
    )
    for unit in list_units([path], file_filter, _WHOLE):
        yield from open_members(unit, file_filter, [], Counter())


def _is_json(member: Member) -> bool:
    return has_ending(member.name, (".json",))
