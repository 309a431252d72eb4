"""Open a file as a stream of bytes, which decompresses .gz and .zst on the fly. Nothing is written to disk."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import zstandard

from kabrn_dist.utils.safe_open import open_regular

COMPRESSED_ENDINGS = (".gz", ".zst")
# Errors that reading a truncated, damaged, encrypted or unreadable file raises.
READ_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
    zipfile.BadZipFile,
    tarfile.TarError,
    NotImplementedError,  # zipfile's word for a compression method that it does not know
)
BUFFER_BYTES = 1 << 20
_COMPRESSED_BYTES = 1 << 16
_MAX_WINDOW_BYTES = 1 << 31


def open_stream(path: Path) -> BinaryIO:
    """Open `path` for reading.

    Raises:
        Exception: one of `READ_ERRORS`, now or while the stream is read.
    """
    return decompress(io.BufferedReader(open_regular(path), BUFFER_BYTES), path.name)


def decompress(file: BinaryIO, name: str) -> BinaryIO:
    """Return a stream that decompresses `file` according to its name's ending. Closing the stream closes `file`."""
    name = name.lower()
    if name.endswith((".gz", ".tgz")):
        return io.BufferedReader(_Gzip(file), BUFFER_BYTES)
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstd(file), BUFFER_BYTES)
    return file


def describe_error(error: BaseException) -> str:
    """Return the text of `error` on one line, without the path, which messages name anyway."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((text or type(error).__name__).split())


class _Gzip(io.RawIOBase):
    # GzipFile closes a file that it opened, but not one that it was given.

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._plain = gzip.GzipFile(fileobj=file, mode="rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._plain.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Zstd(io.RawIOBase):
    # The reader of the library stops after the first frame, or accepts a truncated file as complete.

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._plain:
            self._compressed = self._compressed or self._file.read(_COMPRESSED_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("ends in the middle of a zstd frame")
                return 0
            self._unpack()
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
        self._plain = memoryview(self._frame.decompress(self._compressed))
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None

    def close(self) -> None:
        self._file.close()
        super().close()
