"""Rotary positions and the norm of heads, each in one pass that also brings heads into the order that is needed next.

Shapes:
    B: batch.
    H: heads.
    T: time.
    D: width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kabrn_dist.kernels.heads import HeadsKernel
from kabrn_dist.kernels.selection import kernels_for
from kabrn_dist.ops.activation_quant import rms_norm, to_fp32


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (first half, second half) of a head by its angle (RoFormer, arXiv 2104.09864), in fp32.

    Args:
        x: [B,H,T,D] in any order in memory, D even.
        cos: [B,1,T,D/2] fp32, of the angles. Gets no gradient.
        sin: [B,1,T,D/2] fp32. Gets no gradient.

    Returns:
        [B,H,T,D], contiguous, in the dtype of x.
    """
    kernels = kernels_for(x)
    if kernels is None:
        return rotate_naive(x, cos, sin)
    rotated: Tensor = _Rotate.apply(x, cos, sin, kernels.heads)
    return rotated


def rotate_naive(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `rotate` in torch's operations."""
    left, right = to_fp32(x).chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1).to(x.dtype)


def norm_heads(x: Tensor, eps: float) -> Tensor:
    """Divide each head by its root mean square and put the heads of a token side by side: [B,H,T,D] → [B,T,H·D]."""
    kernels = kernels_for(x)
    if kernels is None:
        return norm_heads_naive(x, eps)
    normed: Tensor = _NormHeads.apply(x, eps, kernels.heads)
    return normed.transpose(1, 2).flatten(2)


def norm_heads_naive(x: Tensor, eps: float) -> Tensor:
    """Compute `norm_heads` in torch's operations."""
    return rms_norm(x, eps).transpose(1, 2).flatten(2)


def _together(x: Tensor) -> Tensor:
    """The tensor, copied if the values of a head do not lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernel: HeadsKernel) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernel = kernel
        return kernel.rotate(_together(x), cos, sin, back=False, by_head=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.kernel.rotate(_together(grad), cos, sin, back=True, by_head=False), None, None, None


class _NormHeads(torch.autograd.Function):
    """Keeps its input only; backward computes the norm again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, kernel: HeadsKernel) -> Tensor:
        x = _together(x)
        ctx.save_for_backward(x)
        ctx.eps, ctx.kernel = eps, kernel
        return kernel.norm(x, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.kernel.norm_grad(x, _together(grad), ctx.eps), None, None
