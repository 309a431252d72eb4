"""The runtime's program and library, compiled once per test process from the sources of this checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kabrn_dist.runtime.build import compile_runtime

if shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def native_program() -> Path:
    """Return the compiled command `mixkabrn`."""
    return compile_runtime("program")
