"""Patches of ternary codes on model files: applied, and taken back to the same bytes. Needs numpy alone.

Shapes:
    E: matrices (experts).
    O: output features.
    I: input features.
    S: scales of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.adapters.adapter import Adapter, CodePatch
from kabrn_dist.adapters.code_patch import apply_patch, invert_patch, select_matrix
from kabrn_dist.adapters.codes_hash import CodesHash
from kabrn_dist.adapters.identity import refuse_base
from kabrn_dist.runtime.file_checks import refuse_model_file, seal_model_file
from kabrn_dist.runtime.file_format import DTYPE_BASE3, DTYPE_FP32, DTYPE_TILES, FileTensor, find_role
from kabrn_dist.runtime.model_file import ModelFile, map_model_file, read_model_file
from kabrn_dist.runtime.parameter_names import MATRIX_ROLES, parameter_name
from kabrn_dist.runtime.tiles import decode_base3, encode_base3, pack_tiles, unpack_tiles
from kabrn_dist.utils.atomic_io import atomic_open
from kabrn_dist.utils.errors import UserError

_CHUNK_BYTES = 1 << 22
# Of a file of an earlier version, which does not say it.
_UNKNOWN = bytes(32)


class _Change(NamedTuple):
    """Bytes of a file that are replaced: where they begin, how many, and what gives the new ones."""

    start: int
    size: int
    make: Callable[[], bytes]


def patch_model_file(path: Path, adapter: Adapter, out: Path) -> None:
    """Write a model file with the codes and scales of a `ternary_lora` adapter in place of its base's.

    Args:
        path: Model file of the base.
        adapter: The adapter.
        out: The new file, which appears whole or not at all.

    Raises:
        UserError: for an adapter of another method or base, files that are damaged, and if the disk refuses.
    """
    info = adapter.info
    _check_method(adapter)
    _rewrite(path, out, adapter, adapter.patches, info.base_sha256, info.result_sha256)


def unpatch_model_file(path: Path, adapter: Adapter, out: Path) -> None:
    """Write the model file that `patch_model_file` was given, with all of its bytes.

    Args:
        path: What it wrote.
        adapter: The adapter that was applied.
        out: The new file, which appears whole or not at all.

    Raises:
        UserError: as `patch_model_file`, and for a file without this adapter.
    """
    info = adapter.info
    _check_method(adapter)
    inverted = {name: invert_patch(patch) for name, patch in adapter.patches.items()}
    _rewrite(path, out, adapter, inverted, info.result_sha256, info.base_sha256)


def hash_file_codes(file: ModelFile) -> str:
    """Return the hash of a model file's matrices, by which adapters know their base.

    The header says it; it is computed for files of earlier versions.

    Raises:
        UserError: for a file of an earlier version with matrices in fp16, or with codes that are none.
    """
    stated: bytes = file.header["codes_sha256"]
    if stated != _UNKNOWN:
        return stated.hex()
    with map_model_file(file.path) as content:
        return _hash_codes(file, content, {})


def _check_method(adapter: Adapter) -> None:
    if adapter.info.method != "ternary_lora":
        raise UserError(
            f"adapter {adapter.info.name!r} is of method {adapter.info.method}, which changes no codes; pack it for "
            "the runtime instead: mixkabrn adapter pack"
        )


def _rewrite(
    path: Path, out: Path, adapter: Adapter, patches: Mapping[str, CodePatch], before: str, after: str
) -> None:
    file = read_model_file(path)
    found = hash_file_codes(file)
    if found != before:
        raise _refuse_state(path, adapter, found, before, after)
    with map_model_file(path) as content:
        names = {_name_of(record): record for record in file.records}
        for name, patch in patches.items():
            _check_patch(path, name, names.get(name), patch, content)
        result = _hash_codes(file, content, patches)
        if result != after:
            raise UserError(
                f"{path}: with adapter {adapter.info.name!r} its codes would have sha256 {result[:12]}…, the adapter "
                f"says {after[:12]}…: the adapter is damaged; copy it again"
            )
        changes = [change for name, patch in patches.items() for change in _list_changes(names[name], patch, content)]
        stated = _UNKNOWN if file.header["codes_sha256"] == _UNKNOWN else bytes.fromhex(after)
        with atomic_open(out) as stream:
            position = 0
            for start, size, make in sorted(changes, key=lambda change: change.start):
                _copy(content, position, start, stream.write)
                stream.write(make())
                position = start + size
            _copy(content, position, len(content), stream.write)
            seal_model_file(stream, stated)


def _refuse_state(path: Path, adapter: Adapter, found: str, before: str, after: str) -> UserError:
    if found == after:
        has = "has it already" if before == adapter.info.base_sha256 else "does not have it"
        return UserError(f"{path}: adapter {adapter.info.name!r}: the file {has}; name another file")
    return refuse_base(str(path), adapter.info, found, before)


def _name_of(record: FileTensor) -> str:
    role = find_role(record.role) or ""
    return parameter_name(role, record.layer) if role in MATRIX_ROLES else ""


def _check_patch(path: Path, name: str, record: FileTensor | None, patch: CodePatch, content: mmap) -> None:
    if record is None or record.dtype not in (DTYPE_TILES, DTYPE_BASE3):
        raise UserError(f"{path}: has no ternary parameter {name!r}, which the adapter changes; copy the adapter again")
    shape, scales = (record.matrices, record.rows, record.columns), (record.matrices, record.scales)
    if patch.shape != shape or patch.scales.shape != scales:
        raise UserError(
            f"{path}: {name!r} is {shape} with {scales} scales, in the adapter {patch.shape} with "
            f"{patch.scales.shape}; copy the adapter again"
        )
    if not np.array_equal(_read_scales(record, content), patch.base_scales):
        raise UserError(f"{path}: {name!r} has other scales than the adapter says; copy the adapter again")


def _hash_codes(file: ModelFile, content: mmap, patches: Mapping[str, CodePatch]) -> str:
    total = CodesHash()
    for record in file.records:
        name = _name_of(record)
        if not name:
            continue
        try:
            if record.dtype in (DTYPE_TILES, DTYPE_BASE3):
                codes = np.stack([_read_codes(record, number, content) for number in range(record.matrices)])
                scales = _read_scales(record, content)
                if name in patches:
                    codes, scales = apply_patch(codes, patches[name]), patches[name].scales
                total.add_ternary(name, codes, scales)
            else:
                total.add_plain(name, _read_plain(file.path, record, content))
        except ValueError as error:
            raise refuse_model_file(file.path, f"{name} holds {error}") from None
    return total.hexdigest()


def _read_codes(record: FileTensor, number: int, content: mmap) -> NDArray[np.int8]:
    start = record.offset + number * record.stride
    stored = np.frombuffer(content[start : start + record.bytes], np.uint8)
    return (unpack_tiles if record.dtype == DTYPE_TILES else decode_base3)(stored, record.rows, record.columns)


def _read_scales(record: FileTensor, content: mmap) -> NDArray[np.float32]:
    size = 4 * record.matrices * record.scales
    stored = np.frombuffer(content[record.scales_offset : record.scales_offset + size], "<f4")
    return stored.astype(np.float32).reshape(record.matrices, record.scales)


def _read_plain(path: Path, record: FileTensor, content: mmap) -> NDArray[np.float32]:
    if record.dtype != DTYPE_FP32:
        raise UserError(
            f"{path}: was packed by an earlier version with fp16 matrices, which adapters cannot know; pack again"
        )
    starts = [record.offset + number * record.stride for number in range(record.matrices)]
    parts = [np.frombuffer(content[start : start + record.bytes], "<f4") for start in starts]
    return np.stack(parts).reshape(record.matrices, record.rows, record.columns)


def _list_changes(record: FileTensor, patch: CodePatch, content: mmap) -> Iterator[_Change]:
    scales = patch.scales.astype("<f4").tobytes()
    yield _Change(record.scales_offset, len(scales), lambda: scales)
    for number in range(record.matrices):
        part = select_matrix(patch, number)
        if len(part.places):
            yield _Change(
                record.offset + number * record.stride, record.bytes, _Encoder(record, number, part, content).encode
            )


class _Encoder(NamedTuple):
    """One matrix of a file with its patch, encoded when it is written."""

    record: FileTensor
    number: int
    patch: CodePatch
    content: mmap

    def encode(self) -> bytes:
        codes = apply_patch(_read_codes(self.record, self.number, self.content)[None], self.patch)[0]
        return (pack_tiles if self.record.dtype == DTYPE_TILES else encode_base3)(codes).tobytes()


def _copy(content: mmap, start: int, stop: int, write: Callable[[bytes], object]) -> None:
    for position in range(start, stop, _CHUNK_BYTES):
        write(content[position : min(position + _CHUNK_BYTES, stop)])
