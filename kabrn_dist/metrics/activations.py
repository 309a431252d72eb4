"""Saturation of int8 activations: the fraction of codes at the clipping bound ±127, read by hooks.

Shapes: B rows of a micro-batch, T time, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kabrn_dist.distributed.mesh import Mesh
from kabrn_dist.model.bitlinear import BitLinear
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.moe import DenseFeedForward, MixtureOfExperts
from kabrn_dist.ops.activation_quant import Quantized, normalize_quantize


class Saturation:
    """Sums over forward passes, float64 on the model's device.

    An input that several matrices read counts once: that of q, k, v and gate, that of the output matrix, and the one
    that all experts of a layer share. The experts' hidden activations cannot be seen from outside.

    Attributes:
        rows: [B] bool, the rows of the next pass that count; None for all.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.rows: Tensor | None = None
        self._sums = torch.zeros(2, layers, dtype=torch.float64, device=device)

    def add(self, layer: int, codes: Tensor) -> None:
        """Count codes [B,T,D] of any dtype."""
        counted = codes if self.rows is None else codes[self.rows.to(codes.device)]
        ends = (counted >= 127) | (counted <= -127)
        self._sums[0, layer] += ends.sum()
        self._sums[1, layer] += ends.numel()

    def values(self, mesh: Mesh) -> dict[str, float]:
        """Return each layer's fraction over all ranks by its name in the log; empty if nothing was counted. Collective.

        Each token is scaled by its largest value, so the fraction is at least 1/D; the nearer it is to that, the more
        of the 8 bits is spent on the range of a few outliers. 1 means that all values are ± the same size.
        """
        sums = mesh.all_reduce_sum(self._sums).cpu()
        fractions = (sums[0] / sums[1]).tolist() if bool((sums[1] > 0).all()) else []
        return {f"ternary/saturation/layer_{layer}": fraction for layer, fraction in enumerate(fractions)}


@contextmanager
def watch_saturation(model: MixKABRN) -> Iterator[Saturation]:
    """Count the codes of the model's forward passes within the context; none while it is not fully quantized."""
    saturation = Saturation(len(model.blocks), next(model.parameters()).device)
    hooks = []
    for layer, block in enumerate(model.blocks if model.quant.lam == 1 else ()):
        for module in block.modules():
            # Matrices of one module read one input. (ZeRO 3 hands each its own view, so it cannot be told by identity.)
            readers = [part for part in module.children() if isinstance(part, BitLinear)]
            if readers:
                hooks.append(readers[0].register_forward_pre_hook(partial(_count_quantized, saturation, layer)))
            if isinstance(module, MixtureOfExperts | DenseFeedForward):
                hooks.append(module.register_forward_pre_hook(partial(_count_plain, saturation, layer)))
    try:
        yield saturation
    finally:
        for hook in hooks:
            hook.remove()


def _count_quantized(saturation: Saturation, layer: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    x: Quantized = inputs[0]
    if x.int8_codes is not None:
        saturation.add(layer, x.int8_codes)


def _count_plain(saturation: Saturation, layer: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Normalize and quantize again, as the module does: tokens travel to experts without their rows."""
    codes = normalize_quantize(inputs[0].detach()).int8_codes
    assert codes is not None
    saturation.add(layer, codes)
