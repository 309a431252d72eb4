"""An adapter as one file for the runtime in C (`.mka`), as docs/adapter_file.md describes it. Needs numpy alone.

Shapes:
    E: matrices of a parameter (experts).
    O: output features.
    I: input features.
    R: rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.adapters.adapter import (
    Adapter,
    AdapterInfo,
    AdapterMethod,
    CodePatch,
    LowRankFactors,
    StateFactors,
)
from kabrn_dist.adapters.code_patch import PackedPlaces, pack_places, unpack_places
from kabrn_dist.adapters.folder import ADAPTER_FORMAT
from kabrn_dist.adapters.identity import refuse_base
from kabrn_dist.adapters.parse import parse_info
from kabrn_dist.runtime.file_format import ALIGNMENT, DTYPE_BASE3, DTYPE_TILES, FileTensor, align, find_role
from kabrn_dist.runtime.model_file import ModelFile
from kabrn_dist.runtime.parameter_names import MATRIX_ROLES, parameter_name
from kabrn_dist.runtime.tiles import quantize_rows
from kabrn_dist.utils.atomic_io import atomic_write
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import read_plain

ADAPTER_FILE_MAGIC = b"\x89MKA\r\n\x1a\n"
ADAPTER_FILE_VERSION = 1
ADAPTER_FILE_METHODS: tuple[AdapterMethod, ...] = get_args(AdapterMethod)
# Kinds of records.
LOW_RANK, PATCH, STATE = range(3)
_LARGEST_BYTES = 1 << 32
_REMEDY = "pack it again with `mixkabrn adapter pack`"

ADAPTER_HEADER_DTYPE = np.dtype(
    [
        *(("magic", "V8"), ("version", "<u4"), ("header_bytes", "<u4"), ("file_bytes", "<u8")),
        *(("sha256", "V32"), ("base_sha256", "V32")),
        *(("method", "<u4"), ("rank", "<u4"), ("steps", "<u8"), ("reserved", "<u4"), ("records", "<u4")),
        *(("records_offset", "<u8"), ("info_offset", "<u8"), ("name", "V64"), ("info_bytes", "<u8")),
        ("reserved_end", "V56"),
    ]
)
ADAPTER_RECORD_DTYPE = np.dtype(
    [
        *(("role", "<u2"), ("kind", "<u2")),
        *((name, "<u4") for name in ("layer", "count", "rows", "columns", "size")),
        *((name, "<u8") for name in ("first", "second", "third", "fourth", "gaps")),
    ]
)
assert ADAPTER_HEADER_DTYPE.itemsize == 256 and ADAPTER_RECORD_DTYPE.itemsize == 64


def write_adapter_file(adapter: Adapter, model: ModelFile, out: Path) -> None:
    """Write an adapter for a model file, which appears whole or not at all.

    Args:
        adapter: The adapter.
        model: The file that it will be used with.
        out: The file.

    Raises:
        UserError: as `encode_adapter`, and if the disk refuses.
    """
    atomic_write(out, encode_adapter(adapter, model))


def encode_adapter(adapter: Adapter, model: ModelFile) -> bytes:
    """Return the file of an adapter; low-rank factors are rounded to int8, with a scale for each row.

    Args:
        adapter: The adapter.
        model: The file that it will be used with.

    Raises:
        UserError: for an adapter of another model, or one whose parts have no place in this one.
    """
    _check_base(adapter.info, model)
    parts = _Parts(adapter.info, model)
    tensors = name_matrices(model)
    for name, factors in adapter.low_ranks.items():
        _add_low_rank(parts, name, factors, _find_tensor(name, tensors, model))
    for name, patch in adapter.patches.items():
        _add_patch(parts, name, patch, _find_tensor(name, tensors, model))
    for layer, state in adapter.states.items():
        _add_state(parts, layer, state)
    return parts.encode()


def read_adapter_file(path: Path) -> Adapter:
    """Read an adapter for a model file; factors have the values that the runtime multiplies by.

    Raises:
        UserError: for a file that is missing, damaged, of another kind or of a newer version.
    """
    content = read_plain(path, _LARGEST_BYTES, follow_links=True, remedy=_REMEDY)
    try:
        return _decode_adapter(content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: not an adapter to trust: {error}; copy it again, or {_REMEDY}") from error


def name_matrices(model: ModelFile) -> dict[str, FileTensor]:
    """Return the tensors of a model file that an adapter may change, by the names of their parameters."""
    wanted = MATRIX_ROLES | {"router.weight", "head"}
    named = ((find_role(record.role) or "", record) for record in model.records)
    return {parameter_name(role, record.layer): record for role, record in named if role in wanted}


class _Parts:
    """Records and the bytes that they lead to."""

    def __init__(self, info: AdapterInfo, model: ModelFile) -> None:
        self.info, self.model, self.content = info, model, bytearray()
        self.records: list[dict[str, int]] = []

    def add(self, values: NDArray[Any] | bytes) -> int:
        """Append bytes; return their offset in the file."""
        self.content += bytes(-len(self.content) % ALIGNMENT)
        offset = ADAPTER_HEADER_DTYPE.itemsize + len(self.content)
        self.content += values if isinstance(values, bytes) else values.tobytes()
        return offset

    def record(self, kind: int, role: int, layer: int, shape: tuple[int, int, int], size: int, **offsets: int) -> None:
        count, rows, columns = shape
        fields = {"kind": kind, "role": role, "layer": layer, "count": count, "rows": rows, "columns": columns}
        self.records.append({**fields, "size": size, **offsets})

    def encode(self) -> bytes:
        info = self.info
        text = json.dumps({**vars(info), "targets": list(info.targets)}, sort_keys=True).encode()
        rows = np.zeros(len(self.records), ADAPTER_RECORD_DTYPE)
        for row, record in zip(rows, self.records, strict=True):
            for field, value in record.items():
                row[field] = value
        header = np.zeros((), ADAPTER_HEADER_DTYPE)
        fields: dict[str, Any] = {
            "magic": np.void(ADAPTER_FILE_MAGIC),
            "version": ADAPTER_FILE_VERSION,
            "header_bytes": ADAPTER_HEADER_DTYPE.itemsize,
            "base_sha256": np.void(bytes.fromhex(info.base_sha256)),
            "method": ADAPTER_FILE_METHODS.index(info.method),
            "rank": info.rank,
            "steps": info.steps,
            "records": len(rows),
            "records_offset": self.add(rows.tobytes()),
            "info_offset": self.add(text),
            "info_bytes": len(text),
            "name": np.void(_encode_name(info.name)),
        }
        self.content += bytes(align(len(self.content)) - len(self.content))
        fields["file_bytes"] = ADAPTER_HEADER_DTYPE.itemsize + len(self.content)
        for field, value in fields.items():
            header[field] = value
        header["sha256"] = np.void(hashlib.sha256(header.tobytes() + self.content).digest())
        return header.tobytes() + bytes(self.content)


def _encode_name(name: str) -> bytes:
    """63 bytes at most, and no part of a character."""
    return name.encode("utf-8", "replace")[:63].decode(errors="ignore").encode().ljust(64, b"\0")


def _check_base(info: AdapterInfo, model: ModelFile) -> None:
    has: bytes = model.header["codes_sha256"]
    if not any(has):
        raise UserError(
            f"{model.path}: packed by an earlier version, which adapters cannot tell from others; pack it again"
        )
    if has.hex() != info.base_sha256:
        raise refuse_base(str(model.path), info, has.hex())


def _find_tensor(name: str, tensors: dict[str, FileTensor], model: ModelFile) -> FileTensor:
    if name not in tensors:
        raise UserError(f"{name}: {model.path} has no such matrix; use the model that the adapter was trained on")
    return tensors[name]


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise UserError(f"{name}: the adapter's part has shape {found}, the model wants {wanted}; use its own model")


def _add_low_rank(parts: _Parts, name: str, factors: LowRankFactors, tensor: FileTensor) -> None:
    rank = factors.a.shape[1]
    shape = tensor.matrices, tensor.rows, tensor.columns
    _check_shape(name, factors.a.shape, (shape[0], rank, shape[2]))
    _check_shape(name, factors.b.shape, (shape[0], shape[1], rank))
    a, a_scales = quantize_rows(factors.a.reshape(-1, shape[2]))
    b, b_scales = quantize_rows(factors.b.reshape(-1, rank))
    offsets = {"first": parts.add(a), "second": parts.add(a_scales.astype("<f4"))}
    offsets |= {"third": parts.add(b), "fourth": parts.add(b_scales.astype("<f4"))}
    parts.record(LOW_RANK, tensor.role, tensor.layer, shape, rank, **offsets)


def _add_patch(parts: _Parts, name: str, patch: CodePatch, tensor: FileTensor) -> None:
    shape = tensor.matrices, tensor.rows, tensor.columns
    if tensor.dtype not in (DTYPE_TILES, DTYPE_BASE3):
        raise UserError(f"{name}: is not ternary in {parts.model.path}, so no code of it can be flipped; use another")
    _check_shape(name, patch.shape, shape)
    _check_shape(name, patch.scales.shape, (tensor.matrices, tensor.scales))
    packed = pack_places(patch)
    offsets = {"first": parts.add(packed.gaps), "second": parts.add(packed.step_bits)}
    offsets |= {"third": parts.add(patch.scales.astype("<f4")), "fourth": len(patch.places), "gaps": len(packed.gaps)}
    # The base's scales, so that nothing is lost.
    parts.add(patch.base_scales.astype("<f4"))
    parts.record(PATCH, tensor.role, tensor.layer, shape, tensor.scales, **offsets)


def _add_state(parts: _Parts, layer: int, state: StateFactors) -> None:
    model = parts.model
    heads, key, value = (model.header[field] for field in ("num_heads", "key_dim", "value_dim"))
    if not (0 <= layer < len(model.layers) and model.layers[layer] == "R"):
        raise UserError(f"layer {layer}: {model.path} has no retention there; use the adapter's own model")
    rank = state.key.shape[1]
    _check_shape(f"the state of layer {layer}", state.key.shape, (heads, rank, key))
    _check_shape(f"the state of layer {layer}", state.value.shape, (heads, rank, value))
    offsets = {"first": parts.add(state.key.astype("<f4")), "second": parts.add(state.value.astype("<f4"))}
    parts.record(STATE, 0, layer, (heads, key, value), rank, **offsets)


def _decode_adapter(content: bytes) -> Adapter:
    """Raises ValueError, TypeError or KeyError for what `_Parts.encode` does not write."""
    size = len(content)
    if content[:8] != ADAPTER_FILE_MAGIC or size < ADAPTER_HEADER_DTYPE.itemsize:
        raise ValueError("it does not begin as one")
    header = np.frombuffer(content, ADAPTER_HEADER_DTYPE, 1)[0]
    if header["version"] != ADAPTER_FILE_VERSION:
        raise ValueError(f"it has version {header['version']}, and this program reads {ADAPTER_FILE_VERSION}")
    if header["file_bytes"] != size or header["header_bytes"] != ADAPTER_HEADER_DTYPE.itemsize:
        raise ValueError(f"it has {size} bytes, its header says {header['file_bytes']}")
    if hashlib.sha256(content[:24] + bytes(32) + content[56:]).digest() != header["sha256"].tobytes():
        raise ValueError("its sha256 differs from the one in its header")

    def read(offset: int, kind: str, *shape: int) -> NDArray[Any]:
        count = int(np.prod(shape, dtype=np.float64))
        if offset + count * np.dtype(kind).itemsize > size:
            raise ValueError(f"a part ends outside its {size} bytes")
        return np.frombuffer(content, kind, count, offset).reshape(shape)

    records = read(int(header["records_offset"]), "V64", int(header["records"])).view(ADAPTER_RECORD_DTYPE)
    text = json.loads(read(int(header["info_offset"]), "u1", int(header["info_bytes"])).tobytes())
    adapter = Adapter(_parse_description(text))
    if ADAPTER_FILE_METHODS.index(adapter.info.method) != header["method"]:
        raise ValueError(f"its description says {adapter.info.method}, its header another method")
    for row in records:
        fields = {str(name): int(row[name]) for name in ADAPTER_RECORD_DTYPE.names or ()}
        _read_record(adapter, fields, read)
    return adapter


def _parse_description(text: Any) -> AdapterInfo:
    """The description, which is checked as that of any other adapter of a stranger."""
    if not isinstance(text, dict):
        raise ValueError("its description is no JSON object")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in text.items()}
    return parse_info({**texts, "adapter_format": str(ADAPTER_FORMAT)})


def _read_record(adapter: Adapter, row: dict[str, int], read: Callable[..., NDArray[Any]]) -> None:
    shape = count, rows, columns = row["count"], row["rows"], row["columns"]
    size, role = row["size"], find_role(row["role"]) or ""
    if row["kind"] == STATE:
        key, value = read(row["first"], "<f4", count, size, rows), read(row["second"], "<f4", count, size, columns)
        adapter.states[row["layer"]] = StateFactors(key, value)
        return
    name = parameter_name(role, row["layer"])
    if row["kind"] == LOW_RANK:
        a = read(row["first"], "i1", count, size, columns) * read(row["second"], "<f4", count, size, 1)
        b = read(row["third"], "i1", count, rows, size) * read(row["fourth"], "<f4", count, rows, 1)
        adapter.low_ranks[name] = LowRankFactors(a, b)
        return
    packed = PackedPlaces(read(row["first"], "u1", row["gaps"]), read(row["second"], "u1", -(-row["fourth"] // 8)))
    scales = read(row["third"], "<f4", count, size)
    base_scales = read(align(row["third"] + 4 * count * size), "<f4", count, size)
    adapter.patches[name] = CodePatch(shape, *unpack_places(packed, shape), scales, base_scales)
