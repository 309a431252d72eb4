"""Writes a model file: sizes first, then the weights parameter by parameter, in one pass.

A parameter in fp32 and the codes of one layer's experts are in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kabrn_dist.config import Config, ModelConfig
from kabrn_dist.config.file import dump_config
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.ops.retention import log_decays
from kabrn_dist.runtime.file_format import (
    ATTENTION_BIT,
    DTYPE_FP16,
    DTYPE_INT8,
    DTYPE_TILES,
    FILE_EXPERT_TYPES,
    FILE_SCORE_FUNCS,
    HEADER_DTYPE,
    MIXTURE_BIT,
    MODEL_FILE_MAGIC,
    MODEL_FILE_VERSION,
    RECORD_DTYPE,
    ROLES,
    SHA256_OFFSET,
    align,
)
from kabrn_dist.runtime.tensor_plan import (
    EMBEDDING_DTYPES,
    PLAIN_DTYPES,
    TERNARY_DTYPES,
    PlannedTensor,
    Storage,
    plan_tensors,
)
from kabrn_dist.runtime.tiles import encode_base3, pack_tiles, quantize_rows
from kabrn_dist.runtime.tokenizer_section import encode_tokenizer
from kabrn_dist.runtime.weights import QuantizedStack, WeightSource
from kabrn_dist.utils.atomic_io import atomic_open
from kabrn_dist.utils.errors import UserError

LARGEST_FP16 = 65504.0


class Packing(NamedTuple):
    """What can be chosen about a model file; see `write_model_file`.

    Attributes:
        embedding: "int8", "fp16" or "fp32".
        ternary: "tiles" or "base3".
        plain: "fp32" or "fp16".
        template: Chat template in Jinja; "" for none.
    """

    embedding: str = "int8"
    ternary: str = "tiles"
    plain: str = "fp32"
    template: str = ""


class FilePlan(NamedTuple):
    """A model file before its weights are read.

    Attributes:
        front: All that precedes the tensors.
        groups: Tensors whose matrices are interleaved.
        file_bytes: Size of the file.
    """

    front: bytes
    groups: list[list[PlannedTensor]]
    file_bytes: int

    @property
    def tensors(self) -> list[PlannedTensor]:
        """All tensors in the order of the file."""
        return [planned for group in self.groups for planned in group]


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
        sink = _HashingStream(stream)
        sink.write(plan.front)
        for group in plan.groups:
            _write_group(sink, group, weights, config.model)
        sink.pad_to(plan.file_bytes)
        stream.seek(SHA256_OFFSET)
        stream.write(sink.digest.digest())
    return plan


def plan_model_file(config: Config, tokenizer: Tokenizer, step: int, lam: float, packing: Packing) -> FilePlan:
    """Lay out a model file; see `pack_weights`.

    Args:
        config: Configuration of the run.
        tokenizer: Its tokenizer.
        step: Optimizer steps.
        lam: How far the model is quantized.
        packing: How it is written.

    Raises:
        UserError: as `pack_weights`, before anything is written.
    """
    model = config.model
    if 0 < lam < 1:
        raise UserError(
            f"step {step} is in the warm-up of quantization (λ is {lam:.3g}), where matrices are neither plain nor "
            f"ternary; train on to step {model.first_quantized_step}, or choose a checkpoint of that step or later"
        )
    is_ternary = lam == 1
    matrix = TERNARY_DTYPES[packing.ternary] if is_ternary else PLAIN_DTYPES[packing.plain]
    storage = Storage(EMBEDDING_DTYPES[packing.embedding], matrix)
    number = sum(len(group) for group in plan_tensors(model, storage, 0)[0])
    parts: dict[str, bytes] = {
        "layers": bytes(_layer_bits(model)),
        "tensors": bytes(number * RECORD_DTYPE.itemsize),
        "config": dump_config(config).encode(),
        "tokenizer": encode_tokenizer(tokenizer),
        "template": packing.template.encode(),
    }
    offsets, position = {}, HEADER_DTYPE.itemsize
    for part, content in parts.items():
        offsets[part] = position
        position = align(position + len(content))
    groups, end = plan_tensors(model, storage, position)
    records = [(*planned.tensor, 0) for group in groups for planned in group]
    parts["tensors"] = np.array(records, RECORD_DTYPE).tobytes()
    header = _header_fields(model) | {
        "file_bytes": end,
        "tokenizer_sha256": bytes.fromhex(tokenizer.sha256),
        "step": step,
        "tokenizer_size": tokenizer.vocab_size,
        "document_token": tokenizer.document_token,
        "quantized": int(is_ternary),
        "scale_group_size": (model.scale_group_size or 0) if is_ternary else 0,
        "num_tensors": number,
        **{f"{part}_offset": offset for part, offset in offsets.items()},
        **{f"{part}_bytes": len(parts[part]) for part in ("config", "tokenizer", "template")},
    }
    front = bytearray(position)
    front[: HEADER_DTYPE.itemsize] = _encode_header(header)
    for part, content in parts.items():
        front[offsets[part] : offsets[part] + len(content)] = content
    return FilePlan(bytes(front), groups, end)


def _header_fields(model: ModelConfig) -> dict[str, Any]:
    """The header's fields that follow from the section `model`; 0 for what its type of experts does not have."""
    experts, router, retention = model.experts, model.router, model.retention
    has_splines = experts.type in ("hat", "bspline")
    degree = {"hat": 1, "bspline": experts.spline_order}.get(experts.type, 0)
    return {
        "magic": MODEL_FILE_MAGIC,
        "version": MODEL_FILE_VERSION,
        "header_bytes": HEADER_DTYPE.itemsize,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_layers": len(model.layers),
        "num_heads": retention.num_heads,
        "key_dim": retention.key_dim,
        "value_dim": retention.value_dim,
        "short_conv_size": model.short_conv_size,
        "expert_type": FILE_EXPERT_TYPES.index(experts.type),
        "num_experts": experts.num_experts,
        "num_shared_experts": experts.num_shared_experts,
        "top_k": experts.top_k,
        "expert_hidden_size": experts.expert_hidden_size,
        "dense_hidden_size": model.dense_hidden_size,
        "score_func": FILE_SCORE_FUNCS.index(router.score_func),
        "norm_topk_prob": int(router.norm_topk_prob),
        "n_group": router.n_group,
        "topk_group": router.topk_group or 0,
        "function_groups": experts.function_groups if experts.type in ("rational", "chebyshev") else 0,
        "grid_size": experts.grid_size if has_splines else 0,
        "spline_degree": degree,
        "grid_low": experts.grid_range[0],
        "grid_high": experts.grid_range[1],
    }


