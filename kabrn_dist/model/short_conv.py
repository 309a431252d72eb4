"""A short causal convolution: each channel sees the few tokens before its own, of the same document.

In front of queries, keys and values it lets a layer compare neighbours without spending a head on them (H3, arXiv
2212.14052; Primer, arXiv 2109.08668); in front of a feed-forward it lets router and experts tell a token by them.

Shapes: B batch, T time, D width, J taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kabrn_dist.distributed.halo import halo_exchange
from kabrn_dist.ops.activation_quant import to_fp32


def convolve_naive(x: Tensor, weight: Tensor, before: Tensor, positions: Tensor) -> Tensor:
    """The sum by definition, token by token. Arguments and result as `convolve`."""
    taps, row = len(weight), torch.cat([before, x], 1)
    out = []
    for t in range(x.shape[1]):
        total = x[:, t]
        for j in range(1, taps + 1):
            same = (positions[:, t] >= j).to(x.dtype)[:, None]
            total = total + weight[j - 1] * same * row[:, taps + t - j]
        out.append(total)
    return torch.stack(out, 1)


def convolve(x: Tensor, weight: Tensor, before: Tensor, positions: Tensor) -> Tensor:
    """x_t + Σ_j w_j ⊙ x_{t−j}, j = 1 … J, over the tokens of t's document. Backward keeps the input alone.

    Args:
        x: [B,T,D].
        weight: [J,D], w_1 first; summed up in fp32 or wider.
        before: [B,J,D], the columns in front of x in the dtype of x; of no effect where no document reaches into them.
        positions: [B,T] int64, of each token in its document.

    Returns:
        [B,T,D] in the dtype of x.
    """
    return _Convolve.apply(torch.cat([before, x], 1), weight, positions)


class _Convolve(torch.autograd.Function):
    """[B,J+T,D] → [B,T,D]."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(row, weight, positions)
        taps, wide = len(weight), to_fp32(weight)
        out = to_fp32(row[:, taps:]).clone()
        for j in range(1, taps + 1):
            out += _earlier(row, taps, j) * _reaching(positions, j) * wide[j - 1]
        return out.to(row.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        row, weight, positions = ctx.saved_tensors
        taps, wide, grad = len(weight), to_fp32(weight), to_fp32(grad)
        for_row = grad.new_zeros(row.shape)
        for_row[:, taps:] = grad
        for_weight = torch.empty_like(wide)
        for j in range(1, taps + 1):
            reaching = grad * _reaching(positions, j)
            for_weight[j - 1] = (reaching * _earlier(row, taps, j)).sum((0, 1))
            _earlier(for_row, taps, j).add_(reaching * wide[j - 1])
        return for_row.to(row.dtype), for_weight.to(weight.dtype), None


def _earlier(row: Tensor, taps: int, j: int) -> Tensor:
    """[B,T,D], what stands j tokens before each; a view where no cast is needed."""
    return to_fp32(row[:, taps - j : row.shape[1] - j])


def _reaching(positions: Tensor, j: int) -> Tensor:
    """[B,T,1] bool, true for tokens whose document reaches j tokens back."""
    return (positions >= j).unsqueeze(-1)


def find_before(x: Tensor, taps: int, recent: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
    """[B,J,D], the columns in front of x [B,T,D]: those kept, another rank's, or zeros at a row's start.

    Collective with a group, which is the sequence group in the order of the slices.
    """
    if recent is not None:
        return recent
    if group is not None:
        return halo_exchange(x, taps, group)
    return x.new_zeros(len(x), taps, x.shape[2])


def keep_recent(before: Tensor, x: Tensor) -> Tensor:
    """[B,J,D], the last columns of both: what decoding keeps."""
    return torch.cat([before, x[:, -before.shape[1] :]], 1)[:, -before.shape[1] :]


class ShortConv(nn.Module):
    """The layer's weights [J,D]: zeros at first, so that it begins as if it were not there.

    They are coefficients like those of functions: fp32 in training, without weight decay.
    """

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps, width))

    def initialize(self, seed: int, name: str) -> None:
        """Nothing is drawn: `seed` and `name` are what every module is told."""
        self.weight.data.zero_()

    def forward(self, x: Tensor, before: Tensor, positions: Tensor) -> Tensor:
        """See `convolve`."""
        return convolve(x, self.weight, before, positions)
