"""Open the members of a unit one after another: a single file, or the files of a folder or archive.

Archives are .tar, .tar.gz, .tgz, .tar.zst and .zip. Nothing is unpacked to disk, so a member's name can do no harm. A
tar is read as a stream in its own order; zip files and folders are read in sorted order.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from data_prep.documents import Document, Unit
from data_prep.sources.compression import BUFFER_BYTES, READ_ERRORS, decompress, describe_error, open_stream
from data_prep.sources.decode import decode_document, printable_name
from data_prep.sources.files import ARCHIVES, FileFilter, FileGroup, is_hidden, walk_files
from data_prep.sources.lines import MAX_LINE_BYTES, iterate_lines
from kabrn_dist.utils.safe_open import open_regular

MAX_MEMBER_BYTES = 64 << 20
# A larger text is read in stretches. Encoding one takes some 135 times its size in memory.
STRETCH_BYTES = 8 << 20
_END = bytes(1024)
_SHOWN = 4
_MEMBER_BUFFER = 1 << 16
# The library copies half of its buffer for each header, so a large one is slow for small members.
_TAR_BUFFER = 1 << 15


class Member(NamedTuple):
    """A file to read.

    Attributes:
        name: its name for messages and documents.
        file: the open file, valid until the next member; None if it cannot be opened.
        problem: why it cannot be opened.
        start: first byte of the range to read.
        stop: byte after the range; −1: to the end.
        independent: whether damage to this member leaves the others readable.
        bytes: its size as it is stored, which is lost if it is damaged.
    """

    name: str
    file: BinaryIO | None
    problem: str = ""
    start: int = 0
    stop: int = -1
    independent: bool = False
    bytes: int = 0


def open_members(
    unit: Unit | FileGroup, file_filter: FileFilter, seen: list[str], left_out: Counter[str]
) -> Iterator[Member]:
    """Yield the members of a unit.

    Args:
        unit: the unit.
        file_filter: which members to open.
        seen: gets the first few names in an archive, for messages.
        left_out: gets the number of members that are not read, by reason.

    Raises:
        Exception: one of `compression.READ_ERRORS`, if an archive or the rest of it cannot be read.
    """
    if isinstance(unit, FileGroup):
        return _open_group(unit, file_filter)
    name = unit.path.name.lower()
    if name.endswith(".zip"):
        return _open_zip(unit.path, file_filter, seen, left_out)
    if name.endswith(ARCHIVES):
        return _open_tar(unit.path, file_filter, seen, left_out)
    return _open_single(unit)


def read_content(member: Member, limit: int = MAX_MEMBER_BYTES) -> bytes | Document:
    """Return all bytes of `member`, or a document with the problem: damaged, or larger than `limit` bytes."""
    if member.file is None:
        return _unreadable(member, member.problem)
    try:
        data = _read(member.file, limit)
    except READ_ERRORS as error:
        if not member.independent:
            raise
        return _unreadable(member, describe_error(error))
    if len(data) > limit:
        size = len(data) + _count_rest(member.file)
        return Document(member.name, None, problem=f"larger than {limit >> 20} MiB", lost_bytes=size)
    return data


def read_text(member: Member) -> Document:
    """Return `member` as one document."""
    data = read_content(member)
    return decode_document(member.name, data) if isinstance(data, bytes) else data


def read_stretches(member: Member, limit: int = MAX_MEMBER_BYTES, size: int = STRETCH_BYTES) -> Iterator[Document]:
    """Yield `member` as one document, or as several if it is larger than `limit` bytes.

    Args:
        member: the file.
        limit: largest size of a single document.
        size: largest size of a stretch. It ends between paragraphs if there is such a place in its second half, else
            between lines, words or characters.
    """
    if member.file is None:
        yield _unreadable(member, member.problem)
        return
    try:
        content = _read(member.file, limit)
        if len(content) <= limit:
            yield decode_document(member.name, content)
            return
        offset = 0
        while content:
            stop = _stretch_end(content, size)
            yield decode_document(f"{member.name} byte {offset}", content[:stop])._replace(stretch=True)
            offset, content = offset + stop, content[stop:]
            if len(content) <= size:
                content += _read(member.file, limit)
    except READ_ERRORS as error:
        if not member.independent:
            raise
        yield _unreadable(member, describe_error(error))


def _stretch_end(content: bytes, size: int) -> int:
    if len(content) <= size:
        return len(content)
    for boundary in (b"\n\n", b"\n", b" "):
        found = content.rfind(boundary, size // 2, size)
        if found >= 0:
            return found + len(boundary)
    while content[size] & 0xC0 == 0x80 and size > 1:
        size -= 1
    return size


def read_lines(member: Member) -> Iterator[tuple[str, bytes] | Document]:
    """Yield (name, line with its end) for each line, or a document with the problem of a line or of the rest."""
    if member.file is None:
        yield _unreadable(member, member.problem)
        return
    try:
        for offset, line in iterate_lines(member.file, member.start, member.stop):
            name = f"{member.name} byte {offset}"
            if isinstance(line, int):
                yield Document(name, None, problem=f"a line above {MAX_LINE_BYTES >> 20} MiB", lost_bytes=line)
            else:
                yield name, line
    except READ_ERRORS as error:
        if not member.independent:
            raise
        yield _unreadable(member, describe_error(error))


def _unreadable(member: Member, problem: str) -> Document:
    return Document(member.name, None, problem=problem, lost_bytes=member.bytes)


def _count_rest(file: BinaryIO) -> int:
    size = 0
    while block := file.read(_MEMBER_BUFFER):
        size += len(block)
    return size


def _read(file: BinaryIO, limit: int) -> bytes:
    # In a single call the library would allocate `limit` bytes for each of a million small files.
    blocks = []
    remaining = limit + 1
    while remaining > 0 and (block := file.read(min(remaining, _MEMBER_BUFFER))):
        blocks.append(block)
        remaining -= len(block)
    return b"".join(blocks)


def _open_single(unit: Unit) -> Iterator[Member]:
    with open_stream(unit.path) as file:
        if unit.start:
            file.seek(unit.start)
        name = unit.name.rpartition("@")[0] if unit.stop >= 0 else unit.name
        yield Member(printable_name(name), file, start=unit.start, stop=unit.stop)


def _open_group(group: FileGroup, file_filter: FileFilter) -> Iterator[Member]:
    for below, size in walk_files(group.path, group.first, group.last, file_filter.skipped_folders, file_filter.out):
        name = f"{group.label}/{below}"
        if name.lower().endswith(ARCHIVES) or not file_filter.matches(name):
            continue
        try:
            file = open_stream(group.path / below)
        except READ_ERRORS as error:
            yield Member(printable_name(name), None, describe_error(error), bytes=size)
            continue
        with file:
            yield Member(printable_name(name), file, independent=True, bytes=size)


class _Header(tarfile.TarInfo):
    """The header of a member. The library takes a damaged one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            # The library handles the end of the file, and the block of zeros that marks it.
            if not any(buf):
                raise
            raise tarfile.ReadError(f"no tar archive, or damaged: {error} where a member should begin") from error


