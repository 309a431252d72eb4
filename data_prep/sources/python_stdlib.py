"""The Python standard library's own source files: a corpus every machine already has."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources import Document
from kabrn_dist.errors import UserError

# Installed packages differ from machine to machine; test suites are large tables more than code.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def documents() -> Iterator[Document]:
    """Yield each .py file, sorted by path; files that are not UTF-8 have no text.

    Raises UserError when a file cannot be read.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(root).parts))
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        try:
            yield Document(name, path.read_bytes().decode())
        except UnicodeDecodeError:
            yield Document(name, None)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}. Make it readable, or use another Python.") from error
