"""The source files of the Python standard library, a corpus that every machine has."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.documents import Document, Unit
from data_prep.sources.archive import Member, read_text
from data_prep.sources.base import FileSource, SourceOptions
from data_prep.sources.files import UNIT_BYTES, FileFilter, FileGroup, reject_archives
from data_prep.sources.layout import LayoutMismatch
from kabrn_dist.utils.errors import UserError

# Installed packages differ between machines; test suites are mostly large tables.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class PythonStdlib(FileSource):
    """The .py files of the library of the running Python, without tests and installed packages."""

    kind = "python-stdlib"
    expected = "the Python library's .py files"
    endings = (".py",)
    license = "PSF-2.0"
    options_class = SourceOptions

    def __init__(self, inputs: Sequence[Path], options: SourceOptions, unit_bytes: int = UNIT_BYTES) -> None:
        """Use the library of the running Python.

        Raises:
            UserError: inputs are given.
        """
        if inputs:
            raise UserError(f"input {inputs[0]}: python-stdlib reads this Python's own library; drop the input")
        super().__init__([Path(sysconfig.get_path("stdlib"))], options, unit_bytes)

    def units(self) -> list[Unit | FileGroup]:
        """Return the units of work; the library's compiled and other files are no concern of the user."""
        units = super().units()
        self.left_out.clear()
        return units

    def file_filter(self) -> FileFilter:
        """Return which files to read: no tests, no installed packages, no archives."""
        return super().file_filter()._replace(accepts_archive=reject_archives, skipped_folders=_LEFT_OUT)

    def parse_member(self, member: Member) -> Iterator[Document | LayoutMismatch]:
        """Yield the file, named without the folder of the library, which differs between machines."""
        yield read_text(member._replace(name=member.name.partition("/")[2]))
