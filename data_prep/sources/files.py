"""List files and divide them into units of work: sorted, and the same for any number of workers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_prep.documents import Unit
from data_prep.sources.compression import COMPRESSED_ENDINGS, describe_error
from data_prep.sources.layout import describe_kind, guess_source
from data_prep.sources.lines import find_cuts
from kabrn_dist.utils.errors import UserError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".zip")
UNIT_BYTES = 8 << 20
_SHOWN = 4
# Folders that link to one another could be walked through in a factorial number of ways.
_MAX_LINKS = 5


class FileGroup(NamedTuple):
    """Unit of many small files: those of a folder from `first` to `last`, in the order of `walk_files`.

    Attributes:
        path: the folder.
        name: name of the unit.
        bytes: size of the files.
        label: beginning of the names of its files.
        first: name of the first file below the folder.
        last: name of the last file.
    """

    path: Path
    name: str
    bytes: int
    label: str
    first: str
    last: str


class FileFilter(NamedTuple):
    """Which files belong to a source, and how they are divided into units.

    Attributes:
        endings: endings of the files' names, before a suffix of compression.
        accepts: whether a file belongs to the source, by its name with the input's own name before it.
        boundary: bytes after which a plain file may be cut; None: only .jsonl files, after lines.
        group_key: a group of files ends only where this function of the names changes.
        accepts_archive: which archives in folders are opened; None: all.
        file_per_unit: whether each file is a unit.
        skipped_folders: names of folders that are not entered.
        out: the folder for the shards, which is not entered either.
    """

    endings: tuple[str, ...]
    accepts: Callable[[str], bool]
    boundary: bytes | None = None
    group_key: Callable[[str], str] | None = None
    accepts_archive: Callable[[str], bool] | None = None
    file_per_unit: bool = False
    skipped_folders: frozenset[str] = frozenset()
    out: Path | None = None

    def matches(self, name: str) -> bool:
        """Return whether a file or archive member of this name is read."""
        return has_ending(name, self.endings) and self.accepts(name)

    def reason_left_out(self, name: str) -> str:
        """Return why a file or archive member of this name is not read."""
        if has_ending(name, (*self.endings, *ARCHIVES)):
            return "that its kind or options leave out"
        ending = PurePosixPath(name).suffix.lower()
        return f"ending in {ending}" if ending else "without an ending"


def list_units(
    inputs: Sequence[Path],
    file_filter: FileFilter,
    unit_bytes: int = UNIT_BYTES,
    left_out: Counter[str] | None = None,
) -> list[Unit | FileGroup]:
    """Return the units of files, archives, and folders of both, sorted by name. A folder may have no units.

    Args:
        inputs: the paths. A file that is given by name only needs the right ending.
        file_filter: which files to read.
        unit_bytes: approximate size of a unit.
        left_out: gets the number of files in folders that are not read, by reason.

    Raises:
        UserError: a path is missing, of another type, or given twice, or a folder cannot be read.
    """
    units: list[Unit | FileGroup] = []
    left_out = Counter() if left_out is None else left_out
    for path, label in _label_inputs(inputs).items():
        try:
            if path.is_dir():
                units += _list_folder_units(path, label, file_filter, unit_bytes, left_out)
            else:
                units += _list_file_units(path, label, path.stat().st_size, file_filter, unit_bytes)
        except FileNotFoundError as error:
            raise UserError(f"input {path}: no such file or folder") from error
        except OSError as error:
            raise UserError(f"input {error.filename or path}: cannot be read ({describe_error(error)})") from error
    return sorted(units, key=lambda unit: unit.name)


def walk_files(
    folder: Path,
    first: str = "",
    last: str | None = None,
    skipped_folders: frozenset[str] = frozenset(),
    out: Path | None = None,
) -> Iterator[tuple[str, int]]:
    """Walk through the files of a folder in sorted order. The names of one folder at a time are in memory.

    Hidden files and macOS metadata are left out. Links are followed unless they lead to a folder
    above, and at most five in one path.

    Args:
        folder: the folder.
        first: name of the first file.
        last: name of the last file; None: to the end. Only folders between the two are listed.
        skipped_folders: names of folders that are not entered.
        out: one more folder that is not entered, wherever it lies.

    Yields:
        (name below `folder`, bytes).
    """
    from_parts = tuple(first.split("/")) if first else ()
    to_parts = None if last is None else tuple(last.split("/"))
    excluded = None if out is None else _identity(out)
    yield from _Walk(from_parts, to_parts, skipped_folders, excluded).walk(str(folder), (), (_identity(folder),), 0)


def has_ending(name: str, endings: tuple[str, ...]) -> bool:
    """Return whether `name` has one of these endings in upper or lower case, also before a suffix of compression."""
    name = name.lower()
    for packed in COMPRESSED_ENDINGS:
        name = name.removesuffix(packed)
    return name.endswith(tuple(ending.lower() for ending in endings))


def reject_archives(name: str) -> bool:
    """Reject all archives in folders: in a tree of code they are data."""
    return False


def is_hidden(part: str) -> bool:
    """Return whether this part of a path is hidden or macOS metadata."""
    return part.startswith(".") or part == "__MACOSX"


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from others under whatever name: its device and inode; None if there is none."""
    try:
        state = folder.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


