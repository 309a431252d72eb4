"""Parquet files: one document per row, from named columns. Needs `pip install pyarrow`.

The units are ranges of row groups, so several workers share one file. Rows are read in batches of some hundreds. Files
in archives are not supported, because the format is read from its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from data_prep.documents import Document, Unit
from data_prep.sources.archive import Member
from data_prep.sources.base import FileSource, SourceOptions
from data_prep.sources.compression import describe_error
from data_prep.sources.decode import printable_name
from data_prep.sources.files import FileFilter, FileGroup, reject_archives
from data_prep.sources.jsonl import FieldOptions, make_document_from_fields
from data_prep.sources.layout import LayoutMismatch
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_regular

_ROWS = 256
_MAX_MESSAGE = 120


class Parquet(FileSource):
    """Texts of .parquet files; the options name columns. The range of a unit counts row groups."""

    kind = "parquet"
    expected = ".parquet files with the columns that the options name (field: text)"
    endings = (".parquet",)
    options_class: ClassVar[type[SourceOptions]] = FieldOptions

    def file_filter(self) -> FileFilter:
        """Return which files to read: each is one unit at first, and no archives are opened."""
        return super().file_filter()._replace(file_per_unit=True, accepts_archive=reject_archives)

    def units(self) -> list[Unit | FileGroup]:
        """Return ranges of row groups, sorted by name. A file that cannot be opened is one unit."""
        return [part for unit in super().units() if isinstance(unit, Unit) for part in self._parts(unit)]

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Refuse to read a file as a stream.

        Raises:
            UserError: always.
        """
        raise UserError(f"{member.name}: a .parquet file cannot be read from a stream; unpack it first")

    def select_columns(self, columns: set[str]) -> list[str]:
        """Return the columns to read; `columns` are those of the file, which need not have them."""
        options = self.options
        return [*options.text_fields(), *([] if options.key is None else [options.key])]

    def make_row(self, name: str, record: dict[str, Any]) -> Document | LayoutMismatch:
        """Return the document of one row."""
        if any(value is None for value in record.values()):
            return Document(name, None, problem="an empty cell")
        return make_document_from_fields(name, record, self.options)

    def _parts(self, unit: Unit) -> Iterator[Unit]:
        try:
            meta = _open(unit.path).metadata
        except OSError:
            yield unit
            return
        start = size = 0
        for group in range(meta.num_row_groups):
            size += meta.row_group(group).total_byte_size
            if size >= self.unit_bytes or group + 1 == meta.num_row_groups:
                yield Unit(unit.path, f"{unit.name}@{start:015d}", size, start, group + 1)
                start, size = group + 1, 0

    def _read(self, unit: Unit | FileGroup) -> Iterator[Document | LayoutMismatch]:
        assert isinstance(unit, Unit)  # file_per_unit makes no groups
        file = _open(unit.path)
        columns = {column.name for column in file.schema_arrow}
        selected = self.select_columns(columns)
        name = printable_name(unit.name.rpartition("@")[0] or unit.name)
        missing = [column for column in selected if column not in columns]
        if missing:
            found = ", ".join(map(repr, sorted(columns)[:8]))
            raise UserError(f"{unit.path}: no column {missing[0]!r}, found {found}; name the right one by option")
        for group in range(unit.start, unit.stop):
            for row, record in enumerate(_records(file, group, list(dict.fromkeys(selected)))):
                yield self.make_row(f"{name} group {group} row {row}", record)


def _records(file: Any, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    try:
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False):
            yield from batch.to_pylist()
    except ValueError as error:  # pyarrow raises it for a damaged file, and for text that is not UTF-8
        raise OSError(describe_error(error)[:_MAX_MESSAGE]) from error


def _open(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
    # The library opens by name: a pipe would block it.
    open_regular(path).close()
    try:
        return parquet.ParquetFile(path)
    except ValueError as error:
        raise OSError(f"no parquet ({describe_error(error)[:_MAX_MESSAGE]})") from error
