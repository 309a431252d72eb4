"""Writes a model file in one pass: a parameter in fp32 and the codes of one layer's experts are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from kabrn_dist.adapters.codes_hash import CodesHash
from kabrn_dist.config import Config, ModelConfig
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.ops.retention import log_decays
from kabrn_dist.runtime.file_checks import seal_model_file
from kabrn_dist.runtime.file_format import DTYPE_FP16, DTYPE_INT8, DTYPE_TILES, ROLES, find_role
from kabrn_dist.runtime.file_plan import FilePlan, Packing, plan_model_file
from kabrn_dist.runtime.parameter_names import MATRIX_ROLES
from kabrn_dist.runtime.tensor_plan import TERNARY_DTYPES, PlannedTensor
from kabrn_dist.runtime.tiles import encode_base3, pack_tiles, quantize_rows
from kabrn_dist.runtime.weights import QuantizedStack, WeightSource
from kabrn_dist.utils.atomic_io import atomic_open
from kabrn_dist.utils.errors import UserError

LARGEST_FP16 = 65504.0
# Number of a matrix → its values as they are stored.
_Encoder: TypeAlias = Callable[[int], NDArray[Any]]


def pack_weights(
    weights: WeightSource, config: Config, tokenizer: Tokenizer, step: int, out: Path, packing: Packing
) -> FilePlan:
    """Write the model file and return what it holds.

    Args:
        weights: Of the model.
        config: Configuration of its run.
        tokenizer: The tokenizer that it was trained with.
        step: Optimizer steps that it was trained for.
        out: The file, which appears complete or not at all.
        packing: How it is written.

    Raises:
        UserError: for a model that is partly quantized or beyond the format's sizes, and if the disk refuses.
    """
    plan = plan_model_file(config, tokenizer, step, weights.lam, packing)
    with atomic_open(out) as stream:
        sink = _PaddedStream(stream)
        sink.write(plan.front)
        for group in plan.groups:
            _write_group(sink, group, weights, config.model)
        sink.pad_to(plan.file_bytes)
        seal_model_file(stream, bytes.fromhex(sink.codes.hexdigest()))
    return plan


class _PaddedStream:
    """A file that is written from its start to its end, and the hash of the matrices in it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.codes, self.position = stream, CodesHash(), 0

    def write(self, content: bytes | memoryview) -> None:
        self.stream.write(content)
        self.position += len(content)

    def pad_to(self, position: int) -> None:
        assert position >= self.position
        self.write(bytes(position - self.position))


def _write_group(sink: _PaddedStream, group: list[PlannedTensor], weights: WeightSource, config: ModelConfig) -> None:
    readers = [_open_tensor(planned, weights, config, sink.codes) for planned in group]
    for planned, (scales, _) in zip(group, readers, strict=True):
        if scales is not None:
            sink.pad_to(planned.tensor.scales_offset)
            sink.write(scales.astype("<f4").tobytes())
    for number in range(group[0].tensor.matrices):
        for planned, (_, encode) in zip(group, readers, strict=True):
            sink.pad_to(planned.tensor.offset + number * planned.tensor.stride)
            sink.write(encode(number).data.cast("B"))


def _open_tensor(
    planned: PlannedTensor, weights: WeightSource, config: ModelConfig, total: CodesHash
) -> tuple[NDArray[np.float32] | None, _Encoder]:
    """Return a tensor's scales, and what gives the values of each of its matrices as they are stored."""
    tensor = planned.tensor
    if tensor.dtype in TERNARY_DTYPES.values():
        stack = QuantizedStack(weights.matrices(planned.names[0]), config.scale_group_size)
        assert stack.codes.shape == (tensor.matrices, tensor.rows, tensor.columns), planned
        total.add_ternary(planned.names[0], stack.codes, stack.scales)
        encode = pack_tiles if tensor.dtype == DTYPE_TILES else encode_base3
        return stack.scales, lambda number: encode(stack.codes[number])
    values = _read_values(planned, weights, config)
    if find_role(tensor.role) in MATRIX_ROLES:
        total.add_plain(planned.names[0], values)
    if tensor.dtype == DTYPE_INT8:
        codes, scales = quantize_rows(values[0])
        return scales, lambda number: codes
    if tensor.dtype == DTYPE_FP16:
        largest = float(np.abs(values).max(initial=0))
        if largest > LARGEST_FP16:
            raise UserError(f"{planned.names[0]}: {largest:g} is beyond fp16; store it as fp32")
        return None, lambda number: values[number].astype("<f2")
    return None, lambda number: np.ascontiguousarray(values[number], "<f4")


def _read_values(planned: PlannedTensor, weights: WeightSource, config: ModelConfig) -> NDArray[np.float32]:
    """[count, rows, columns] of a tensor that is not ternary."""
    tensor = planned.tensor
    if tensor.role == ROLES["log_decay"]:
        values = torch.tensor(log_decays(config.retention.decay, config.retention.num_heads))
    elif tensor.role == ROLES["router.bias"]:
        values = weights.values("router/bias")[config.moe_layers.index(tensor.layer)]
    else:
        values = torch.cat([weights.values(name) for name in planned.names], -1)
    return values.reshape(tensor.matrices, tensor.rows, tensor.columns).numpy()
