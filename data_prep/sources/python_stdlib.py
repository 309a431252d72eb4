"""The Python standard library's own source files: a corpus every machine already has."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.documents import Document
from data_prep.sources.archive import Member, text_of
from data_prep.sources.base import FileSource, Options
from data_prep.sources.files import UNIT_BYTES, Find, no_archive
from data_prep.sources.layout import Mismatch
from kabrn_dist.utils.errors import UserError

# Installed packages differ from machine to machine; test suites are large tables more than code.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class PythonStdlib(FileSource):
    """The .py files of the running Python's library, without tests and installed packages."""

    kind = "python-stdlib"
    expected = "the Python library's .py files"
    endings = (".py",)
    license = "PSF-2.0"
    settings = Options

    def __init__(self, inputs: Sequence[Path], options: Options, unit_bytes: int = UNIT_BYTES) -> None:
        """Take no inputs; raises UserError for any."""
        if inputs:
            raise UserError(f"input {inputs[0]}: python-stdlib reads this Python's own library; drop the input.")
        super().__init__([Path(sysconfig.get_path("stdlib"))], options, unit_bytes)

    def find(self) -> Find:
        """Leave out tests and installed packages, and open no archives."""
        return super().find()._replace(archive=no_archive, skip=_LEFT_OUT)

    def documents(self, member: Member) -> Iterator[Document | Mismatch]:
        """Yield the file, named without the library's folder, which differs between machines."""
        yield text_of(member._replace(name=member.name.partition("/")[2]))
