"""Inputs of ternary products: rows normalized and rounded to int8, once for all matrices that read them.

Shapes:
    N: rows.
    I: input features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kabrn_dist.kernels.selection import kernels_for
from kabrn_dist.kernels.univariate import UnivariateFunction, UnivariateKernel

MIN_ABSMAX = 1e-5
IDENTITY = UnivariateFunction("identity")


class Quantized(NamedTuple):
    """A quantized input: `codes / scale` is the value.

    Attributes:
        codes: [..., I] whole numbers −128…127 in the compute dtype (plain values if quantization is off).
        scale: [..., 1] fp32, 127 / max|x| of each row (1 if quantization is off). NaN if the row is not finite.
        int8_codes: [..., I] the codes as int8, which integer products multiply and all readers save for backward, one
            byte per value. None if quantization is off; readers convert the codes themselves if it was left out.
    """

    codes: Tensor
    scale: Tensor
    int8_codes: Tensor | None = None

    def rows(self) -> Quantized:
        """Return the same values as rows [N,I]."""
        return Quantized(*(None if part is None else part.reshape(-1, part.shape[-1]) for part in self))  # type: ignore[arg-type]

    def shaped(self, leading: torch.Size) -> Quantized:
        """Return the same values with other leading dimensions in place of the rows'."""
        return Quantized(*(None if part is None else part.view(*leading, part.shape[-1]) for part in self))  # type: ignore[arg-type]

    def repeat(self, times: int) -> Quantized:
        """Return the rows [N,I] `times` times, one copy below the other."""
        return Quantized(*(None if part is None else part.repeat(times, 1) for part in self))  # type: ignore[arg-type]


def to_fp32(x: Tensor) -> Tensor:
    """Cast to fp32; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide by the root mean square over the last dimension, in fp32 or wider; no gain. The dtype stays."""
    x_fp32 = to_fp32(x)
    return (x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def quantize(x: Tensor, lam: float = 1.0) -> Quantized:
    """Quantize to absmax int8 per row (eq. 4 of arXiv 2402.17764), straight-through: d(codes/scale)/dx = 1.

    Args:
        x: [..., I] of any float dtype.
        lam: 0 (or False) passes x through, with a scale of 1; between 0 and 1 the value is x + lam·(q(x) − x).

    Example:
        >>> x = quantize(torch.tensor([[0.5, -1.0, 0.25]]))
        >>> x.int8_codes, x.scale
        (tensor([[  64, -127,   32]], dtype=torch.int8), tensor([[127.]]))
    """
    if lam == 1:
        return Quantized(*_Round.apply(x))
    plain = Quantized(x, torch.ones_like(to_fp32(x[..., :1])))
    return interpolate_quantized(plain, lam) if lam else plain


def normalize_quantize(x: Tensor, lam: float = 1.0) -> Quantized:
    """Return `quantize(rms_norm(x), lam)`, the input of every product, in one pass if there is a kernel for it."""
    kernels = kernels_for(x)
    if kernels is None:
        return quantize(rms_norm(x), lam)
    codes, scale, kept = _Normalize.apply(x.reshape(-1, x.shape[-1]), lam == 1, kernels.univariate)
    found = Quantized(codes.view_as(x), scale.view(*x.shape[:-1], 1), None if kept is None else kept.view_as(x))
    return interpolate_quantized(found, lam) if 0 < lam < 1 else found


def interpolate_quantized(plain: Quantized, lam: float) -> Quantized:
    """Move values by `lam` of the way to their quantized ones, straight-through; `plain` has scales of 1."""
    with torch.no_grad():
        codes, scale, _ = quantize(plain.codes)
        step = (lam * (to_fp32(codes) / scale - to_fp32(plain.codes))).to(plain.codes.dtype)
    return plain._replace(codes=plain.codes + step)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: bool, kernels: UnivariateKernel
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, nothing = x.contiguous(), x.new_empty(1, 1, 0, dtype=torch.float32)
        codes, scale, rms, kept = kernels.forward(IDENTITY, x, None, nothing, [len(x)], quantized)
        ctx.save_for_backward(x, nothing, scale, rms)
        ctx.kernels = kernels
        ctx.mark_non_differentiable(scale, *(() if kept is None else (kept,)))
        return codes, scale, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        x, nothing, scale, rms = ctx.saved_tensors
        grads = ctx.kernels.backward(IDENTITY, x, None, nothing, [len(x)], grad.contiguous(), scale, rms)
        return grads[0], None, None


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = to_fp32(x)
        scale = 127 / wide.abs().amax(-1, keepdim=True).clamp_(min=MIN_ABSMAX)
        codes = (wide * scale).round_().clamp_(-128, 127)
        kept = codes.to(torch.int8)
        ctx.save_for_backward(scale)
        ctx.mark_non_differentiable(scale, kept)
        return codes.to(x.dtype), scale, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return (grad * scale).to(grad.dtype)
