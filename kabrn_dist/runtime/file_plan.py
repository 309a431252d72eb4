"""Lays out a model file: everything but the weights, and where each of them will lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from kabrn_dist.config import Config, ModelConfig
from kabrn_dist.config.file import dump_config
from kabrn_dist.data.tokenizer import Tokenizer
from kabrn_dist.runtime.file_format import (
    ATTENTION_BIT,
    FILE_EXPERT_TYPES,
    FILE_MAX_ROWS,
    FILE_SCORE_FUNCS,
    HEADER_DTYPE,
    HEADER_LIMITS,
    MIXTURE_BIT,
    MODEL_FILE_MAGIC,
    MODEL_FILE_VERSION,
    RECORD_DTYPE,
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
from kabrn_dist.runtime.tokenizer_section import encode_tokenizer
from kabrn_dist.utils.errors import UserError


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
    _check_quantization(model, step, lam)
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
        # A group larger than the matrix is the matrix.
        "scale_group_size": min(model.scale_group_size or 0, FILE_MAX_ROWS) if is_ternary else 0,
        "num_tensors": number,
        **{f"{part}_offset": offset for part, offset in offsets.items()},
        **{f"{part}_bytes": len(parts[part]) for part in ("config", "tokenizer", "template")},
    }
    front = bytearray(position)
    front[: HEADER_DTYPE.itemsize] = _encode_header(header)
    for part, content in parts.items():
        front[offsets[part] : offsets[part] + len(content)] = content
    return FilePlan(bytes(front), groups, end)


def _check_quantization(model: ModelConfig, step: int, lam: float) -> None:
    if 0 < lam < 1:
        raise UserError(
            f"step {step} is in the warm-up of quantization (λ is {lam:.3g}), where matrices are neither plain nor "
            f"ternary; train on to step {model.first_quantized_step}, or choose a checkpoint of that step or later"
        )


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
        least, most = HEADER_LIMITS.get(name, (0, 2**64 - 1))
        if isinstance(value, int) and not least <= value <= most:
            raise UserError(f"{name} is {value}, and a model file holds {least} to {most}; train another model")
        header[name] = np.void(value) if isinstance(value, bytes) else value
    return header.tobytes()


def _layer_bits(model: ModelConfig) -> Iterator[int]:
    mixtures = set(model.moe_layers)
    for layer, kind in enumerate(model.layers):
        yield ATTENTION_BIT * (kind == "A") + MIXTURE_BIT * (layer in mixtures)
