"""Ternary codes of a model that an adapter is trained or used on: fixed ones, and ones merged with trained factors.

Shapes:
    E: matrices (experts).
    O: output features.
    I: input features.
    R: rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kabrn_dist.ops.low_rank import LowRankModule
from kabrn_dist.ops.packing import pack
from kabrn_dist.ops.weight_quant import (
    TernaryMatrices,
    TernarySource,
    absmean_scales,
    grad_placeholder,
    round_latents,
)

# Latents whose code is another one than they round to are moved to this side of the threshold, half a scale.
MARGIN = 2.0**-12


class FixedCodes(TernarySource):
    """The codes of one parameter, whatever its values are now.

    Args:
        matrices: with packed codes and scales.
    """

    def __init__(self, matrices: TernaryMatrices) -> None:
        assert matrices.packed is not None and matrices.gamma is not None
        self.shape = tuple(matrices.latents.shape)
        self.packed, self.gamma = matrices.packed.detach(), matrices.gamma.detach()

    def read(self, parameter: nn.Parameter) -> TernaryMatrices:
        """Return the matrices; no gradient reaches `parameter`."""
        if self.packed.device != parameter.device:
            self.packed, self.gamma = self.packed.to(parameter.device), self.gamma.to(parameter.device)
        return TernaryMatrices(grad_placeholder(parameter.detach().new_zeros(1), self.shape), self.packed, self.gamma)


class MergedCodes(TernarySource):
    """The codes of latents plus trained low-rank factors, rounded in every pass; gradients reach the factors.

    At the start, where B is zero, they are the codes and scales of the base, also where those are not what its latents
    round to: in exports latents are rounded to bf16.

    Args:
        module: that holds the parameter and its factors.
        name: of the parameter.
        scale: [E,1,1] fp32, what B of the factors is multiplied by.
        latents: [E,O,I] of the base.
        base: its codes and scales.
        scale_group_size: outputs that share a scale; None for all of a matrix.
    """

    def __init__(
        self,
        module: LowRankModule,
        name: str,
        scale: Tensor,
        latents: Tensor,
        base: TernaryMatrices,
        scale_group_size: int | None,
    ) -> None:
        assert base.gamma is not None
        self._module, self._name, self._scale, self._group = module, name, scale, scale_group_size
        wide = torch.promote_types(latents.dtype, torch.float32)
        self.latents = _agree_with_codes(latents.detach().to(wide), base.codes(torch.int8), base.gamma)
        self.base_scales, self._measured = base.gamma, absmean_scales(self.latents, scale_group_size)

    def read(self, parameter: nn.Parameter) -> TernaryMatrices:
        """Return the matrices, differentiable in the factors."""
        if self.latents.device != parameter.device:
            self.latents, self.base_scales, self._measured, self._scale = (
                part.to(parameter.device) for part in (self.latents, self.base_scales, self._measured, self._scale)
            )
        factors = self._module.scaled_factors(self._name, self._scale)
        placeholder, *rest = _Merge.apply(*factors, self, parameter.dtype)
        return TernaryMatrices(placeholder, *rest)

    def merge(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return int8 codes [E,O,I] and scales, [E,1,1] or [E,O,1], of the latents plus B·A."""
        merged = torch.empty_like(self.latents)
        # One product a matrix, so that its bits do not depend on how many matrices a rank holds.
        for base, left, right, out in zip(self.latents, b, a, merged, strict=True):
            torch.addmm(base, left.to(base.dtype), right.to(base.dtype), out=out)
        gamma = self.base_scales * (absmean_scales(merged, self._group) / self._measured)
        return round_latents(merged, gamma), gamma


class _Merge(torch.autograd.Function):
    """Straight through the rounding: the gradient of a sum of latents is that of its codes times their scale."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, source: MergedCodes, dtype: torch.dtype) -> tuple[Tensor, ...]:
        codes, gamma = source.merge(a, b)
        packed = pack(codes)
        ctx.save_for_backward(a, b)
        ctx.mark_non_differentiable(packed, gamma, codes)
        return grad_placeholder(source.latents.new_zeros(1, dtype=dtype), tuple(codes.shape)), packed, gamma, codes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        return (
            torch.bmm(b.to(a.dtype).transpose(1, 2), grad),
            torch.bmm(grad, a.transpose(1, 2)).to(b.dtype),
            None,
            None,
        )


def _agree_with_codes(latents: Tensor, codes: Tensor, gamma: Tensor) -> Tensor:
    """The latents, the same tensor where all round to `codes`; those that do not are moved across the threshold."""
    if torch.equal(round_latents(latents, gamma), codes):
        return latents
    threshold = gamma / 2
    signs = codes.to(latents.dtype)
    outside = signs * torch.maximum(latents * signs, threshold * (1 + MARGIN))
    inside = torch.maximum(torch.minimum(latents, threshold * (1 - MARGIN)), threshold * (MARGIN - 1))
    return torch.where(codes == 0, inside, outside)
