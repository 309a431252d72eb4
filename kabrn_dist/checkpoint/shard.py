"""One rank's file: owned fragments streamed out as safetensors, ranges of them read back."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kabrn_dist.checkpoint.fragment import Fragment, check_fragment, intersect
from kabrn_dist.checkpoint.manifest import DTYPES, FileRecord, Manifest, Piece, TensorRecord
from kabrn_dist.errors import UserError

CHUNK_BYTES = 16 * 2**20
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Holding(NamedTuple):
    """What one rank reports of one fragment; `piece` is None where it wrote nothing (a copy, or empty)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    piece: Piece | None


class Copy(NamedTuple):
    """Elements [start, stop) of tensor `piece.key` in its file, to be written into `target` (1-D)."""

    piece: Piece
    dtype: str
    start: int
    stop: int
    target: Tensor


def write_shard(file: Path, fragments: Iterable[Fragment]) -> tuple[FileRecord, list[Holding]]:
    """Write what is owned to `file`, durable on return, and say what it holds.

    Written by hand rather than by `safetensors.torch.save_file`, which copies every GPU tensor to the
    host at once and leaves a second reading for the hash: here a few CHUNK_BYTES at most are staged.
    Raises UserError for a fragment outside its tensor or held twice, OSError from the file system.
    """
    if not file.parent.is_dir():
        raise UserError(
            f"{file.parent}: made by rank 0 but not seen by this one; "
            "put the checkpoint folder on a file system that all ranks share"
        )
    holdings, owned = _take_stock(file.name, fragments)
    # Wide types first: offsets then stay aligned for readers that map the file.
    owned = dict(sorted(owned.items(), key=lambda item: -item[1].itemsize))
    digest = hashlib.sha256()
    # Hashing takes about as long as writing, and both let the other run meanwhile.
    with open(file, "wb") as stream, ThreadPoolExecutor(max_workers=1) as hasher:
        for chunk in _file_chunks(owned):
            hashed = hasher.submit(digest.update, chunk)
            stream.write(chunk)
            hashed.result()
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.tell()
    return FileRecord(name=file.name, bytes=size, sha256=digest.hexdigest()), holdings


def plan_copies(manifest: Manifest, fragment: Fragment) -> Iterator[Copy]:
    """The reads that fill `fragment`, which must be in the manifest with the same shape."""
    record = manifest.tensors[fragment.name]
    bounds = [*(piece.offset for piece in record.pieces), record.total]
    values = fragment.values.detach()
    stop = fragment.offset + values.numel()
    for index, first, last in intersect(fragment.offset, stop, bounds):
        piece = record.pieces[index]
        target = values[first - fragment.offset : last - fragment.offset]
        yield Copy(piece, record.dtype, first - piece.offset, last - piece.offset, target)


def read_copies(path: Path, copies: Iterable[Copy]) -> None:
    """Carry out `copies` from the files in `path`, converting dtype and device on the way.

    Raises UserError if a file is not safetensors or holds something else than the manifest says.
    """
    by_file: dict[str, list[Copy]] = defaultdict(list)
    for copy in copies:
        by_file[copy.piece.file].append(copy)
    for name, wanted in by_file.items():
        try:
            with safe_open(path / name, framework="pt", device="cpu") as source:
                for copy in wanted:
                    _read_copy(source, copy)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path / name}: {error}; use another checkpoint") from error


def load_tensor(path: Path, manifest: Manifest, name: str) -> Tensor:
    """The whole logical tensor `name` of the checkpoint in `path`, in its shape and stored dtype, on the CPU.

    `manifest` comes from `read_manifest(path)`. Not collective. Raises UserError for an unknown name or
    an unreadable file.
    """
    record = tensor_record(path, manifest, name)
    values = torch.empty(record.total, dtype=DTYPES[record.dtype])
    read_copies(path, plan_copies(manifest, Fragment(name, record.shape, 0, values, owned=False)))
    return values.view(record.shape)


def tensor_record(path: Path, manifest: Manifest, name: str) -> TensorRecord:
    """The record of `name`; UserError if the checkpoint lacks it."""
    if name not in manifest.tensors:
        raise UserError(
            f"{path}: has no tensor {name!r}; use the config this checkpoint was written with, "
            "it is in the manifest's state"
        )
    return manifest.tensors[name]


def _take_stock(file_name: str, fragments: Iterable[Fragment]) -> tuple[list[Holding], dict[str, Tensor]]:
    holdings: list[Holding] = []
    owned: dict[str, Tensor] = {}
    for fragment in fragments:
        check_fragment(fragment)
        if fragment.values.dtype not in CODES:
            raise UserError(f"{fragment.name}: {fragment.values.dtype} cannot be stored; use one of {[*CODES]}")
        piece = None
        if fragment.owned and fragment.values.numel():
            key = f"{fragment.name}@{fragment.offset}"
            if key in owned:
                raise UserError(f"{key}: owned twice by one rank; pass each fragment once")
            count = fragment.values.numel()
            piece = Piece(file=file_name, key=key, offset=fragment.offset, count=count)
            owned[key] = fragment.values.detach()
        holdings.append(Holding(fragment.name, CODES[fragment.values.dtype], fragment.shape, piece))
    return holdings, owned


def _file_chunks(owned: dict[str, Tensor]) -> Iterator[memoryview | bytes]:
    header: dict[str, dict[str, object]] = {}
    end = 0
    for key, values in owned.items():
        start, end = end, end + values.numel() * values.itemsize
        header[key] = {"dtype": CODES[values.dtype], "shape": [values.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    yield len(text).to_bytes(8, "little") + text
    for values in owned.values():
        for start, stop in _chunks(0, values.numel(), values.itemsize):
            yield values[start:stop].cpu().contiguous().view(torch.uint8).numpy().data


def _read_copy(source: safe_open, copy: Copy) -> None:
    stored = source.get_slice(copy.piece.key)
    shape, dtype = stored.get_shape(), stored.get_dtype()
    if (shape, dtype) != ([copy.piece.count], copy.dtype):
        raise ValueError(f"{copy.piece.key} is {dtype} {shape}, the manifest says {copy.dtype} {[copy.piece.count]}")
    for start, stop in _chunks(copy.start, copy.stop, copy.target.itemsize):
        copy.target[start - copy.start : stop - copy.start].copy_(stored[start:stop])


def _chunks(start: int, stop: int, item_bytes: int) -> Sequence[tuple[int, int]]:
    step = CHUNK_BYTES // item_bytes
    return [(first, min(first + step, stop)) for first in range(start, stop, step)]
