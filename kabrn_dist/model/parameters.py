"""The roles of a model's parameters, as one table.

Optimizer groups, casting, checkpoints, exports, growing and the ternary metrics ask this table; none of them looks for
hints in names or for attributes of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from torch import nn

from kabrn_dist.model.moe import MixtureOfExperts
from kabrn_dist.model.retention import STATE_KEY, STATE_VALUE
from kabrn_dist.model.router import Router
from kabrn_dist.model.short_conv import ShortConv
from kabrn_dist.ops.low_rank import A_SUFFIX, B_SUFFIX
from kabrn_dist.ops.weight_quant import TernaryModule

Role = Literal["embedding", "matrix", "function", "conv", "router", "head", "adapter"]


class ParameterInfo(NamedTuple):
    """What is known about one parameter from where it stands in the model.

    Attributes:
        name: its name in `named_parameters()`, in checkpoints and in exports.
        role: "matrix" for the matrices of mixers and experts, "function" for coefficients of learned functions, "conv"
            for weights of short convolutions, "adapter" for low-rank factors and initial states that are trained beside
            the model, and "embedding", "router" and "head" for what they say.
        layer: number of its block; None outside the blocks.
        routed: True for routed experts, of which each rank of an expert group holds others.
        ternary: True if the forward pass multiplies by its ternary codes (in the end, where quantization warms up).
        sharded: True if this rank holds only a shard of its latents (see backend/ternary_sharding.py).
    """

    name: str
    role: Role
    layer: int | None
    routed: bool
    ternary: bool
    sharded: bool

    @property
    def local_name(self) -> str:
        """The name within its block; the whole name outside the blocks."""
        return self.name if self.layer is None else self.name.removeprefix(f"blocks.{self.layer}.")

    @property
    def learned_function(self) -> bool:
        """True for functions and convolutions: no weight decay, and a learning rate of their own."""
        return self.role in ("function", "conv")


class TernaryWeight(NamedTuple):
    """A ternary matrix of the model, or a stack of experts' matrices.

    Attributes:
        layer: number of its layer.
        name: within the layer, for tables and pictures.
        parameter: latent weights [O,I] or [E,O,I], or this rank's shard of them.
        routed: True for routed experts.
    """

    layer: int
    name: str
    parameter: nn.Parameter
    routed: bool


def build_parameter_table(blocks: Iterable[nn.Module], head: nn.Module, quantize: bool) -> dict[str, ParameterInfo]:
    """Return name → `ParameterInfo` of all parameters of a `MixKABRN`, in the order of its `named_parameters()`.

    Args:
        blocks: of the model.
        head: of the model.
        quantize: whether its matrices are ternary.
    """
    infos: list[ParameterInfo] = [ParameterInfo("embedding.weight", "embedding", None, False, False, False)]
    for layer, block in enumerate(blocks):
        routed = block.mixture.routed if isinstance(block.mixture, MixtureOfExperts) else None
        for prefix, module in block.named_modules(prefix=f"blocks.{layer}"):
            infos += _describe_module(module, prefix, layer, module is routed, quantize)
    for leaf, _ in head.named_parameters():
        role: Role = "adapter" if is_adapter_leaf(leaf) else "head"
        infos.append(ParameterInfo(f"head.{leaf}", role, None, False, False, False))
    return {info.name: info for info in infos}


def _describe_module(
    module: nn.Module, prefix: str, layer: int, routed: bool, quantize: bool
) -> Iterator[ParameterInfo]:
    for leaf, _ in module.named_parameters(recurse=False):
        role = _find_role(module, leaf)
        source = module.sources.get(leaf) if isinstance(module, TernaryModule) else None
        sharded = source is not None and source.sharded
        yield ParameterInfo(f"{prefix}.{leaf}", role, layer, routed, quantize and role == "matrix", sharded)


def _find_role(module: nn.Module, leaf: str) -> Role:
    if is_adapter_leaf(leaf):
        return "adapter"
    if isinstance(module, Router):
        return "router"
    if isinstance(module, ShortConv):
        return "conv"
    assert isinstance(module, TernaryModule), f"{type(module).__name__}.{leaf} has no role"
    return "matrix" if leaf in module.stds else "function"


def is_adapter_leaf(leaf: str) -> bool:
    """Return whether a parameter, by its name within its module, is trained beside the model: an adapter's."""
    return leaf.endswith((A_SUFFIX, B_SUFFIX)) or leaf in (STATE_KEY, STATE_VALUE)
