"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from kabrn_dist.utils.atomic_io import durable_open, fsync_folder
from kabrn_dist.utils.errors import UserError

FileWriter = Callable[[BinaryIO], object]


def check_new_folder(out: Path) -> None:
    """Check that a folder can be created under a name.

    Raises:
        UserError: if something is there already.
    """
    if os.path.lexists(out):
        raise UserError(f"{out}: exists already; name a new folder")


def write_folder(
    out: Path, files: Iterable[tuple[str, FileWriter]], progress: Callable[[str], None] = lambda name: None
) -> None:
    """Write a folder of files, which appears complete or not at all.

    Args:
        out: The folder to create.
        files: Name of each file, and what writes its content.
        progress: Called with each name after its file is written.

    Raises:
        UserError: if `out` exists or the disk refuses; nothing is left behind then.
    """
    check_new_folder(out)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, write in files:
            with durable_open(temporary / name) as stream:
                write(stream)
            progress(name)
        fsync_folder(temporary)
        temporary.rename(out)
        fsync_folder(out.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | ValueError):
            # ValueError: a NUL in the name.
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{out}: cannot be written ({reason}); make room or choose another folder") from error
        raise
