"""Reader of ranges of logical tensors from a checkpoint's files, directly into their target tensors.

Files are untrusted: a header must agree with the manifest in everything before its data is read.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.checkpoint.fragment import Fragment, check_fragment, overlapping_ranges
from kabrn_dist.checkpoint.manifest import SAFETENSORS_DTYPES, FileRecord, Manifest, PieceRecord, TensorRecord
from kabrn_dist.checkpoint.writer import CHUNK_BYTES
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_plain
from kabrn_dist.utils.safetensors_header import HEADER_BYTES_LIMIT, TensorEntry, read_header


class RangeRead(NamedTuple):
    """A read of elements of one piece.

    Attributes:
        piece: Piece of the logical tensor.
        dtype: Code of its dtype.
        start: First element within the piece.
        stop: Element after the last.
        target: 1-D tensor to fill, of any dtype and device.
    """

    piece: PieceRecord
    dtype: str
    start: int
    stop: int
    target: Tensor


def plan_reads(
    path: Path, manifest: Manifest, fragments: Iterable[Fragment], skip_missing: bool = False
) -> list[RangeRead]:
    """Return the reads that fill all fragments.

    Args:
        path: Folder of the checkpoint.
        manifest: Its manifest, from `read_manifest`.
        fragments: Fragments to fill, owned or not.
        skip_missing: Skip tensors that the checkpoint lacks.

    Raises:
        UserError: for a tensor that the checkpoint lacks, unless skipped, or has in another shape.
    """
    reads: list[RangeRead] = []
    for fragment in fragments:
        check_fragment(fragment)
        if skip_missing and fragment.name not in manifest.tensors:
            continue
        record = tensor_record(path, manifest, fragment.name)
        if record.shape != fragment.shape:
            raise UserError(
                f"{path}: tensor {fragment.name!r} has shape {record.shape} in the checkpoint and "
                f"{fragment.shape} in this run; use the config this checkpoint was written with"
            )
        reads.extend(_reads(record, fragment))
    return reads


def read_ranges(path: Path, reads: Iterable[RangeRead]) -> None:
    """Do `reads` from the files of the checkpoint `path`, converting dtype and device.

    Raises:
        UserError: if a file is not safetensors or differs from the manifest.
    """
    CheckpointReader(path).read(reads)


class CheckpointReader:
    """Reader of one checkpoint; each header is read once, and checked for every piece that is read.

    Args:
        path: Folder of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, dict[str, TensorEntry]] = {}

    def read(self, reads: Iterable[RangeRead]) -> None:
        """Do reads, converting dtype and device.

        Raises:
            UserError: if a file is not safetensors or differs from the manifest.
        """
        by_file: dict[str, list[RangeRead]] = defaultdict(list)
        for read in reads:
            by_file[read.piece.file].append(read)
        for name, of_file in by_file.items():
            file = self._path / name
            if name not in self._entries:
                self._entries[name] = read_header(file)
            entries = self._entries[name]
            for read in of_file:
                _check_piece(file, entries, read.piece.key, read.dtype, read.piece.count)
            read_entries(file, ((entries[read.piece.key], read.start, read.stop, read.target) for read in of_file))


def read_entries(file: Path, reads: Iterable[tuple[TensorEntry, int, int, Tensor]]) -> None:
    """Read ranges of tensors of a safetensors file, converting dtype and device.

    Stages CHUNK_BYTES where dtype or device differ, else nothing.

    Args:
        file: File to read.
        reads: (entry, start, stop, target): elements [start, stop) of an entry, which comes from `read_header(file)`,
            go to the 1-D tensor `target`.

    Raises:
        UserError: if the file cannot be read or has become shorter.
    """
    try:
        with open_plain(file) as stream:
            for entry, start, stop, target in reads:
                _read_entry(stream, entry, start, stop, target)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; use another one") from error


def check_headers(path: Path, manifest: Manifest, files: Iterable[FileRecord]) -> None:
    """Check that the headers of `files` agree with the manifest in everything.

    Raises:
        UserError: for the first header that does not.
    """
    pieces = _pieces_of(manifest)
    for file in files:
        _check_header(path / file.name, pieces[file.name])


