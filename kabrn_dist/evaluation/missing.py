"""Errors for data that is not where a task looks for it, and what is there in its place."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.sources.files import has_ending, is_hidden, list_example_names
from kabrn_dist.evaluation.records import FileLayout, split_of
from kabrn_dist.evaluation.task import Task
from kabrn_dist.utils.errors import UserError

_SHOWN = 4


class MissingData(UserError):
    """Nothing is there that a task can use.

    Attributes:
        short: What is missing or wrong, in a few words, without paths and addresses.
        unusable: Files that are there and damaged, or have the name of the task's; "" if there are none.
        damaged: Whether one of them is damaged, rather than another one's.
    """

    def __init__(self, message: str, short: str, unusable: str = "", damaged: bool = False) -> None:
        super().__init__(message)
        self.short, self.unusable, self.damaged = short, unusable, damaged


class MissingSplit(MissingData):
    """The data of a task is there, but not the split that was asked for.

    Attributes:
        found: Splits that are there.
    """

    def __init__(self, message: str, short: str, found: tuple[str, ...], unusable: str = "") -> None:
        super().__init__(message, short, unusable)
        self.found = found


class RejectedFile(NamedTuple):
    """A file that was looked into and is not used.

    Attributes:
        name: With the folders below the given path.
        reason: What is wrong with it.
        is_other: Whether it may belong to another task.
        split: That its name says.
    """

    name: str
    reason: str
    is_other: bool
    split: str


def shown_name(name: str, path: Path) -> str:
    """Return the name of a file below a folder without the folder's own.

    Example:
        >>> shown_name("data/gsm8k/test.jsonl", Path("data"))
        'data/gsm8k/test.jsonl'
        >>> shown_name("tmp/gsm8k/test.jsonl", Path("/tmp"))
        'gsm8k/test.jsonl'
    """
    return name.partition("/")[2] if path.is_dir() and "/" in name else name


def describe_missing(
    task: Task,
    path: Path,
    split: str,
    layout: FileLayout,
    others: Mapping[str, Sequence[str]],
    rejected: Sequence[RejectedFile],
) -> MissingData:
    """Return the error for a split of which no file could be used.

    Args:
        task: The task.
        path: Where it was looked for.
        split: That was looked for.
        layout: Of the task's files.
        others: Names of files of other splits.
        rejected: All files that were looked into and are not the task's, or are damaged.
    """
    where = f"expected {task.layout}; published at {task.published}"
    rejected = [*rejected, *_find_folders(path, layout)]
    folders = {name.rpartition("/")[0] for names in others.values() for name in names}
    is_specific = not re.search(layout.pattern, "x.jsonl", re.IGNORECASE)
    own = [
        file
        for file in rejected
        if file.split == split
        and (path.is_file() or is_specific or not file.is_other or file.name.rpartition("/")[0] in folders)
    ]
    unusable = _list_files(own, path)
    if others:
        return _describe_split(task, path, split, others, unusable, where)
    if own:
        them = "it" if len(own) == 1 else "them"
        return MissingData(
            f"{path}: no file of task {task.name} can be used: {unusable}; get {them} again; {where}",
            f"cannot use {unusable}",
            unusable,
            any(not file.is_other for file in own),
        )
    seen = _list_files(rejected, path) or ", ".join(list_example_names([path])) or "nothing"
    return MissingData(
        f"{path}: no data of task {task.name} there; found {seen}; {where}; give --data its file or folder",
        f"no data found; expected {task.layout}",
    )


def _describe_split(
    task: Task, path: Path, split: str, others: Mapping[str, Sequence[str]], unusable: str, where: str
) -> MissingSplit:
    listed = "; ".join(
        f"{name}: {shown_name(names[0], path)}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        for name, names in others.items()
    )
    usable = [name for name in others if name in task.splits]
    problem = f"no file of split {split} of task {task.name} can be used: {unusable}"
    missing = f"no split {split} of task {task.name} there"
    remedy = f"get the files of {split} again" if unusable else f"add the files of {split}"
    remedy = f"use --split {usable[0]}, or {remedy}" if usable else remedy
    short = f"cannot use {unusable}" if unusable else f"no split {split} found"
    return MissingSplit(
        f"{path}: {problem if unusable else missing}; found {listed}; {remedy}; {where}",
        f"{short}; use --split {task.name}={usable[0]}" if usable else short,
        tuple(others),
        unusable,
    )


def _list_files(files: Sequence[RejectedFile], path: Path) -> str:
    shown = ", ".join(f"{shown_name(file.name, path)} ({file.reason})" for file in files[:_SHOWN])
    return f"{shown} and {len(files) - _SHOWN} more" if len(files) > _SHOWN else shown


def _find_folders(path: Path, layout: FileLayout) -> list[RejectedFile]:
    """Return folders that have the names of files of the task."""
    found = []
    for folder, names, _ in os.walk(path):
        names[:] = sorted(name for name in names if not is_hidden(name))
        for name in names:
            full = f"{path.name}/{Path(folder, name).relative_to(path).as_posix()}"
            if has_ending(name, layout.endings) and re.search(layout.pattern, full, re.IGNORECASE):
                found.append(RejectedFile(full, "it is a folder", False, split_of(name)))
    return found
