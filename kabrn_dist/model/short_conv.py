"""A short causal convolution: each channel sees the few tokens before its own, in the same document.

In front of queries, keys and values it lets a layer compare neighbors without spending a head on them (H3, arXiv
2212.14052; Primer, arXiv 2109.08668). In front of a feed-forward it lets the router and the experts tell a token by
its neighbors.

Shapes:
    B: batch.
    T: tokens of a sequence.
    D: hidden size.
    J: taps on earlier tokens, the kernel size less one; the tap on the token itself is 1 and not learned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kabrn_dist.distributed.halo import halo_exchange
from kabrn_dist.kernels.selection import kernels_for
from kabrn_dist.kernels.short_conv import MAX_TAPS, ShortConvKernel
from kabrn_dist.ops.activation_quant import to_fp32


def short_conv_naive(x: Tensor, weight: Tensor, before: Tensor, positions: Tensor) -> Tensor:
    """Compute `short_conv` by definition, token by token. Same arguments and result."""
    taps, row = len(weight), torch.cat([before, x], 1)
    out = []
    for t in range(x.shape[1]):
        total = x[:, t]
        for j in range(1, taps + 1):
            same = (positions[:, t] >= j).to(x.dtype)[:, None]
            total = total + weight[j - 1] * same * row[:, taps + t - j]
        out.append(total)
    return torch.stack(out, 1)


def short_conv(x: Tensor, weight: Tensor, before: Tensor, positions: Tensor) -> Tensor:
    """Return x_t + Σ_j w_j ⊙ x_{t−j}, j = 1 … J, over the tokens of t's document.

    Backward keeps only the input.

    Args:
        x: [B,T,D].
        weight: [J,D], w_1 first; the sum is taken in fp32 or wider.
        before: [B,J,D], the inputs in front of x in the dtype of x; ignored where no document reaches into them.
        positions: [B,T] int64, of each token in its document.

    Returns:
        [B,T,D] in the dtype of x.
    """
    kernels = kernels_for(x)
    if kernels is not None and len(weight) <= MAX_TAPS:
        fused: Tensor = _FusedShortConv.apply(x, before, weight, positions, kernels.short_conv)
        return fused
    return short_conv_eager(x, weight, before, positions)


def short_conv_eager(x: Tensor, weight: Tensor, before: Tensor, positions: Tensor) -> Tensor:
    """Compute `short_conv` in torch's operations."""
    out: Tensor = _ShortConv.apply(torch.cat([before, x], 1), weight, positions)
    return out


class _FusedShortConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, before: Tensor, weight: Tensor, positions: Tensor, kernel: ShortConvKernel
    ) -> Tensor:
        inputs = x.contiguous(), before.contiguous(), weight.float().contiguous(), positions.contiguous()
        ctx.save_for_backward(*inputs)
        ctx.kernel, ctx.weight_dtype = kernel, weight.dtype
        return kernel.forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_before, grad_weight = ctx.kernel.backward(*ctx.saved_tensors, grad.contiguous())
        return grad_x, grad_before, grad_weight.to(ctx.weight_dtype), None, None


class _ShortConv(torch.autograd.Function):
    """[B,J+T,D] → [B,T,D]."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(row, weight, positions)
        taps, weight = len(weight), to_fp32(weight)
        out = to_fp32(row[:, taps:]).clone()
        for j in range(1, taps + 1):
            out += _shifted(row, taps, j) * _reaches_back(positions, j) * weight[j - 1]
        return out.to(row.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        row, weight, positions = ctx.saved_tensors
        taps, weight_fp32, grad = len(weight), to_fp32(weight), to_fp32(grad)
        grad_row = grad.new_zeros(row.shape)
        grad_row[:, taps:] = grad
        grad_weight = torch.empty_like(weight_fp32)
        for j in range(1, taps + 1):
            masked = grad * _reaches_back(positions, j)
            grad_weight[j - 1] = (masked * _shifted(row, taps, j)).sum((0, 1))
            _shifted(grad_row, taps, j).add_(masked * weight_fp32[j - 1])
        return grad_row.to(row.dtype), grad_weight.to(weight.dtype), None


def _shifted(row: Tensor, taps: int, j: int) -> Tensor:
    """[B,T,D], the input j tokens before each token; a view where no cast is needed."""
    return to_fp32(row[:, taps - j : row.shape[1] - j])


def _reaches_back(positions: Tensor, j: int) -> Tensor:
    """[B,T,1] bool, true for tokens whose document reaches j tokens back."""
    return (positions >= j).unsqueeze(-1)


def preceding_inputs(x: Tensor, count: int, recent: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
    """Return the inputs in front of x: the stored ones, those of another rank, or zeros at the start of a row.

    Collective with a group.

    Args:
        x: [B,T,D].
        count: J.
        recent: [B,J,D], stored by an earlier call; None for a row that starts here.
        group: the sequence group in the order of the slices; None where rows are whole.

    Returns:
        [B,J,D] in the dtype of x.
    """
    if recent is not None:
        return recent
    if group is not None:
        return halo_exchange(x, count, group)
    return x.new_zeros(len(x), count, x.shape[2])


def last_inputs(before: Tensor, x: Tensor) -> Tensor:
    """Return the last J inputs [B,J,D] of `before` [B,J,D] and x [B,T,D]: the state that decoding keeps."""
    count = before.shape[1]
    return torch.cat([before, x[:, -count:]], 1)[:, -count:]


class ShortConv(nn.Module):
    """The layer of `short_conv`. Its weights start at zero, so that at first it changes nothing.

    The weights are function parameters: fp32 in training, and no weight decay.

    Args:
        hidden_size: D.
        kernel_size: taps, the one on the token itself included; 4 sees the 3 tokens before.

    Attributes:
        weight: [J,D].
    """

    def __init__(self, hidden_size: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel_size - 1, hidden_size))

    def initialize(self, seed: int, name: str) -> None:
        """Set the weights to zero; nothing is drawn from `seed` and `name`, which every module receives."""
        self.weight.data.zero_()

    def forward(self, x: Tensor, before: Tensor, positions: Tensor) -> Tensor:
        """Apply `short_conv` with the layer's weights."""
        return short_conv(x, self.weight, before, positions)
