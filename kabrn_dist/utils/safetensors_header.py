"""Header of a safetensors file, untrusted: every number is checked before memory is allocated for it.

Format: 8 bytes with the header's length N (little-endian), N bytes of JSON {key: {dtype, shape, data_offsets}},
then the data. https://github.com/huggingface/safetensors#format

Needs neither torch nor numpy: who reads the data knows what to make of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_plain

# The format's own limit.
HEADER_BYTES_LIMIT = 100_000_000
# Bytes of an element, by the code of its dtype.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LENGTH_BYTES = 8
_DIMENSIONS = 16


class TensorEntry(NamedTuple):
    """A tensor of a safetensors file.

    Attributes:
        dtype: Code of the dtype, a key of ITEM_BYTES.
        shape: Shape of the tensor.
        start: First byte of its data in the file.
        stop: Byte after its data.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path, limit: int = HEADER_BYTES_LIMIT) -> dict[str, TensorEntry]:
    """Read the header of a safetensors file.

    Args:
        file: File to read.
        limit: Largest header to accept, in bytes; a longer one is refused before memory is allocated.

    Returns:
        The tensors of the file by key.

    Raises:
        UserError: if it is no valid file: a link or no regular file, no JSON, nested too deeply, a header or data
            outside the file, tensors that overlap or leave holes, a size that does not match the shape.
    """
    content, first, size = _read_content(file, limit)
    content.pop("__metadata__", None)
    entries = {key: _entry(file, key, value, first) for key, value in content.items()}
    _check_layout(file, entries, first, size)
    return entries


def read_metadata(file: Path, limit: int = HEADER_BYTES_LIMIT) -> dict[str, str]:
    """Return the texts in the header of a safetensors file; none for one that has no metadata.

    Args:
        file: File to read.
        limit: Largest header to accept, in bytes.

    Raises:
        UserError: if its header cannot be read.
    """
    metadata = _read_content(file, limit)[0].get("__metadata__", {})
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def _read_content(file: Path, limit: int) -> tuple[dict[str, Any], int, int]:
    """Return the JSON of the header, the first byte after it, and the size of the file."""
    with open_plain(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(limit, size - _LENGTH_BYTES):
            raise _refusal(file, f"its header claims {length} bytes, the file has {size} and {limit} are allowed")
        text = stream.read(length)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(file, f"its header is not JSON ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise _refusal(file, "its header is not a mapping")
    return content, _LENGTH_BYTES + length, size


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file that holds tensors one after another.

    Args:
        tensors: Code of the dtype, and shape, by key, in the order of their data.
        metadata: Texts to store in the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * ITEM_BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # A multiple of 8, so that readers which map the file find aligned data.
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _entry(file: Path, key: str, value: Any, first: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _refusal(file, f"tensor {key[:80]!r} has not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _refusal(file, f"tensor {key[:80]!r} has dtype {str(dtype)[:80]!r}, none of {', '.join(ITEM_BYTES)}")
    if not _are_counts(shape) or len(shape) > _DIMENSIONS or not _are_counts(offsets) or len(offsets) != 2:
        raise _refusal(file, f"tensor {key[:80]!r} has a shape or data_offsets that are not sizes")
    start, stop = offsets
    if stop - start != prod(shape) * ITEM_BYTES[dtype]:
        raise _refusal(file, f"tensor {key[:80]!r} has {stop - start} bytes, which its shape and dtype do not give")
    return TensorEntry(dtype, tuple(shape), first + start, first + stop)


def _are_counts(values: object) -> bool:
    # type() instead of isinstance(), for which True is a number.
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= 2**50 for value in values)


def _check_layout(file: Path, entries: dict[str, TensorEntry], first: int, size: int) -> None:
    end = first
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise _refusal(file, f"tensor {key[:80]!r} overlaps another, or leaves a hole before it")
        end = entry.stop
    if end != size:
        raise _refusal(file, f"its tensors end at byte {end}, the file at {size}")


def _refusal(file: Path, problem: str) -> UserError:
    return UserError(f"{file}: not a safetensors file to trust: {problem}; use another one")
