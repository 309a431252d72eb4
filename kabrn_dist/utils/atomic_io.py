"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kabrn_dist.utils.errors import UserError

_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; it takes the name `path` when the block ends well.

    Raises UserError when the disk refuses (full, read-only, a file-size limit); nothing is left behind then.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Free some space there or choose another folder."
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step. Raises UserError as `whole_file` does."""
    with atomic_open(path) as file:
        file.write(content)


def sha256_of(path: Path, progress: Callable[[int], None] = lambda read: None) -> str:
    """Return the sha256 of a file; `progress` is called with the number of bytes just read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # The rename itself lives in the folder: without this a power cut can undo it.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
