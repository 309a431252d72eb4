"""Text files: .txt (a document each) and .jsonl (a document a line), plain or as .gz or .zst."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from data_prep.sources import Document
from kabrn_dist.errors import UserError

_KINDS = (".txt", ".jsonl")
_PACKED = ("", ".gz", ".zst")
_CHUNK_BYTES = 1 << 20
_ENDINGS = tuple(kind + packed for kind in _KINDS for packed in _PACKED)


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Return the text files among `inputs` and in the folders among them, in the order given, folders sorted.

    Raises UserError for a path that does not exist, a file of another type, or a folder without text files.
    """
    files: list[Path] = []
    for given in inputs:
        if given.is_dir():
            found = sorted(path for path in given.rglob("*") if path.name.endswith(_ENDINGS) and path.is_file())
            if not found:
                raise UserError(f"--input {given}: no file in it ends in {', '.join(_ENDINGS)}.")
            files += found
        elif not given.exists():
            raise UserError(f"--input {given}: no such file or folder.")
        elif not given.name.endswith(_ENDINGS):
            raise UserError(f"--input {given}: unknown file type; give files that end in {', '.join(_ENDINGS)}.")
        else:
            files.append(given)
    return files


def documents(files: Sequence[Path], field: str) -> Iterator[Document]:
    """Yield the documents of `files` in order; `field` is the key of the text in a .jsonl line.

    Raises UserError that names the file (and line) for what cannot be read, unpacked, decoded or parsed.
    """
    for path in files:
        try:
            with _open(path) as file:
                if any(path.name.endswith(".jsonl" + packed) for packed in _PACKED):
                    yield from _lines(path, file, field)
                else:
                    yield Document(str(path), _decode(str(path), file.read()))
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{path}: cannot be read ({error}). Replace the file or leave it out.") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BytesIO(b"".join(_unpack_zstd(path)))
    return path.open("rb")


def _unpack_zstd(path: Path) -> Iterator[bytes]:
    # The library's own reader stops after the first frame, and takes a cut file for a whole one.
    frame = None
    left = b""
    with path.open("rb") as file:
        while packed := left or file.read(_CHUNK_BYTES):
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(packed)
            left = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("ends in the middle of a zstd frame")


def _lines(path: Path, file: BinaryIO, field: str) -> Iterator[Document]:
    for number, line in enumerate(file, start=1):
        name = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(_decode(name, line))
        except json.JSONDecodeError as error:
            raise UserError(f"{name}: not JSON ({error}). Each line must be one JSON object.") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            keys = ", ".join(map(repr, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
            raise UserError(f"{name}: no text under {field!r}, found {keys}. Name the right key with --field.")
        yield Document(name, record[field])


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not UTF-8, byte {content[error.start]:#04x} at {error.start}. Convert the file to "
            "UTF-8 (for instance with iconv)."
        ) from error
