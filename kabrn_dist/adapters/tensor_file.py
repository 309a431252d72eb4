"""Safetensors files by numpy alone: a few tensors of few dtypes, read from strangers and written whole."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.utils.atomic_io import atomic_open
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_plain
from kabrn_dist.utils.safetensors_header import encode_header, read_header, read_metadata

# Of the dtypes of the format, those that adapters have.
NUMPY_DTYPES = {"I64": "<i8", "F32": "<f4", "F16": "<f2", "U8": "|u1"}
_CODES = {np.dtype(kind): code for code, kind in NUMPY_DTYPES.items()}
# An adapter is read into memory.
TENSOR_FILE_LIMIT = 2**34
_HEADER_LIMIT = 2**24


def read_tensors(file: Path, limit: int = TENSOR_FILE_LIMIT) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Read a safetensors file of a stranger.

    Args:
        file: The file.
        limit: Most bytes of tensors that it may have.

    Returns:
        The tensors by name, and the texts of the header.

    Raises:
        UserError: for a file that is damaged or too large, or holds another dtype, before memory is taken for it.
    """
    entries, metadata = read_header(file, _HEADER_LIMIT), read_metadata(file, _HEADER_LIMIT)
    if (size := sum(entry.stop - entry.start for entry in entries.values())) > limit:
        raise UserError(f"{file}: has {size} bytes of tensors, above the {limit} allowed; use another one")
    for name, entry in entries.items():
        if entry.dtype not in NUMPY_DTYPES:
            raise UserError(
                f"{file}: tensor {name[:80]!r} is {entry.dtype}, none of {', '.join(NUMPY_DTYPES)}; use another one"
            )
        # Of several sizes next to a zero, the product of some can be beyond numpy's.
        if not prod(entry.shape) and len(entry.shape) > 1:
            raise UserError(f"{file}: tensor {name[:80]!r} is {entry.shape}, which holds nothing; use another one")
    tensors: dict[str, NDArray[Any]] = {}
    with open_plain(file) as stream:
        for name, entry in entries.items():
            values = np.empty(entry.shape, NUMPY_DTYPES[entry.dtype])
            try:
                stream.seek(entry.start)
                count = _read_into(stream, values)
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror}); copy it again") from error
            if count != entry.stop - entry.start:
                raise UserError(f"{file}: ends within tensor {name[:80]!r}; copy it again")
            tensors[name] = values
    return tensors, metadata


def write_tensors(file: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, which appears whole or not at all.

    Args:
        file: The file; one that exists is replaced.
        tensors: Of dtypes in `NUMPY_DTYPES`.
        metadata: Texts for the header.

    Raises:
        UserError: if the disk refuses.
    """
    # The widest first, so that all lie at multiples of their size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    with atomic_open(file) as stream:
        stream.write(encode_header({name: (_CODES[v.dtype], v.shape) for name, v in ordered.items()}, metadata))
        for values in ordered.values():
            stream.write(np.ascontiguousarray(values).data.cast("B") if values.size else b"")


def _read_into(stream: Any, values: NDArray[Any]) -> int:
    """Fill an array from an unbuffered file; return how many bytes there were."""
    size = prod(values.shape) * values.dtype.itemsize
    if not size:
        return 0
    view, done = values.reshape(-1).view(np.uint8).data, 0
    while done < size and (count := stream.readinto(view[done:])):
        done += count
    return done
