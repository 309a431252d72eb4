"""Untrusted files: opened only if they are regular files and no links."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path

from kabrn_dist.utils.errors import UserError


def open_plain(file: Path) -> FileIO:
    """Open a regular file for reading, unbuffered.

    Raises:
        UserError: for a file that is missing or unreadable, for a link, which could point anywhere, and for pipes and
            devices, which could block or never end.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{file}: is a link, which could point anywhere; copy the file itself there") from error
        raise UserError(f"{file}: cannot be read ({error.strerror}); use another one") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{file}: is not a regular file; use another one")
    return FileIO(descriptor, "rb")


def read_plain(file: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        UserError: as `open_plain`, and for a larger file.
    """
    with open_plain(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise UserError(f"{file}: has {size} bytes, more than the {limit} allowed; use another one")
        return stream.read()