class _Walk(NamedTuple):
    """A walk through a folder, between two names."""

    first: tuple[str, ...]
    last: tuple[str, ...] | None
    skipped: frozenset[str]
    out: tuple[int, int] | None

    def walk(
        self, folder: str, above: tuple[str, ...], folders_above: tuple[tuple[int, int] | None, ...], links: int
    ) -> Iterator[tuple[str, int]]:
        with os.scandir(folder) as listing:
            entries = sorted((entry for entry in listing if not is_hidden(entry.name)), key=lambda entry: entry.name)
        for entry in entries:
            parts = (*above, entry.name)
            if parts < self.first[: len(parts)] or (self.last is not None and parts > self.last[: len(parts)]):
                continue
            if _leads_to(entry.is_dir):
                identity = _identity(Path(entry.path))
                # A link to a folder above would lead round in circles, also by way of other links.
                if entry.name in self.skipped or identity == self.out or identity in folders_above:
                    continue
                depth = links + entry.is_symlink()
                if depth > _MAX_LINKS:
                    raise UserError(f"input {entry.path}: {depth} links to folders in one path; remove some of them")
                yield from self.walk(entry.path, parts, (*folders_above, identity), depth)
            elif _leads_to(entry.is_file):
                yield "/".join(parts), entry.stat().st_size
            else:
                yield "/".join(parts), 0  # a broken link, pipe, socket or device: reading it reports that


def _leads_to(is_kind: Callable[[], bool]) -> bool:
    """Return whether an entry of a folder is of a kind; of none if it is a link to itself or into a closed folder."""
    try:
        return is_kind()
    except OSError:
        return False


def _list_folder_units(
    folder: Path, label: str, file_filter: FileFilter, unit_bytes: int, left_out: Counter[str]
) -> Iterator[Unit | FileGroup]:
    names: list[str] = []
    size = 0
    for name, count in walk_files(folder, skipped_folders=file_filter.skipped_folders, out=file_filter.out):
        full = f"{label}/{name}"
        is_archive = full.lower().endswith(ARCHIVES)
        accepted = file_filter.accepts_archive is None or file_filter.accepts_archive(full)
        if not (accepted if is_archive else file_filter.matches(full)):
            left_out[file_filter.reason_left_out(full)] += 1
            continue
        separate = (
            is_archive
            or file_filter.file_per_unit
            or (count >= unit_bytes and (_cut_boundary(full, file_filter) or full.lower().endswith(COMPRESSED_ENDINGS)))
        )
        may_split = names and (
            file_filter.group_key is None or file_filter.group_key(names[-1]) != file_filter.group_key(name)
        )
        if names and (separate or (size >= unit_bytes and may_split)):
            yield _make_group(folder, label, names, size)
            names, size = [], 0
        if separate:
            yield from _list_file_units(folder / name, full, count, file_filter, unit_bytes)
        else:
            # A group keeps only its first and last name: millions of names would fill the memory.
            names, size = [names[0] if names else name, name], size + count
    if names:
        yield _make_group(folder, label, names, size)


def _make_group(folder: Path, label: str, names: list[str], size: int) -> FileGroup:
    return FileGroup(folder, f"{label}/{names[0]}", size, label, names[0], names[-1])


def _list_file_units(path: Path, name: str, size: int, file_filter: FileFilter, unit_bytes: int) -> Iterator[Unit]:
    if name.lower().endswith(ARCHIVES):
        yield Unit(path, name, size)
    elif not has_ending(path.name, file_filter.endings):
        guess = guess_source([path.name])
        hint = f"; it looks like {guess}: {describe_kind(guess)}" if guess else ""
        raise UserError(
            f"input {path}: unknown file type; give {', '.join((*file_filter.endings, *ARCHIVES))} or folders{hint}"
        )
    elif (boundary := _cut_boundary(name, file_filter)) is None or size <= unit_bytes:
        yield Unit(path, name, size)
    else:
        # With a fixed number of digits, the order of names is the order of ranges.
        for start, stop in find_cuts(path, size, unit_bytes, boundary):
            yield Unit(path, f"{name}@{start:015d}", stop - start, start, stop)


def _cut_boundary(name: str, file_filter: FileFilter) -> bytes | None:
    if name.lower().endswith(COMPRESSED_ENDINGS):
        return None
    return b"\n" if name.lower().endswith(".jsonl") else file_filter.boundary


def _label_inputs(inputs: Sequence[Path]) -> dict[Path, str]:
    paths = [Path(os.path.abspath(path)) for path in inputs]
    repeated = [path for path in paths if paths.count(path) > 1]
    if repeated:
        raise UserError(f"input {repeated[0]}: given twice; drop one")
    # As few folders as distinguish the inputs, so that the same data elsewhere has the same names.
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return dict(zip(inputs, labels, strict=True)) if paths else {}


def list_example_names(inputs: Sequence[Path]) -> list[str]:
    """Return the names of a few files in `inputs`, for messages."""
    names: list[str] = []
    for path in inputs:
        for name, _ in walk_files(path) if path.is_dir() else [(path.name, 0)]:
            names.append(name)
            if len(names) >= _SHOWN:
                return names
    return names
