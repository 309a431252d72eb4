"""The tensors of an export for Hugging Face: their names there, and their values from a checkpoint, piece by piece.

Names follow the modules of modeling_mixkabrn.py. Ternary matrices are either latent weights, NAME.weight, or packed
codes and scales, NAME.codes and NAME.scales (the layout of kabrn_dist/inference/stored_codes.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kabrn_dist.config import Config
from kabrn_dist.inference.checkpoint_weights import is_router_state
from kabrn_dist.inference.export import CHUNK_ELEMENTS, ExportSource
from kabrn_dist.inference.stored_codes import CODES_SUFFIX, SCALES_SUFFIX, code_shapes
from kabrn_dist.inference.working_copy import empty_full_model

Flavor = Literal["latent", "ternary"]
ROUTER_BIAS = "router/bias"


class HubTensor(NamedTuple):
    """A tensor of the export.

    Attributes:
        name: In the export.
        source: Name of the parameter or state that it comes from.
        kind: What of it: "values", or "codes" or "scales" of a ternary matrix.
        shape: Shape.
        dtype: Dtype.
        start: First element of the flattened source.
    """

    name: str
    source: str
    kind: Literal["values", "codes", "scales"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


def list_hub_tensors(
    config: Config, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], flavor: Flavor
) -> list[HubTensor]:
    """Return the tensors of an export, those of wide dtypes first, so that all are aligned.

    Args:
        config: Configuration of the run.
        shapes: Name → shape of every parameter and state of the routers.
        dtypes: Name → dtype of each parameter.
        flavor: "latent" for weights to train on, "ternary" for packed codes.
    """
    tensors: list[HubTensor] = []
    table = empty_full_model(config).parameter_table()
    for name, shape in shapes.items():
        if name == ROUTER_BIAS:
            tensors += [
                HubTensor(
                    f"model.blocks.{layer}.mixture.router.bias",
                    name,
                    "values",
                    shape[1:],
                    torch.float32,
                    row * shape[1],
                )
                for row, layer in enumerate(config.model.moe_layers)
            ]
        elif is_router_state(name):
            continue
        elif table[name].ternary and flavor == "ternary":
            sizes = code_shapes(shape, config.model.scale_group_size)
            base = hub_name(name, True).removesuffix(".weight")
            tensors.append(HubTensor(f"{base}.codes", name, "codes", sizes[CODES_SUFFIX], torch.uint8))
            tensors.append(HubTensor(f"{base}.scales", name, "scales", sizes[SCALES_SUFFIX], torch.float32))
        else:
            is_matrix = table[name].role == "matrix"
            tensors.append(HubTensor(hub_name(name, is_matrix), name, "values", shape, dtypes[name]))
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


def hub_name(name: str, is_matrix: bool) -> str:
    """Return a parameter's name in modeling_mixkabrn.py.

    Args:
        name: In `named_parameters()` of the trainer's model.
        is_matrix: Whether it holds matrices of mixers or experts, each of which is a module there.

    Example:
        >>> hub_name("blocks.0.mixer.inputs.query.weight", True), hub_name("blocks.0.mixture.routed.up", True)
        ('model.blocks.0.mixer.query.weight', 'model.blocks.0.mixture.routed.up.weight')
    """
    if name == "head.weight":
        return "lm_head.weight"
    name = re.sub(r"\.mixer\.(inputs|output)\.", ".mixer.", f"model.{name}")
    return name if name.endswith(".weight") or not is_matrix else f"{name}.weight"


def read_hub_tensor(tensor: HubTensor, source: ExportSource) -> Iterator[Tensor]:
    """Yield the flattened values of a tensor, piece by piece."""
    if tensor.kind == "codes":
        yield from source.packed_codes(tensor.source)
    elif tensor.kind == "scales":
        yield source.scales(tensor.source).reshape(-1)
    else:
        total = prod(tensor.shape)
        for start in range(0, total, CHUNK_ELEMENTS):
            stop = min(start + CHUNK_ELEMENTS, total)
            yield source.read(tensor.source, tensor.start + start, tensor.start + stop, tensor.dtype)
