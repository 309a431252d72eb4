"""Which tensors a model's file holds, from its configuration alone, and how they follow each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kabrn_dist.config import ModelConfig
from kabrn_dist.runtime.file_format import (
    COEFFICIENTS,
    DTYPE_BASE3,
    DTYPE_FP16,
    DTYPE_FP32,
    DTYPE_INT8,
    DTYPE_TILES,
    FILE_MAX_COLUMNS,
    ROLES,
    FileTensor,
    align,
    matrix_bytes,
)
from kabrn_dist.runtime.parameter_names import parameter_name
from kabrn_dist.utils.errors import UserError

EMBEDDING_DTYPES = {"int8": DTYPE_INT8, "fp16": DTYPE_FP16, "fp32": DTYPE_FP32}
TERNARY_DTYPES = {"tiles": DTYPE_TILES, "base3": DTYPE_BASE3}
PLAIN_DTYPES = {"fp32": DTYPE_FP32, "fp16": DTYPE_FP16}
# Terms of a learned function, as the parameters that hold them in this order.
FUNCTION_PARTS = {
    "rational": (("numerator", 6), ("denominator", 4)),
    "chebyshev": (("", 4),),
}


class Storage(NamedTuple):
    """How values are stored.

    Attributes:
        embedding: Dtype of embedding and head, of `EMBEDDING_DTYPES`.
        matrix: Dtype of the matrices of mixers and experts.
    """

    embedding: int
    matrix: int


class PlannedTensor(NamedTuple):
    """One tensor of the file.

    Attributes:
        tensor: Its record.
        names: Parameters whose columns lie side by side in it.
    """

    tensor: FileTensor
    names: tuple[str, ...]


class _Planner:
    def __init__(self, config: ModelConfig, storage: Storage) -> None:
        self.config, self.storage = config, storage
        self.is_ternary = storage.matrix in TERNARY_DTYPES.values()

    def groups(self) -> Iterator[list[PlannedTensor]]:
        """Tensors in the order of the file; those of a group are interleaved, matrix by matrix."""
        config, storage = self.config, self.storage
        vocabulary = config.vocab_size, config.hidden_size
        yield [self.single("embedding", 0, storage.embedding, *vocabulary, "embedding.weight")]
        yield [self.single("log_decay", 0, DTYPE_FP32, 1, config.retention.num_heads)]
        mixtures = {layer: row for row, layer in enumerate(config.moe_layers)}
        for layer in range(len(config.layers)):
            yield from self.mixer(layer)
            yield from self.feed_forward(layer, layer in mixtures)
        yield [self.single("head", 0, storage.embedding, *vocabulary, "head.weight")]

    def single(self, role: str, layer: int, dtype: int, rows: int, columns: int, *names: str) -> PlannedTensor:
        return self.stack(role, layer, dtype, 1, rows, columns, *names)

    def matrix(self, role: str, layer: int, dtype: int, rows: int, columns: int, count: int = 1) -> PlannedTensor:
        return self.stack(role, layer, dtype, count, rows, columns, parameter_name(role, layer))

    def stack(
        self, role: str, layer: int, dtype: int, count: int, rows: int, columns: int, *names: str
    ) -> PlannedTensor:
        scales = rows if dtype == DTYPE_INT8 else 0
        if dtype in TERNARY_DTYPES.values():
            scales = count_scales(rows, self.config)
        return PlannedTensor(FileTensor(ROLES[role], dtype, layer, count, rows, columns, scales), names)

    def mixer(self, layer: int) -> Iterator[list[PlannedTensor]]:
        config, prefix, dtype = self.config, f"blocks.{layer}.mixer", self.storage.matrix
        hidden, heads = config.hidden_size, config.retention.num_heads
        keys, values = heads * config.retention.key_dim, heads * config.retention.value_dim
        if config.short_conv_size:
            shape = config.short_conv_size - 1, hidden
            name = f"{prefix}.inputs.convolution.weight"
            yield [self.single("mixer.convolution", layer, DTYPE_FP32, *shape, name)]
        for part, rows in (("query", keys), ("key", keys), ("value", values), ("gate", values)):
            yield [self.matrix(f"mixer.{part}", layer, dtype, rows, hidden)]
        yield [self.matrix("mixer.out", layer, dtype, hidden, values)]

    def feed_forward(self, layer: int, is_mixture: bool) -> Iterator[list[PlannedTensor]]:
        config, prefix = self.config, f"blocks.{layer}"
        hidden, experts = config.hidden_size, config.experts
        if config.short_conv_size:
            shape = config.short_conv_size - 1, hidden
            yield [self.single("convolution", layer, DTYPE_FP32, *shape, f"{prefix}.convolution.weight")]
        if not is_mixture:
            yield self.experts(layer, "shared", 1, config.dense_hidden_size)
            return
        yield [self.matrix("router.weight", layer, DTYPE_FP32, experts.num_experts, hidden)]
        yield [self.single("router.bias", layer, DTYPE_FP32, 1, experts.num_experts)]
        if experts.num_shared_experts:
            yield self.experts(layer, "shared", experts.num_shared_experts, experts.expert_hidden_size)
        yield self.experts(layer, "routed", experts.num_experts, experts.expert_hidden_size)

    def experts(self, layer: int, kind: str, count: int, width: int) -> list[PlannedTensor]:
        prefix = f"blocks.{layer}.mixture.{kind}"
        group = [
            self.matrix(f"{kind}.{part}", layer, self.storage.matrix, *shape, count)
            for part, shape in expert_shapes(self.config, width).items()
        ]
        terms = FUNCTION_PARTS.get(self.config.experts.type, ())
        columns = sum(number for _, number in terms)
        for part in COEFFICIENTS if terms else ():
            names = [f"{prefix}.{part}_{name}" if name else f"{prefix}.{part}" for name, _ in terms]
            shape = self.config.experts.function_groups, columns
            group.append(self.stack(f"{kind}.{part}", layer, DTYPE_FP32, count, *shape, *names))
        # In the order in which an expert reads them.
        order = {"inner": -1, "outer": 0.5}
        ranks = {id(each): order.get(_part(each), place) for place, each in enumerate(group)}
        return sorted(group, key=lambda each: ranks[id(each)])


def _part(planned: PlannedTensor) -> str:
    number = (planned.tensor.role - ROLES["routed.up"]) % 16
    return next((name for name, place in COEFFICIENTS.items() if place == number), "")


def expert_shapes(config: ModelConfig, width: int) -> dict[str, tuple[int, int]]:
    """Return rows and columns of each matrix of an expert with `width` hidden units, in the order of their use."""
    kind, hidden, experts = config.experts.type, config.hidden_size, config.experts
    if kind in ("hat", "bspline"):
        functions = experts.grid_size + (1 if kind == "hat" else experts.spline_order)
        return {
            "inner_base": (width, hidden),
            "inner_spline": (width, hidden * functions),
            "outer_base": (hidden, width),
            "outer_spline": (hidden, width * functions),
        }
    shapes = {"gate": (width, hidden)} if kind == "swiglu" else {}
    return shapes | {"up": (width, hidden), "down": (hidden, width)}


def count_scales(rows: int, config: ModelConfig) -> int:
    """Return how many scales a ternary matrix of so many rows has."""
    return 1 if config.scale_group_size is None else -(-rows // config.scale_group_size)


def plan_tensors(config: ModelConfig, storage: Storage, start: int) -> tuple[list[list[PlannedTensor]], int]:
    """Lay out all tensors.

    Args:
        config: Of the model.
        storage: How values are stored.
        start: Offset of the first one, a multiple of 64.

    Returns:
        Groups of tensors whose matrices are interleaved, with their offsets, and the offset after the last.

    Raises:
        UserError: for a model with sizes beyond the format's.
    """
    groups, position = [], start
    for group in _Planner(config, storage).groups():
        placed, position = _place(group, position)
        groups.append(placed)
    return groups, position


def _place(group: list[PlannedTensor], position: int) -> tuple[list[PlannedTensor], int]:
    """Scales first, then the matrices of the first expert, of the second, and so on."""
    for planned in group:
        _check_sizes(planned)
    sizes = [matrix_bytes(p.tensor.dtype, p.tensor.rows, p.tensor.columns) for p in group]
    stride = sum(align(size) for size in sizes)
    scales: list[int] = []
    for planned in group:
        scales.append(position if planned.tensor.scales else 0)
        position += align(planned.tensor.matrices * planned.tensor.scales * 4)
    placed, offset = [], position
    for planned, size, scales_offset in zip(group, sizes, scales, strict=True):
        tensor = planned.tensor._replace(offset=offset, stride=stride, scales_offset=scales_offset, bytes=size)
        placed.append(planned._replace(tensor=tensor))
        offset += align(size)
    return placed, position + group[0].tensor.matrices * stride


def _check_sizes(planned: PlannedTensor) -> None:
    tensor = planned.tensor
    if tensor.columns > FILE_MAX_COLUMNS:
        raise UserError(
            f"{planned.names[0]}: a matrix of {tensor.rows} × {tensor.columns} is beyond a model file's "
            f"{FILE_MAX_COLUMNS:,} columns; train a narrower model, or one with a smaller grid_size"
        )
