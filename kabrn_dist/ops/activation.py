"""Learned functions of groups of channels, normalized and quantized: q(RMSNorm(φ(x))), fused if there is a kernel.

Shapes:
    N: rows (routed tokens).
    D: channels.
    E: experts of this rank.
    G: groups of channels.
    C: coefficients of a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kabrn_dist.kernels.selection import kernels_for
from kabrn_dist.kernels.univariate import UnivariateFunction, UnivariateKernel
from kabrn_dist.ops.activation_quant import Quantized, interpolate_quantized, quantize, rms_norm

# x [N,D], coefficients [E,G,C], counts → φ(x) [N,D]
EagerFunction = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


def activate(
    x: Quantized,
    function: UnivariateFunction,
    eager: EagerFunction,
    coefficients: Tensor,
    tokens_per_expert: Sequence[int],
    lam: float,
) -> Quantized:
    """Return q(RMSNorm(φ(x.codes / x.scale))), the input of the next product.

    Args:
        x: codes [N,D] and scale [N,1], rows sorted by expert; also a product that is not yet scaled.
        function: what the kernel computes.
        eager: the same in torch's operations, for devices and dtypes without a kernel.
        coefficients: [E,G,C].
        tokens_per_expert: rows of each expert, which sum to N.
        lam: how far values are quantized, see `QuantState`; 0 (or False) leaves the quantizer out.
    """
    kernels = kernels_for(x.codes)
    if kernels is not None:
        fused = _Activation.apply(
            x.codes, x.scale, coefficients.float(), tuple(tokens_per_expert), function, lam == 1, kernels.univariate
        )
        return interpolate_quantized(Quantized(*fused), lam) if 0 < lam < 1 else Quantized(*fused)
    return activate_eager(x, eager, coefficients, tokens_per_expert, lam)


def activate_eager(
    x: Quantized, eager: EagerFunction, coefficients: Tensor, tokens_per_expert: Sequence[int], lam: float
) -> Quantized:
    """Compute `activate` step by step, in torch's operations."""
    values = (x.codes / x.scale).to(x.codes.dtype)
    return quantize(rms_norm(eager(values, coefficients, tokens_per_expert)), lam)


class _Activation(torch.autograd.Function):
    """Keeps its input and two numbers a row; backward computes the functions again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_scale: Tensor,
        coefficients: Tensor,
        counts: tuple[int, ...],
        function: UnivariateFunction,
        quantized: bool,
        kernels: UnivariateKernel,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, coefficients, factor = x.contiguous(), coefficients.contiguous(), x_scale.reciprocal()
        codes, scale, rms, int8_codes = kernels.forward(function, x, factor, coefficients, counts, quantized)
        ctx.save_for_backward(x, factor, coefficients, scale, rms)
        ctx.counts, ctx.function, ctx.kernels = counts, function, kernels
        ctx.mark_non_differentiable(scale, *(() if int8_codes is None else (int8_codes,)))
        return codes, scale, int8_codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, factor, coefficients, scale, rms = ctx.saved_tensors
        grads = ctx.kernels.backward(ctx.function, x, factor, coefficients, ctx.counts, grad.contiguous(), scale, rms)
        return grads[0], None, grads[1], None, None, None, None
