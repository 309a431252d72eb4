"""Ternary products in as few passes over memory as there are kernels for.

Shapes: N rows, I input width, O output width, E matrices (experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kabrn_dist.kernels.choice import kernels_for
from kabrn_dist.model.bitlinear import Quantised, _by_row, _headroom, grouped_outer, grouped_product, ternary


def bit_product(x: Quantised, weight: Tensor, counts: Sequence[int], enabled: bool = True) -> Tensor:
    """As `bitlinear.bit_product`."""
    product, scale = unscaled_product(x, weight, counts, enabled)
    return _ScaleRows.apply(product, scale.reciprocal())


def unscaled_product(x: Quantised, weight: Tensor, counts: Sequence[int], enabled: bool = True) -> Quantised:
    """`bit_product` whose scaling is left to what reads it: product [N,O] / scale [N,1] is the result."""
    return Quantised(*_Product.apply(x.codes, x.scale, weight, tuple(counts), enabled))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, scale: Tensor, weight: Tensor, counts: tuple[int, ...], enabled: bool
    ) -> tuple[Tensor, Tensor]:
        codes, kept, gamma = codes.contiguous(), weight, None
        if enabled:
            weight, gamma, kept = _signs(weight, codes.dtype)
            scale = scale / _by_row(gamma, counts)
        shift = _headroom(codes.dtype)
        if shift != 1:
            codes, scale = codes * shift, scale * shift
        product = grouped_product(codes, weight, counts)
        ctx.save_for_backward(codes, kept, gamma)
        ctx.counts, ctx.shift = counts, shift
        ctx.mark_non_differentiable(scale)
        return product, scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        codes, weight, gamma = ctx.saved_tensors
        for_codes = for_weight = None
        if ctx.needs_input_grad[0]:
            for_codes = grouped_product(grad, _widen_signs(weight, grad.dtype).transpose(1, 2), ctx.counts)
            for_codes = for_codes if ctx.shift == 1 else for_codes * ctx.shift
        if ctx.needs_input_grad[2]:
            for_weight = grouped_outer(grad, codes, ctx.counts)
            # Straight through: the result's slope in a latent is that in γ·sign, 1/γ of that in the sign.
            for_weight = for_weight if gamma is None else scale_rows(for_weight, gamma.reciprocal())
        return for_codes, None, for_weight, None, None


def _signs(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in `dtype`, γ, and the codes as bytes to keep."""
    kernels = kernels_for(weight)
    if kernels is not None and weight.dtype == dtype:
        return kernels.products.ternary(weight.contiguous())
    signs, gamma = ternary(weight)
    return signs.to(dtype), gamma, signs.to(torch.int8)


def _widen_signs(signs: Tensor, dtype: torch.dtype) -> Tensor:
    kernels = kernels_for(signs.new_empty(0, dtype=dtype))
    if signs.dtype == dtype:
        return signs
    return kernels.products.widen(signs, dtype) if kernels is not None else signs.to(dtype)


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """x [N,...] times factor [N,1,...], multiplied in the wider dtype and rounded once to that of x."""
    kernels = kernels_for(x)
    if kernels is not None and factor.dtype == torch.float32:
        return kernels.products.scale(x.contiguous(), factor.contiguous())
    return (x * factor).to(x.dtype)


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return scale_rows(x, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scale_rows(grad, ctx.saved_tensors[0]), None