def _open_tar(path: Path, file_filter: FileFilter, seen: list[str], left_out: Counter[str]) -> Iterator[Member]:
    _check_end(path)
    # Tars may follow one another: zeros end only one of them.
    with (
        open_stream(path) as stream,
        tarfile.open(fileobj=stream, mode="r|", bufsize=_TAR_BUFFER, tarinfo=_Header, ignore_zeros=True) as archive,
    ):
        while (info := archive.next()) is not None:
            # Otherwise the headers of millions of members would fill the memory.
            archive.members = []  # type: ignore[attr-defined]
            name = _member_name(info.name)
            if info.isdir() or not name:
                continue
            _record_name(seen, name)
            if not info.isfile():
                left_out["that are links in archives" if info.islnk() or info.issym() else "that are devices"] += 1
            elif file_filter.matches(name):
                file = archive.extractfile(info)
                assert file is not None  # a regular file has content
                yield Member(name, _decompress_member(name, cast(BinaryIO, file)))
            else:
                left_out[file_filter.reason_left_out(name)] += 1


def _open_zip(path: Path, file_filter: FileFilter, seen: list[str], left_out: Counter[str]) -> Iterator[Member]:
    with io.BufferedReader(open_regular(path), BUFFER_BYTES) as file, zipfile.ZipFile(file) as archive:
        members = [(_member_name(info.filename), info) for info in archive.infolist() if not info.is_dir()]
        _check_begin(path, archive.infolist())  # folders, too: many a zip file begins with one
        # Several members may have one name.
        for name, info in sorted(members, key=lambda member: member[0].split("/")):
            if not name:
                continue
            _record_name(seen, name)
            if not file_filter.matches(name):
                left_out[file_filter.reason_left_out(name)] += 1
                continue
            try:
                member = _decompress_member(name, cast(BinaryIO, archive.open(info)))
            except (*READ_ERRORS, RuntimeError) as error:  # RuntimeError: encrypted
                yield Member(name, None, describe_error(error), independent=True, bytes=info.compress_size)
                continue
            with member:
                yield Member(name, member, independent=True, bytes=info.compress_size)


def _check_begin(path: Path, members: list[zipfile.ZipInfo]) -> None:
    # The library reads only the last of several zip files that follow one another.
    with open_regular(path) as file:
        if members and min(info.header_offset for info in members) > 0 and file.read(4) == b"PK\3\4":
            raise zipfile.BadZipFile("another zip file lies before the last one in it: divide it")


def _check_end(path: Path) -> None:
    # A plain tar that is cut off between two members looks complete to the library.
    if path.suffix.lower() != ".tar":
        return
    with open_regular(path) as file:
        if file.seek(0, io.SEEK_END) < len(_END):
            raise EOFError("too short for a tar archive")
        file.seek(-len(_END), io.SEEK_END)
        if file.read() != _END:
            raise EOFError("no end mark: not a tar archive, or cut off")


def _decompress_member(name: str, file: BinaryIO) -> BinaryIO:
    return decompress(io.BufferedReader(cast(io.RawIOBase, file), _MEMBER_BUFFER), name)


def _member_name(name: str) -> str:
    parts = [part for part in printable_name(name).split("/") if part not in ("", ".", "..")]
    return "" if any(map(is_hidden, parts)) else "/".join(parts)


def _record_name(seen: list[str], name: str) -> None:
    if len(seen) < _SHOWN:
        seen.append(name)
