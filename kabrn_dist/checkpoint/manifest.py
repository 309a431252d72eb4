"""Manifest of a checkpoint: its files, and the location of each logical tensor's pieces in them.

A manifest is untrusted. Everything in it is checked, against itself and against the sizes on disk, before memory is
allocated for what it describes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_plain, read_plain

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION: Literal[2] = 2
MANIFEST_BYTES_LIMIT = 256 * 2**20
HASH_CHUNK_BYTES = 4 * 2**20
# A single process may have to verify the files of many ranks.
HASH_THREADS = 4

# Codes of the safetensors format.
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}

# Larger than any disk, smaller than what overflows an int64 product with an item size.
Count = Annotated[int, Field(ge=0, le=2**50)]
# A plain name: nothing in a manifest can point outside its own folder.
FileName = Annotated[str, Field(pattern=r"^rank-[0-9]{5,9}\.safetensors$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ManifestRecord(BaseModel):
    """Base of all parts of a manifest: frozen, strict, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(ManifestRecord):
    """One file of the checkpoint.

    Attributes:
        name: Name in the checkpoint's folder.
        bytes: Size.
        sha256: Hash of the content.
    """

    name: FileName
    bytes: Count
    sha256: Sha256


class PieceRecord(ManifestRecord):
    """Elements of a flattened logical tensor that one tensor of a file holds.

    Attributes:
        file: Name of the file.
        key: Name of the tensor in the file.
        offset: First element.
        count: Number of elements.
    """

    file: FileName
    key: str
    offset: Count
    count: Annotated[int, Field(ge=1, le=2**50)]


class TensorRecord(ManifestRecord):
    """A logical tensor.

    Attributes:
        dtype: Code of the dtype, a key of SAFETENSORS_DTYPES.
        shape: Shape of the whole tensor.
        pieces: Pieces that cover it exactly once, ordered by offset.
    """

    dtype: str
    shape: Annotated[tuple[Count, ...], Field(max_length=16)]
    pieces: tuple[PieceRecord, ...]

    @property
    def total(self) -> int:
        """Number of elements of the whole tensor."""
        return prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Size of one element in bytes."""
        return SAFETENSORS_DTYPES[self.dtype].itemsize

    @model_validator(mode="after")
    def _check_coverage(self) -> TensorRecord:
        if self.dtype not in SAFETENSORS_DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(SAFETENSORS_DTYPES)}")
        end = 0
        for piece in self.pieces:
            if piece.offset > end:
                raise ValueError(f"elements {end} to {piece.offset} are in no piece")
            if piece.offset < end:
                raise ValueError(f"element {piece.offset} is in two pieces")
            end += piece.count
        if end != self.total:
            raise ValueError(f"pieces hold {end} elements, shape {self.shape} has {self.total}")
        return self


class Manifest(ManifestRecord):
    """Everything a checkpoint says about itself.

    Attributes:
        format_version: Of what is written; version 1 has other names in `state`, which `read_state` converts.
        step: Steps done when it was saved.
        world_size: Processes that saved it.
        files: The files of all ranks.
        tensors: Where each logical tensor lies, by name.
        state: The caller's JSON (data cursor, schedule, config, tokenizer hash …), returned as it was given.
    """

    format_version: Literal[1, 2] = FORMAT_VERSION
    step: Count
    world_size: Annotated[int, Field(ge=1)]
    files: tuple[FileRecord, ...]
    tensors: dict[str, TensorRecord]
    state: dict[str, JsonValue]

    @model_validator(mode="after")
    def _check_files(self) -> Manifest:
        room = {file.name: file.bytes for file in self.files}
        if len(room) != len(self.files):
            raise ValueError("a file is listed twice")
        for name, tensor in self.tensors.items():
            for piece in tensor.pieces:
                if piece.file not in room:
                    raise ValueError(f"{name}: piece in {piece.file}, which is not among the files")
                room[piece.file] -= piece.count * tensor.item_bytes
                if room[piece.file] < 0:
                    raise ValueError(f"{name}: {piece.file} is too small for its pieces")
        return self


class SealedManifest(ManifestRecord):
    """manifest.json: the manifest and the sha256 of its canonical JSON, as a flipped digit still parses."""

    sha256: Sha256
    manifest: Manifest


def first_validation_error(error: ValidationError) -> str:
    """Return one line about the first error: the field, the problem, and the value."""
    detail = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in detail["loc"]) or "manifest"
    value = detail["input"]
    shown = "" if isinstance(value, dict | bytes) else f" (found {str(value)[:80]!r})"
    return f"{key}: {detail['msg']}{shown}"


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the content of `manifest.json`, with its hash.

    Raises:
        ValueError: for NaN or infinity in the state, which JSON lacks.
    """
    body = manifest.model_dump()
    return json.dumps({"sha256": _manifest_sha256(manifest), "manifest": body}, allow_nan=False, indent=1).encode()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint folder `path`, and check it and the sizes of all files.

    The content of the files is not read: see `verify_files`.

    Raises:
        UserError: for a manifest that is missing, malformed, edited or inconsistent, and for files that are missing or
            of another size.
    """
    source = path / MANIFEST_NAME
    remedy = "use another checkpoint"
    try:
        sealed = SealedManifest.model_validate_json(read_plain(source, MANIFEST_BYTES_LIMIT))
    except ValidationError as error:
        if newer := _newer_version(error):
            raise UserError(
                f"{source}: format_version {newer} is of a newer version of MixKABRN; update MixKABRN, or {remedy}"
            ) from error
        raise UserError(f"{source}: {first_validation_error(error)}; {remedy}") from error
    if _manifest_sha256(sealed.manifest) != sealed.sha256:
        raise UserError(f"{source}: damaged or edited, its sha256 is not {sealed.sha256}; {remedy}")
    for file in sealed.manifest.files:
        _check_size(path / file.name, file.bytes)
    return sealed.manifest


def verify_files(path: Path, files: tuple[FileRecord, ...]) -> None:
    """Read files of the checkpoint `path` whole, several at a time, and check their hashes.

    Raises:
        UserError: for the first file whose sha256 is not the recorded one.
    """
    with ThreadPoolExecutor(max_workers=HASH_THREADS) as hashers:
        for _ in hashers.map(lambda file: _verify_file(path / file.name, file), files):
            pass


def _verify_file(path: Path, file: FileRecord) -> None:
    _check_size(path, file.bytes)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HASH_CHUNK_BYTES))
    try:
        with open_plain(path) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); use another checkpoint") from error
    if digest.hexdigest() != file.sha256:
        raise UserError(
            f"{path}: damaged, its sha256 is {digest.hexdigest()} and the manifest says "
            f"{file.sha256}; use another checkpoint"
        )


def _newer_version(error: ValidationError) -> int | None:
    """The version of a manifest that only a newer version of this code can read."""
    versions = [
        detail["input"] for detail in error.errors(include_url=False) if detail["loc"] == ("manifest", "format_version")
    ]
    return versions[0] if versions and isinstance(versions[0], int) and versions[0] > FORMAT_VERSION else None


def _manifest_sha256(manifest: Manifest) -> str:
    canonical = json.dumps(manifest.model_dump(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check_size(file: Path, expected: int) -> None:
    try:
        status = os.lstat(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); use another checkpoint") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file}: is not a plain file (a link could point anywhere); use another checkpoint")
    if status.st_size != expected:
        raise UserError(f"{file}: has {status.st_size} bytes, the manifest says {expected}; use another checkpoint")
