"""What ternary products read: rows normalised and rounded to int8, once for all that read them.

Shapes: N rows, I input width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kabrn_dist.kernels.choice import kernels_for
from kabrn_dist.kernels.functions import Function, Functions

SMALLEST = 1e-5
IDENTITY = Function("identity")


class Quantised(NamedTuple):
    """A quantised input: `codes / scale` is the value.

    Attributes:
        codes: [..., I] whole numbers −128…127 in the compute dtype (plain values where quantisation is off).
        scale: [..., 1] fp32, 127 / max|x| of each row (1 where quantisation is off). NaN where the row is not finite.
        kept: [..., I] the codes as int8: what integer products multiply, and what all readers keep for backward, one
            byte a value. None where quantisation is off; readers make their own where it was left out.
    """

    codes: Tensor
    scale: Tensor
    kept: Tensor | None = None

    def rows(self) -> Quantised:
        """The same as [N,I]."""
        kept = None if self.kept is None else self.kept.reshape(-1, self.kept.shape[-1])
        return Quantised(self.codes.reshape(-1, self.codes.shape[-1]), self.scale.reshape(-1, 1), kept)


def widen(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Divide by the root mean square over the last dimension, in fp32 (or wider); no gain. Same dtype out."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def quantise(x: Tensor, share: float = 1.0) -> Quantised:
    """Absmax int8 per row (eq. 4 of arXiv 2402.17764), straight-through: d(codes/scale)/dx = 1.

    Args:
        x: [..., I] of any float dtype.
        share: 0 (or False) passes x through, with a scale of 1; between 0 and 1 the value is x + share·(q(x) − x).
    """
    if share == 1:
        return Quantised(*_Round.apply(x))
    plain = Quantised(x, torch.ones_like(widen(x[..., :1])))
    return blend(plain, share) if share else plain


def normalise(x: Tensor, share: float = 1.0) -> Quantised:
    """`quantise(rms_norm(x), share)`, what every product reads, in one pass where there is a kernel for it."""
    kernels = kernels_for(x)
    if kernels is None:
        return quantise(rms_norm(x), share)
    codes, scale, kept = _Normalise.apply(x.reshape(-1, x.shape[-1]), share == 1, kernels.functions)
    found = Quantised(codes.view_as(x), scale.view(*x.shape[:-1], 1), None if kept is None else kept.view_as(x))
    return blend(found, share) if 0 < share < 1 else found


def blend(plain: Quantised, share: float) -> Quantised:
    """Values a `share` of the way to their quantised ones, straight-through; `plain` has scales of 1."""
    with torch.no_grad():
        codes, scale, _ = quantise(plain.codes)
        step = (share * (widen(codes) / scale - widen(plain.codes))).to(plain.codes.dtype)
    return plain._replace(codes=plain.codes + step)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantised: bool, kernels: Functions) -> tuple[Tensor, Tensor, Tensor | None]:
        x, nothing = x.contiguous(), x.new_empty(1, 1, 0, dtype=torch.float32)
        codes, scale, rms, kept = kernels.forward(IDENTITY, x, None, nothing, [len(x)], quantised)
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
        wide = widen(x)
        scale = 127 / wide.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST)
        codes = (wide * scale).round_().clamp_(-128, 127)
        kept = codes.to(torch.int8)
        ctx.save_for_backward(scale)
        ctx.mark_non_differentiable(scale, kept)
        return codes.to(x.dtype), scale, kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return (grad * scale).to(grad.dtype)