def load_tensor(path: Path, manifest: Manifest, name: str) -> Tensor:
    """Return a whole logical tensor in its shape and stored dtype, on the CPU. Not collective.

    Args:
        path: Folder of the checkpoint.
        manifest: Its manifest, from `read_manifest`.
        name: Name of the tensor.

    Raises:
        UserError: for an unknown name or an unreadable file.
    """
    record = tensor_record(path, manifest, name)
    values = torch.empty(record.total, dtype=SAFETENSORS_DTYPES[record.dtype])
    read_ranges(path, _reads(record, Fragment(name, record.shape, 0, values, owned=False)))
    return values.view(record.shape)


def tensor_record(path: Path, manifest: Manifest, name: str) -> TensorRecord:
    """Return the manifest's record of a tensor.

    Raises:
        UserError: if the checkpoint lacks it.
    """
    if name not in manifest.tensors:
        raise UserError(
            f"{path}: has no tensor {name!r}; use the config this checkpoint was written with, "
            "it is in the manifest's state"
        )
    return manifest.tensors[name]


def _reads(record: TensorRecord, fragment: Fragment) -> Iterator[RangeRead]:
    bounds = [*(piece.offset for piece in record.pieces), record.total]
    values = fragment.values.detach()
    stop = fragment.offset + values.numel()
    for index, first, last in overlapping_ranges(fragment.offset, stop, bounds):
        piece = record.pieces[index]
        target = values[first - fragment.offset : last - fragment.offset]
        yield RangeRead(piece, record.dtype, first - piece.offset, last - piece.offset, target)


def _pieces_of(manifest: Manifest) -> dict[str, dict[str, tuple[str, int]]]:
    """Return (dtype, number of elements) of each key of each file."""
    pieces: dict[str, dict[str, tuple[str, int]]] = {file.name: {} for file in manifest.files}
    for tensor in manifest.tensors.values():
        for piece in tensor.pieces:
            pieces[piece.file][piece.key] = (tensor.dtype, piece.count)
    return pieces


def _check_header(file: Path, pieces: dict[str, tuple[str, int]]) -> None:
    # An upper bound: a character takes 12 bytes at most, the numbers of a tensor fewer than 200.
    limit = 1024 + sum(12 * len(key) + 200 for key in pieces)
    entries = read_header(file, min(limit, HEADER_BYTES_LIMIT))
    for key, (dtype, count) in pieces.items():
        _check_piece(file, entries, key, dtype, count)
    if len(entries) > len(pieces):
        raise UserError(f"{file}: holds tensors that the manifest does not list; use another checkpoint")


def _check_piece(file: Path, entries: dict[str, TensorEntry], key: str, dtype: str, count: int) -> None:
    if key not in entries:
        raise UserError(f"{file}: lacks {key!r}, which the manifest says it holds; use another checkpoint")
    entry = entries[key]
    if (entry.dtype, entry.shape) != (dtype, (count,)):
        raise UserError(
            f"{file}: {key} is {entry.dtype} {list(entry.shape)}, the manifest says {dtype} {[count]}; "
            "use another checkpoint"
        )


def _read_entry(stream: FileIO, entry: TensorEntry, start: int, stop: int, target: Tensor) -> None:
    dtype = SAFETENSORS_DTYPES[entry.dtype]
    is_direct = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
    step = CHUNK_BYTES // dtype.itemsize
    staging = target if is_direct else torch.empty(min(step, stop - start), dtype=dtype)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        into = target[first - start : last - start]
        values = into if is_direct else staging[: last - first]
        _fill(stream, values, entry.start + first * dtype.itemsize)
        if not is_direct:
            into.copy_(values)


def _fill(stream: FileIO, values: Tensor, position: int) -> None:
    view = values.view(torch.uint8).numpy().data
    while view:
        count = os.preadv(stream.fileno(), [view], position)
        if count == 0:
            raise OSError("ends too early")
        view, position = view[count:], position + count
