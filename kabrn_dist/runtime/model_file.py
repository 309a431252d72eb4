"""A trained model as one file for the runtime in C, written and read; docs/model_file.md describes it.

Reading needs numpy alone; what writing needs besides is imported when a file is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kabrn_dist.runtime.file_checks import (
    MODEL_FILE_REMEDY,
    find_record_fault,
    find_repeated,
    parse_header,
    refuse_model_file,
)
from kabrn_dist.runtime.file_format import (
    ATTENTION_BIT,
    DTYPE_BASE3,
    DTYPE_FP16,
    DTYPE_INT8,
    DTYPE_TILES,
    MIXTURE_BIT,
    RECORD_DTYPE,
    ROLES,
    FileTensor,
)
from kabrn_dist.runtime.tiles import decode_base3, repeat_scales, unpack_tiles
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_plain

if TYPE_CHECKING:
    from kabrn_dist.config import Config
    from kabrn_dist.data.tokenizer import Tokenizer
    from kabrn_dist.model.mixkabrn import MixKABRN


class ModelFileTensor(NamedTuple):
    """A tensor of a model file.

    Attributes:
        record: Its record in the table.
        codes: int8 [count, rows, columns] of ternary and int8 tensors; None for others.
        scales: fp32 [count, scales]; None for tensors without.
        values: fp32 [count, rows, columns], what the codes and scales mean.
    """

    record: FileTensor
    codes: NDArray[np.int8] | None
    scales: NDArray[np.float32] | None
    values: NDArray[np.float32]


@dataclass(frozen=True)
class ModelFile:
    """A model file that has been checked.

    Attributes:
        path: The file.
        header: Field → value, as docs/model_file.md names them.
        layers: Letters of the mixers, as in `model.layers`.
        mixtures: Whether each layer has a mixture of experts.
        config: The text of config.yaml.
        template: The chat template; "" for none.
        tokenizer: The bytes of the tokenizer's part.
        records: The table of tensors.
    """

    path: Path
    header: dict[str, Any]
    layers: str
    mixtures: tuple[bool, ...]
    config: str
    template: str
    tokenizer: bytes
    records: tuple[FileTensor, ...]

    def find(self, role: str, layer: int = 0) -> FileTensor | None:
        """Return the record of a role, such as "routed.up", in a layer; None if there is none."""
        return next((r for r in self.records if r.role == ROLES[role] and r.layer == layer), None)

    def read(self, role: str, layer: int = 0) -> ModelFileTensor:
        """Read a tensor.

        Raises:
            UserError: if the file has none, or its values are none that the format knows.
        """
        record = self.find(role, layer)
        if record is None:
            raise UserError(f"{self.path}: has no tensor {role} in layer {layer}; name one that it has")
        with map_model_file(self.path) as content:
            try:
                return _read_tensor(content, record, self.header["scale_group_size"])
            except ValueError as error:
                raise refuse_model_file(self.path, f"{role} of layer {layer} holds {error}") from error


def write_model_file(
    model: MixKABRN,
    config: Config,
    tokenizer: Tokenizer,
    step: int,
    out: Path,
    embedding_dtype: str = "int8",
    ternary: str = "tiles",
    matrix_dtype: str = "fp32",
    template: str = "",
) -> None:
    """Write a full model in this process as a model file, which appears complete or not at all.

    Args:
        model: With the weights that the trainer computes with, as `Run.model` and `load_export` return it.
        config: Configuration of its run.
        tokenizer: The tokenizer that it was trained with.
        step: Optimizer steps that it was trained for.
        out: The file.
        embedding_dtype: "int8", "fp16" or "fp32", of embedding and head.
        ternary: "tiles", two bits a code, or "base3", 1.6 bits.
        matrix_dtype: "fp32" or "fp16", of matrices that are not ternary.
        template: Chat template in Jinja; "" for none.

    Raises:
        UserError: for a model that is partly quantized or beyond the format's sizes, and if the disk refuses.
    """
    from kabrn_dist.runtime.file_plan import Packing
    from kabrn_dist.runtime.weights import ModelWeights
    from kabrn_dist.runtime.writer import pack_weights

    packing = Packing(embedding_dtype, ternary, matrix_dtype, template)
    pack_weights(ModelWeights(model), config, tokenizer, step, out, packing)


def read_model_file(path: Path | str, verify: bool = True) -> ModelFile:
    """Read a model file's header, texts and table, and check all sizes and offsets.

    Args:
        path: The file.
        verify: Whether to check its sha256 too, which reads all of it.

    Raises:
        UserError: for a file that is missing, damaged, of another kind or of a newer version.
    """
    path = Path(path)
    with map_model_file(path) as content:
        header = parse_header(path, content, verify)
        start, stop = header["tensors_offset"], header["tensors_offset"] + header["num_tensors"] * RECORD_DTYPE.itemsize
        rows = np.frombuffer(content[start:stop], RECORD_DTYPE)
        records = tuple(FileTensor(*map(int, tuple(row)[:-1])) for row in rows)
        faults = [find_record_fault(record, len(content)) for record in records]
        if fault := next(filter(None, faults), find_repeated(records)):
            raise refuse_model_file(path, fault)
        layers = _read_part(content, header["layers_offset"], header["num_layers"])
        return ModelFile(
            path=path,
            header=header,
            layers="".join("A" if byte & ATTENTION_BIT else "R" for byte in layers),
            mixtures=tuple(bool(byte & MIXTURE_BIT) for byte in layers),
            config=_read_text(path, content, header, "config"),
            template=_read_text(path, content, header, "template"),
            tokenizer=_read_part(content, header["tokenizer_offset"], header["tokenizer_bytes"]),
            records=records,
        )


@contextmanager
def map_model_file(path: Path) -> Iterator[mmap]:
    """Map a model file: its bytes are read where they are looked at.

    Raises:
        UserError: if it is missing, empty, or cannot be mapped.
    """
    with open_plain(path, follow_links=True, remedy="name a file that `mixkabrn pack` wrote") as file:
        try:
            content = mmap(file.fileno(), 0, access=ACCESS_READ)
        except ValueError:
            raise refuse_model_file(path, "it is empty") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be mapped ({error.strerror}); {MODEL_FILE_REMEDY}") from error
        with content:
            yield content


def _read_part(content: mmap, start: int, size: int) -> bytes:
    return content[start : start + size]


def _read_text(path: Path, content: mmap, header: dict[str, Any], part: str) -> str:
    try:
        return _read_part(content, header[f"{part}_offset"], header[f"{part}_bytes"]).decode()
    except UnicodeDecodeError:
        raise refuse_model_file(path, f"its part {part} is not UTF-8") from None


def _read_tensor(content: mmap, record: FileTensor, scale_group_size: int) -> ModelFileTensor:
    size = record.matrices * record.scales
    scales = None
    if size:
        scales = np.frombuffer(_read_part(content, record.scales_offset, 4 * size), "<f4").astype(np.float32)
        scales = scales.reshape(record.matrices, record.scales)
    starts = [record.offset + number * record.stride for number in range(record.matrices)]
    matrices = np.stack([_read_matrix(_read_part(content, start, record.bytes), record) for start in starts])
    if scales is None:
        return ModelFileTensor(record, None, None, matrices.astype(np.float32))
    group = 1 if record.dtype == DTYPE_INT8 else scale_group_size
    factors = np.stack([repeat_scales(each, record.rows, group) for each in scales])
    return ModelFileTensor(record, matrices, scales, matrices * factors[:, :, None])


def _read_matrix(content: bytes, record: FileTensor) -> NDArray[Any]:
    if record.dtype == DTYPE_TILES:
        return unpack_tiles(np.frombuffer(content, np.uint8), record.rows, record.columns)
    if record.dtype == DTYPE_BASE3:
        return decode_base3(np.frombuffer(content, np.uint8), record.rows, record.columns)
    kind = {DTYPE_INT8: "<i1", DTYPE_FP16: "<f2"}.get(record.dtype, "<f4")
    return np.frombuffer(content, kind).reshape(record.rows, record.columns)
