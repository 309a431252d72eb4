"""Durable files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_regular

_CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbor of `path` for writing, which is renamed to `path` when the block ends without error.

    Raises:
        UserError: if the disk refuses (full, read-only, a file-size limit). Nothing is left behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with durable_open(temporary) as file:
            yield file
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free some space there or choose another folder"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: bytes) -> None:
    """Write a whole file, or nothing.

    Raises:
        UserError: as `atomic_open`.
    """
    with atomic_open(path) as file:
        file.write(content)


def make_folder(path: Path) -> None:
    """Make a folder for results, with those above it, unless it is there.

    Raises:
        UserError: if the disk refuses, or something else is in its place.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); choose a folder you can write to") from error


@contextmanager
def durable_open(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing and fsync it when the block ends without error; a crash may leave a part of it.

    Raises:
        OSError: from the file system.
    """
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable: without it a power cut can undo a rename.

    Raises:
        OSError: from the file system.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """Return the sha256 of a file in hexadecimal.

    Args:
        path: File to read.
        progress: Called with the number of bytes just read.

    Raises:
        OSError: from the file system, and for what is not a regular file.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
