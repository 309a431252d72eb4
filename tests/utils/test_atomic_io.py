"""Files and folders for results: made, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from kabrn_dist.utils.atomic_io import make_folder
from kabrn_dist.utils.errors import UserError


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(UserError, match=rf"{path}: cannot be made .*; choose a folder you can write to"):
            make_folder(path)


def test_reports_make_their_folders_with_it() -> None:
    for file in (Path(__file__).parents[2] / "kabrn_dist" / "analysis").glob("*.py"):
        assert ".mkdir(" not in file.read_text(), file
