"""Texts to score, from files, folders, archives, or shard sets that `mixkabrn prepare` made."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.documents import Document
from data_prep.sources.archive import Member, open_members
from data_prep.sources.compression import READ_ERRORS, describe_error
from data_prep.sources.files import ARCHIVES, FileFilter, has_ending, list_example_names, list_units
from data_prep.sources.layout import LayoutMismatch
from data_prep.sources.text import Text, TextOptions
from kabrn_dist.data.index import INDEX_NAME, Source
from kabrn_dist.data.shard_set import FolderSet, open_shard_folder
from kabrn_dist.data.token_stream import TokenStream
from kabrn_dist.evaluation.missing import MissingData, MissingSplit, shown_name
from kabrn_dist.evaluation.records import split_of
from kabrn_dist.utils.errors import UserError

TEXT_SPLITS = ("validation", "train", "test")
TEXT_LAYOUT = (
    "a text file, a folder or archive of .txt, .md and .jsonl files (field 'text'), or a folder that mixkabrn prepare "
    "made"
)
_ENDINGS = (".txt", ".md", ".jsonl")
# A name says a split only by a part of its own: wiki.test.txt, train/notes.md, but not test-of-time.txt.
_SPLIT_PART = re.compile(r"(?:^|[./])(train|dev|val|valid|validation|test)(?=[./])", re.IGNORECASE)
_STREAM_TOKENS = 1 << 20
_SHOWN = 4


class _OtherData(Exception):
    """A file in a folder is other data than texts."""


class SourceText(NamedTuple):
    """A document.

    Attributes:
        source: Where it is from: a source of a shard set, or a file or folder below the given one.
        name: Unique, and the same in every run.
        text: The document, not empty.
    """

    source: str
    name: str
    text: str


def read_texts(path: Path, split: str) -> list[SourceText]:
    """Read the documents of a split.

    A file that is given by name is read whatever its name says. In a folder, files whose names say no split belong to
    "validation", and .jsonl files without texts, which are other data, are left out. Of a shard set the tokens are
    decoded, so that any model can score its texts by its own tokenizer.

    Args:
        path: Where they are; see `TEXT_LAYOUT`.
        split: One of `TEXT_SPLITS`.

    Raises:
        MissingData: if there are none; MissingSplit if other splits are there.
        UserError: if a file is damaged.
    """
    if split not in TEXT_SPLITS:
        raise UserError(f"--split {split}: texts have no such split; use one of {', '.join(TEXT_SPLITS)}")
    rejected: list[str] = []
    if (path / INDEX_NAME).is_file():
        texts = list(_read_shard_set(path, split))
        found = {"train", "validation"}
    else:
        texts, found, rejected = _read_files(path, split)
    if texts:
        return texts
    if other := found - {split}:
        raise MissingSplit(
            f"{path}: no texts of split {split} there; found {', '.join(sorted(other))}; use --split "
            f"{min(other)}, or give --data the file itself",
            f"no texts of split {split} found; use --split {min(other)}",
            tuple(sorted(other)),
        )
    seen = ", ".join(rejected[:_SHOWN] or list_example_names([path])) or "nothing"
    raise MissingData(f"{path}: no texts there; found {seen}; give --data {TEXT_LAYOUT}", "no texts found")


def describe_left_out(path: Path) -> str:
    """Return how many .jsonl files below a path hold no texts, and which; "" if all do, or none is there."""
    if not path.is_dir() or (path / INDEX_NAME).is_file():
        return ""
    names = [shown_name(member.name, path) for member in _open_texts(path, False) if _find_other(member, path)]
    listed = f"{', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
    is_one = len(names) == 1
    return f"{len(names)} .jsonl file{'' if is_one else 's'} without texts left out: {listed}" if names else ""


def _read_files(path: Path, split: str) -> tuple[list[SourceText], set[str], list[str]]:
    texts: list[SourceText] = []
    found: set[str] = set()
    rejected: list[str] = []
    is_single = path.is_file() and not path.name.lower().endswith(ARCHIVES)
    try:
        for member in _open_texts(path, is_single):
            own = split if is_single else _text_split(member.name)
            try:
                if own == split:
                    texts += _read_member(member, path, is_single)
                elif has_ending(member.name, (".jsonl",)):
                    next(_read_member(member, path, is_single), None)
                found.add(own)
            except _OtherData as reason:
                rejected.append(f"{shown_name(member.name, path)} ({reason})")
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read ({describe_error(error)}); replace it") from error
    return texts, found, rejected


def _open_texts(path: Path, is_single: bool) -> Iterator[Member]:
    endings = ("",) if is_single else _ENDINGS
    file_filter = FileFilter(endings, lambda name: True, accepts_archive=lambda name: not path.is_dir())
    for unit in list_units([path], file_filter, 1 << 62):
        yield from open_members(unit, file_filter, [], Counter())


def _read_member(member: Member, path: Path, is_single: bool) -> Iterator[SourceText]:
    # A file that is given by name and has another ending is a text all the same.
    read_as = member if has_ending(member.name, (".jsonl",)) else member._replace(name=f"{member.name}.txt")
    parts = member.name.split("/")
    source = parts[-1] if is_single else parts[1] if path.is_dir() else parts[0]
    for number, item in enumerate(Text([path], TextOptions()).parse_member(read_as), 1):
        if not isinstance(item, Document) or item.text is None:
            problem = item.problem if isinstance(item, Document) else item.description.partition("; it looks like")[0]
            if number == 1 and not is_single and isinstance(item, LayoutMismatch) and "no JSON" not in problem:
                raise _OtherData(problem)
            name = shown_name(member.name, path)
            raise UserError(f"{path}: {name} cannot be read as text ({problem}); repair it or leave it out")
        if item.text:
            yield SourceText(source, f"{member.name}:{number}", item.text)


def _find_other(member: Member, path: Path) -> bool:
    try:
        if has_ending(member.name, (".jsonl",)):
            next(_read_member(member, path, False), None)
    except _OtherData:
        return True
    return False


def _text_split(name: str) -> str:
    found = _SPLIT_PART.findall(name)
    return split_of(found[-1]) if found else "validation"


def _read_shard_set(folder: Path, split: str) -> Iterator[SourceText]:
    if split == "test":
        return
    shards = open_shard_folder(folder)
    tokenizer = shards.tokenizer()
    for source in shards.index.sources:
        for number, tokens in enumerate(_documents(shards, source, split), 1):
            if len(tokens):
                yield SourceText(source.name, f"{source.name}:{number}", tokenizer.decode(tokens.tolist()))


def _documents(shards: FolderSet, source: Source, split: str) -> Iterator[np.ndarray]:
    """Yield the tokens of each document without the document token."""
    stream = TokenStream([(shards, source)], "train" if split == "train" else "validation")
    try:
        rest = np.empty(0, np.int64)
        for start in range(0, len(stream), _STREAM_TOKENS):
            tokens = np.concatenate([rest, stream.read(start, min(start + _STREAM_TOKENS, len(stream)))])
            begins = np.flatnonzero(tokens == shards.index.document_token)
            for begin, end in itertools.pairwise(begins.tolist()):
                yield tokens[begin + 1 : end]
            rest = tokens[begins[-1] :] if len(begins) else tokens
        yield rest[1:]
    finally:
        stream.close()