def _encode_header(fields: dict[str, Any]) -> bytes:
    header = np.zeros(1, HEADER_DTYPE)
    for name, value in fields.items():
        if isinstance(value, int) and value > np.iinfo(HEADER_DTYPE[name]).max:
            raise UserError(f"{name} is {value}, beyond a model file's numbers; train a smaller model")
        header[name] = np.void(value) if isinstance(value, bytes) else value
    return header.tobytes()


def _layer_bits(model: ModelConfig) -> Iterator[int]:
    mixtures = set(model.moe_layers)
    for layer, kind in enumerate(model.layers):
        yield ATTENTION_BIT * (kind == "A") + MIXTURE_BIT * (layer in mixtures)


class _HashingStream:
    """A file that is written from its start to its end."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.position = stream, hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> None:
        self.digest.update(content)
        self.stream.write(content)
        self.position += len(content)

    def pad_to(self, position: int) -> None:
        assert position >= self.position
        self.write(bytes(position - self.position))


def _write_group(sink: _HashingStream, group: list[PlannedTensor], weights: WeightSource, config: ModelConfig) -> None:
    readers = [_open_tensor(planned, weights, config) for planned in group]
    for planned, (scales, _) in zip(group, readers, strict=True):
        if scales is not None:
            sink.pad_to(planned.tensor.scales_offset)
            sink.write(scales.astype("<f4").tobytes())
    for number in range(group[0].tensor.matrices):
        for planned, (_, encode) in zip(group, readers, strict=True):
            sink.pad_to(planned.tensor.offset + number * planned.tensor.stride)
            sink.write(encode(number).data.cast("B"))


Encoder = Callable[[int], NDArray[Any]]


def _open_tensor(
    planned: PlannedTensor, weights: WeightSource, config: ModelConfig
) -> tuple[NDArray[np.float32] | None, Encoder]:
    """Return a tensor's scales, and what gives the values of each of its matrices as they are stored."""
    tensor = planned.tensor
    if tensor.dtype in TERNARY_DTYPES.values():
        stack = QuantizedStack(weights.matrices(planned.names[0]), config.scale_group_size)
        assert stack.codes.shape == (tensor.matrices, tensor.rows, tensor.columns), planned
        encode = pack_tiles if tensor.dtype == DTYPE_TILES else encode_base3
        return stack.scales, lambda number: encode(stack.codes[number])
    values = _read_values(planned, weights, config)
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
