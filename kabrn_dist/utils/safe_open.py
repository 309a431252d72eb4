"""Files that a user or a stranger made: opened only if they are regular, read only up to a limit.

A pipe blocks whoever opens it, a device may never end, and a link may lead to either. What is opened here has been
checked after it was opened, so that nothing can be exchanged in between.
"""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path

from kabrn_dist.utils.errors import UserError

_CHUNK_BYTES = 1 << 20
_REMEDY = "use another one"


def open_regular(file: Path, follow_links: bool = True) -> FileIO:
    """Open a regular file for reading, unbuffered, for callers that handle the errors of the file system.

    Args:
        file: File to open.
        follow_links: Whether the file may be a symbolic link to a regular file.

    Raises:
        OSError: if it cannot be opened, is a link that is not to be followed, or is not a regular file.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(file, flags if follow_links else flags | os.O_NOFOLLOW)
    except ValueError as error:
        # A NUL, or a character that no file name on this machine can have.
        raise OSError(errno.EINVAL, f"not a name of a file: {error}", repr(str(file))) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(mode) else "not a regular file", str(file))
    return FileIO(descriptor, "rb")


def open_plain(file: Path, follow_links: bool = False, remedy: str = _REMEDY) -> FileIO:
    """Open a regular file for reading, unbuffered.

    Args:
        file: File to open.
        follow_links: Whether the file may be a symbolic link. In a checkpoint or an export it may not: it could point
            anywhere.
        remedy: What the message advises.

    Raises:
        UserError: for a file that is missing, unreadable, not regular, or a link that is not to be followed.
    """
    try:
        return open_regular(file, follow_links)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise UserError(f"{file}: is a link, which could point anywhere; copy the file itself there") from error
        raise UserError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error


def read_plain(file: Path, limit: int, follow_links: bool = False, remedy: str = _REMEDY) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Args:
        file: File to read.
        limit: Most bytes that it may have.
        follow_links: As for `open_plain`.
        remedy: As for `open_plain`.

    Raises:
        UserError: as `open_plain`, for a larger file, and if the file system fails.
    """
    with open_plain(file, follow_links, remedy) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = bytearray()
        try:
            # Files of /proc have more to read than their size says; some have no end.
            while size <= limit and (chunk := stream.read(_CHUNK_BYTES)):
                content += chunk
                size = max(size, len(content))
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error
    if size > limit:
        raise UserError(f"{file}: has {size} bytes or more, above the {limit} allowed; {remedy}")
    return bytes(content)
