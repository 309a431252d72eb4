"""Layout of a model file (`.mkb`), as docs/model_file.md describes it: the header, the table of tensors, the roles.

Needs numpy alone, so that a model file can be read where torch is not installed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MODEL_FILE_MAGIC = b"\x89MKB\r\n\x1a\n"
MODEL_FILE_VERSION = 1
ALIGNMENT = 64
# Rows and columns of a tile.
TILE = 16
# Of a matrix: the runtime's int32 sums have room for so many products.
FILE_MAX_COLUMNS = 2**18
FILE_MAX_ROWS = 2**24
# Least and largest values of the header's sizes, as in FIELDS of csrc/mixkabrn.c.
HEADER_LIMITS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**24),
    "tokenizer_size": (1, 2**24),
    "document_token": (0, 2**24),
    "hidden_size": (1, 2**16),
    "num_layers": (1, 10_000),
    "num_heads": (1, 2**16),
    "key_dim": (2, 2**14),
    "value_dim": (1, 2**14),
    "short_conv_size": (0, 1024),
    "expert_type": (0, 5),
    "num_experts": (0, 2**16),
    "num_shared_experts": (0, 1024),
    "top_k": (0, 1024),
    "expert_hidden_size": (0, FILE_MAX_COLUMNS),
    "dense_hidden_size": (0, FILE_MAX_COLUMNS),
    "score_func": (0, 1),
    "norm_topk_prob": (0, 1),
    "n_group": (0, 2**16),
    "topk_group": (0, 2**16),
    "function_groups": (0, 2**16),
    "grid_size": (0, 2**12),
    "spline_degree": (0, 16),
    "quantized": (0, 1),
    "scale_group_size": (0, FILE_MAX_ROWS),
}

DTYPE_FP32, DTYPE_FP16, DTYPE_INT8, DTYPE_TILES, DTYPE_BASE3 = range(5)
FILE_DTYPE_NAMES = ("fp32", "fp16", "int8", "tiles", "base3")
FILE_EXPERT_TYPES = ("rational", "chebyshev", "hat", "bspline", "swiglu", "relu2")
FILE_SCORE_FUNCS = ("sigmoid", "softmax")
# Bits of a layer's byte.
ATTENTION_BIT, MIXTURE_BIT = 1, 2

ROUTED_ROLE, SHARED_ROLE = 48, 64
EXPERT_MATRICES = ("up", "down", "gate", "inner_base", "inner_spline", "outer_base", "outer_spline")
COEFFICIENTS = {"inner": 8, "outer": 9}
EXPERT_PARTS = dict(zip(EXPERT_MATRICES, range(len(EXPERT_MATRICES)), strict=True)) | COEFFICIENTS
ROLES: dict[str, int] = {
    "embedding": 0,
    "head": 1,
    "log_decay": 2,
    "mixer.query": 16,
    "mixer.key": 17,
    "mixer.value": 18,
    "mixer.gate": 19,
    "mixer.out": 20,
    "mixer.convolution": 21,
    "convolution": 22,
    "router.weight": 32,
    "router.bias": 33,
    **{f"routed.{part}": ROUTED_ROLE + number for part, number in EXPERT_PARTS.items()},
    **{f"shared.{part}": SHARED_ROLE + number for part, number in EXPERT_PARTS.items()},
}

_SIZES = """step:u8 vocab_size tokenizer_size document_token hidden_size num_layers num_heads key_dim value_dim
short_conv_size expert_type num_experts num_shared_experts top_k expert_hidden_size dense_hidden_size score_func
norm_topk_prob n_group topk_group function_groups grid_size spline_degree quantized scale_group_size grid_low:f4
grid_high:f4 num_tensors reserved layers_offset:u8 tensors_offset:u8 config_offset:u8 config_bytes:u8
tokenizer_offset:u8 tokenizer_bytes:u8 template_offset:u8 template_bytes:u8"""


def _fields(names: str) -> list[tuple[str, str]]:
    pairs = [word.partition(":") for word in names.split()]
    return [(name, f"<{kind or 'u4'}") for name, _, kind in pairs]


HEADER_DTYPE = np.dtype(
    [
        ("magic", "V8"),
        ("version", "<u4"),
        ("header_bytes", "<u4"),
        ("file_bytes", "<u8"),
        ("sha256", "V32"),
        ("tokenizer_sha256", "V32"),
        *_fields(_SIZES),
        ("codes_sha256", "V32"),
        ("reserved_end", "V208"),
    ]
)
RECORD_DTYPE = np.dtype(
    [
        *(("role", "<u2"), ("dtype", "<u2")),
        *_fields("layer count rows columns scales offset:u8 stride:u8 scales_offset:u8 bytes:u8 reserved:u8"),
    ]
)
SHA256_OFFSET, CODES_SHA256_OFFSET = 24, 272
assert HEADER_DTYPE.itemsize == 512 and RECORD_DTYPE.itemsize == 64


class FileTensor(NamedTuple):
    """One record of the table of tensors.

    Attributes:
        role: What the tensor is, a value of `ROLES`.
        dtype: How its values are stored, a place in `FILE_DTYPE_NAMES`.
        layer: Number of the layer; 0 for tensors of the whole model.
        matrices: Number of stacked matrices (`count` in the file).
        rows: Rows of each matrix.
        columns: Columns of each matrix.
        scales: Number of scales of each matrix.
        offset: Offset of the first matrix's values.
        stride: Bytes from one matrix's values to the next's.
        scales_offset: Offset of the scales.
        bytes: Bytes of one matrix's values.
    """

    role: int
    dtype: int
    layer: int
    matrices: int
    rows: int
    columns: int
    scales: int
    offset: int = 0
    stride: int = 0
    scales_offset: int = 0
    bytes: int = 0


def align(size: int) -> int:
    """Return the next multiple of 64 bytes.

    Example:
        >>> align(1), align(64)
        (64, 64)
    """
    return -(-size // ALIGNMENT) * ALIGNMENT


def matrix_bytes(dtype: int, rows: int, columns: int) -> int:
    """Return the bytes of one matrix's values."""
    if dtype == DTYPE_TILES:
        return -(-rows // TILE) * -(-columns // TILE) * (TILE * TILE // 4)
    if dtype == DTYPE_BASE3:
        return -(-rows * columns // 5)
    return rows * columns * {DTYPE_FP32: 4, DTYPE_FP16: 2, DTYPE_INT8: 1}[dtype]


def find_role(number: int) -> str | None:
    """Return the name of a role; None for a number that means none."""
    return next((name for name, role in ROLES.items() if role == number), None)
