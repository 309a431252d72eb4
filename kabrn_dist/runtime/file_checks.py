"""Checks of a model file, untrusted: every size and offset is compared with the file's before it is followed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kabrn_dist.runtime.file_format import (
    ALIGNMENT,
    CODES_SHA256_OFFSET,
    DTYPE_FP16,
    DTYPE_FP32,
    DTYPE_INT8,
    FILE_DTYPE_NAMES,
    FILE_MAX_COLUMNS,
    FILE_MAX_ROWS,
    HEADER_DTYPE,
    HEADER_LIMITS,
    MODEL_FILE_MAGIC,
    MODEL_FILE_VERSION,
    RECORD_DTYPE,
    SHA256_OFFSET,
    FileTensor,
    find_role,
    matrix_bytes,
)
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_regular

MODEL_FILE_REMEDY = "copy it again, or pack the run again"
_HASH_BYTES = 1 << 22


def refuse_model_file(path: Path, problem: str) -> UserError:
    """Return the error for a file that is no model file, or none that can be trusted."""
    return UserError(f"{path}: not a model file to trust: {problem}; {MODEL_FILE_REMEDY}")


def parse_header(path: Path, content: mmap, verify: bool) -> dict[str, Any]:
    """Return the header's fields after checking them.

    Args:
        path: The file, for messages.
        content: All of it.
        verify: Whether to check its sha256.

    Raises:
        UserError: for another kind of file, a newer version, a wrong size, or parts outside the file.
    """
    size = len(content)
    if content[:8] != MODEL_FILE_MAGIC:
        raise refuse_model_file(path, "it does not begin as one")
    if size < HEADER_DTYPE.itemsize:
        raise refuse_model_file(path, f"it ends after {size} bytes, within the header")
    row = np.frombuffer(content[: HEADER_DTYPE.itemsize], HEADER_DTYPE)[0]
    header = {str(name): row[name].item() for name in HEADER_DTYPE.names or ()}
    if header["version"] > MODEL_FILE_VERSION:
        raise UserError(f"{path}: version {header['version']} is of a newer MixKABRN; update it, or pack the run here")
    if header["version"] != MODEL_FILE_VERSION or header["header_bytes"] != HEADER_DTYPE.itemsize:
        raise refuse_model_file(path, f"version {header['version']} with a header of {header['header_bytes']} bytes")
    if header["file_bytes"] != size:
        raise refuse_model_file(path, f"it has {size} bytes, its header says {header['file_bytes']}")
    if verify and (found := hash_model_file(content)) != header["sha256"]:
        raise refuse_model_file(
            path, f"damaged or edited, its sha256 is {found.hex()[:12]}… and not {header['sha256'].hex()[:12]}…"
        )
    if faults := find_header_faults(header):
        raise refuse_model_file(path, faults[0])
    spans = [(header["layers_offset"], header["num_layers"], "layers")]
    spans.append((header["tensors_offset"], header["num_tensors"] * RECORD_DTYPE.itemsize, "tensors"))
    spans += [(header[f"{part}_offset"], header[f"{part}_bytes"], part) for part in ("config", "tokenizer", "template")]
    for start, length, part in spans:
        if start + length > size:
            raise refuse_model_file(path, f"its part {part} ends at byte {start + length} of {size}")
    return header


def find_header_faults(header: dict[str, Any]) -> list[str]:
    """Return which sizes of a header have values that the runtime does not take."""
    faults = [
        f"{key} is {header[key]}, not within {least} and {most}"
        for key, (least, most) in HEADER_LIMITS.items()
        if not least <= header[key] <= most
    ]
    if header["tokenizer_size"] > header["vocab_size"]:
        faults.append(f"tokenizer_size is {header['tokenizer_size']}, above vocab_size {header['vocab_size']}")
    return faults


def hash_model_file(content: mmap) -> bytes:
    """Return the sha256 of a model file, with its own place in it taken as zeros."""
    digest = hashlib.sha256(content[:SHA256_OFFSET] + bytes(32))
    for start in range(SHA256_OFFSET + 32, len(content), _HASH_BYTES):
        digest.update(content[start : start + _HASH_BYTES])
    return digest.digest()


def seal_model_file(stream: BinaryIO, codes_sha256: bytes) -> None:
    """Write the hashes into the header of a model file whose other bytes have been written.

    Args:
        stream: The file, which has a name.
        codes_sha256: Of its matrices; 32 zeros for none.

    Raises:
        OSError: from the file system.
    """
    stream.seek(CODES_SHA256_OFFSET)
    stream.write(codes_sha256)
    stream.flush()
    with open_regular(Path(stream.name)) as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        digest = hash_model_file(content)
    stream.seek(SHA256_OFFSET)
    stream.write(digest)


def find_record_fault(record: FileTensor, size: int) -> str | None:
    """Return what is wrong with a record of the table of tensors in a file of `size` bytes; None if nothing is."""
    role = find_role(record.role)
    if role is None or record.dtype >= len(FILE_DTYPE_NAMES):
        return f"a tensor has role {record.role} and dtype {record.dtype}, which mean nothing"
    matrices, rows, columns = record.matrices, record.rows, record.columns
    if not (0 < matrices <= FILE_MAX_ROWS and 0 < rows <= FILE_MAX_ROWS and 0 < columns <= FILE_MAX_COLUMNS):
        return f"tensor {role} of layer {record.layer} has {matrices} matrices of {rows} × {columns}"
    fault = _find_place_fault(record, size)
    return f"tensor {role} of layer {record.layer} {fault}" if fault else None


def _find_place_fault(record: FileTensor, size: int) -> str | None:
    if record.bytes != matrix_bytes(record.dtype, record.rows, record.columns):
        return f"has {record.bytes} bytes a matrix, which its shape does not give"
    wanted = {DTYPE_FP32: {0}, DTYPE_FP16: {0}, DTYPE_INT8: {record.rows}}.get(record.dtype, range(1, record.rows + 1))
    if record.scales not in wanted:
        return f"has {record.scales} scales"
    if any(offset % ALIGNMENT for offset in (record.offset, record.stride, record.scales_offset)):
        return f"does not begin at a multiple of {ALIGNMENT} bytes"
    if record.matrices > 1 and record.stride < record.bytes:
        return "has matrices that overlap"
    last = record.offset + (record.matrices - 1) * record.stride + record.bytes
    if max(last, record.scales_offset + record.matrices * record.scales * 4) > size:
        return "ends outside the file"
    return None


def find_repeated(records: Iterable[FileTensor]) -> str | None:
    """Return which tensor is in the table twice; None if none is."""
    seen: set[tuple[int, int]] = set()
    for record in records:
        key = record.role, record.layer
        if key in seen:
            return f"tensor {find_role(record.role)} of layer {record.layer} is there twice"
        seen.add(key)
    return None
