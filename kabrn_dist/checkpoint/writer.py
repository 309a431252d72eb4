"""Writer of one rank's file: owned fragments, streamed as safetensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kabrn_dist.checkpoint.fragment import Fragment, check_fragment
from kabrn_dist.checkpoint.manifest import DTYPE_CODES, FileRecord, PieceRecord
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safetensors_header import encode_header

CHUNK_BYTES = 16 * 2**20


class WrittenRange(NamedTuple):
    """One fragment of a rank, for its report.

    Attributes:
        name: Logical tensor.
        dtype: Code of the dtype.
        shape: Shape of the whole logical tensor.
        piece: Where it was written; None for a copy or an empty fragment, which are not written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    piece: PieceRecord | None


def write_rank_file(file: Path, fragments: Iterable[Fragment]) -> tuple[FileRecord, list[WrittenRange]]:
    """Write the owned fragments to a file, durable on return.

    `safetensors.torch.save_file` would copy every GPU tensor to the host at once, and the hash would need a second
    reading: here CHUNK_BYTES are staged, on a CPU nothing.

    Args:
        file: File to write.
        fragments: Fragments of this rank, owned or not.

    Returns:
        The record of the file, and one range for each fragment.

    Raises:
        UserError: for a fragment outside its tensor or owned twice.
        OSError: from the file system.
    """
    if not file.parent.is_dir():
        raise UserError(
            f"{file.parent}: made by rank 0 but not visible to this rank; "
            "put the checkpoint folder on a file system that all ranks share"
        )
    ranges, owned = _collect_owned(file.name, fragments)
    # Wide types first: offsets then stay aligned for readers that map the file.
    owned = dict(sorted(owned.items(), key=lambda item: -item[1].itemsize))
    digest = hashlib.sha256()
    unhashed: list[memoryview | bytes] = []
    # The disk first: hashing, which takes as long as writing, runs while fsync waits for it. Only what will be
    # overwritten in memory is hashed on the way.
    with open(file, "wb") as stream, ThreadPoolExecutor(max_workers=1) as hasher:
        for chunk, is_staged in _file_chunks(owned):
            unhashed.append(chunk)
            if is_staged:
                hashed = hasher.submit(_update, digest, unhashed)
                stream.write(chunk)
                hashed.result()
                unhashed = []
            else:
                stream.write(chunk)
        stream.flush()
        hashed = hasher.submit(_update, digest, unhashed)
        os.fsync(stream.fileno())
        hashed.result()
        size = stream.tell()
    return FileRecord(name=file.name, bytes=size, sha256=digest.hexdigest()), ranges


def _update(digest: hashlib._Hash, chunks: list[memoryview | bytes]) -> None:
    for chunk in chunks:
        digest.update(chunk)


def _collect_owned(file_name: str, fragments: Iterable[Fragment]) -> tuple[list[WrittenRange], dict[str, Tensor]]:
    ranges: list[WrittenRange] = []
    owned: dict[str, Tensor] = {}
    for fragment in fragments:
        check_fragment(fragment)
        if fragment.values.dtype not in DTYPE_CODES:
            raise UserError(f"{fragment.name}: {fragment.values.dtype} cannot be stored; use one of {[*DTYPE_CODES]}")
        piece = None
        if fragment.owned and fragment.values.numel():
            key = f"{fragment.name}@{fragment.offset}"
            if key in owned:
                raise UserError(f"{key}: owned twice by one rank; pass each fragment once")
            count = fragment.values.numel()
            piece = PieceRecord(file=file_name, key=key, offset=fragment.offset, count=count)
            owned[key] = fragment.values.detach()
        ranges.append(WrittenRange(fragment.name, DTYPE_CODES[fragment.values.dtype], fragment.shape, piece))
    return ranges, owned


def _file_chunks(owned: dict[str, Tensor]) -> Iterator[tuple[memoryview | bytes, bool]]:
    """Yield the chunks of the file in order, each with whether the next one overwrites it in memory."""
    header = {key: (DTYPE_CODES[values.dtype], (values.numel(),)) for key, values in owned.items()}
    yield encode_header(header, {}), False
    staging: Tensor | None = None
    for values in owned.values():
        is_staged = values.device.type != "cpu" or not values.is_contiguous()
        step = CHUNK_BYTES // values.itemsize
        for start in range(0, values.numel(), step):
            chunk = values[start : start + step]
            if is_staged:
                if staging is None:
                    staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=values.is_cuda)
                chunk = staging.view(values.dtype)[: len(chunk)].copy_(chunk)
            yield chunk.view(torch.uint8).numpy().data, is_staged
