"""Low-rank factors beside the matrices of a layer with functions on edges: y_o += Σ_r B_or·(A·z)_r.

z is what the matrix multiplies, quantized as in `edge_layer`: silu(x) for the base, the values of the basis functions
for the splines. These are expanded chunk by chunk, and again in backward.

Shapes: N rows, I inputs, O outputs, R rank, K basis functions, E experts, rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.ops.activation_quant import quantize, to_fp32
from kabrn_dist.ops.edge_layer import encode_values, expert_chunks
from kabrn_dist.ops.grids import Grid
from kabrn_dist.ops.grouped_mm import grouped_mm, grouped_weight_grad
from kabrn_dist.ops.low_rank import LowRank, low_rank_product
from kabrn_dist.ops.splines import basis, basis_bound, basis_naive, basis_slope
from kabrn_dist.ops.weight_quant import TernaryMatrices


def add_edge_low_ranks(
    out: Tensor,
    x: Tensor,
    base: TernaryMatrices,
    spline: TernaryMatrices,
    tokens_per_expert: Sequence[int],
    grid: Grid,
) -> Tensor:
    """Add the products of the factors of both matrices to the result of `edge_layer`; arguments as there.

    Args:
        out: [N,O], the result; returned as it is where no matrix has factors.
        x: [N,I].
        base: its factors are [E,R,I] and [E,O,R].
        spline: its factors are [E,R,I·K] and [E,O,R].
        tokens_per_expert: rows of each expert.
        grid: of the splines.

    Returns:
        [N,O] in the dtype of `out`; sums are taken in fp32 or wider.
    """
    counts, quantized = tuple(tokens_per_expert), base.packed is not None
    total = out
    if base.low_rank is not None:
        total = total + low_rank_product(quantize(F.silu(to_fp32(x)), quantized), base.low_rank, counts)
    if spline.low_rank is not None:
        total = total + _SplineLowRank.apply(x, *spline.low_rank, counts, grid, quantized)
    return total.to(out.dtype)


def edge_low_rank_naive(
    x: Tensor, base: LowRank, spline: LowRank, tokens_per_expert: Sequence[int], grid: Grid, quantized: bool = True
) -> Tensor:
    """Compute what `add_edge_low_ranks` adds by definition, expert by expert, with autograd's gradient."""
    out = []
    for e, rows in enumerate(x.split(list(tokens_per_expert))):
        silu, scale, _ = quantize(F.silu(rows), quantized)
        values = basis_naive(rows, grid).flatten(-2)
        if quantized:
            steps = 127 / basis_bound(rows, grid)
            values = values + ((values * steps).round() / steps - values).detach()
        out.append((silu / scale) @ (base.b[e] @ base.a[e]).T + values @ (spline.b[e] @ spline.a[e]).T)
    return torch.cat(out)


class _SplineLowRank(torch.autograd.Function):
    """Keeps x and A·z."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, counts: tuple[int, ...], grid: Grid, quantized: bool
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        turned = _inputs_last(a.to(dtype), grid)
        inner = x.new_empty(len(x), a.shape[1], dtype=dtype)
        for e, rows in expert_chunks(counts, a.shape[2], x.device):
            codes, scale = _expand(x[rows], grid, quantized)
            inner[rows] = (codes @ turned[e].T) / scale
        ctx.save_for_backward(x, a, b, inner)
        ctx.counts, ctx.grid, ctx.quantized = counts, grid, quantized
        return grouped_mm(inner, b.to(dtype), counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, inner = ctx.saved_tensors
        grid, counts, dtype = ctx.grid, ctx.counts, inner.dtype
        grad = grad.to(dtype).contiguous()
        grad_inner = grouped_mm(grad, b.to(dtype).transpose(1, 2), counts)
        grad_b = grouped_weight_grad(grad, inner, counts).to(b.dtype)
        turned = _inputs_last(a.to(dtype), grid)
        grad_a = torch.zeros_like(turned)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for e, rows in expert_chunks(counts, a.shape[2], x.device):
            g = grad_inner[rows]
            codes, scale = _expand(x[rows], grid, ctx.quantized)
            grad_a[e] += (g / scale).T @ codes
            if grad_x is not None:
                values = (g @ turned[e]).unflatten(-1, (grid.size, -1))
                grad_x[rows] = basis_slope(to_fp32(x[rows]), values, grid).to(x.dtype)
        grad_a = grad_a.unflatten(-1, (grid.size, -1)).transpose(-1, -2).flatten(-2)
        return grad_x, grad_a.to(a.dtype), grad_b, None, None, None


def _expand(x: Tensor, grid: Grid, quantized: bool) -> tuple[Tensor, Tensor]:
    """Rows [n,I] → codes [n,K·I] of the basis functions, and their scale [n,1], in fp32 or wider."""
    z = to_fp32(x)
    return encode_values(basis(z, grid).flatten(-2), basis_bound(z, grid), quantized, z.dtype)


def _inputs_last(a: Tensor, grid: Grid) -> Tensor:
    """[E,R,I·K] → [E,R,K·I], the order in which `basis` expands."""
    return a.unflatten(-1, (-1, grid.size)).transpose(-1, -2).flatten(-2)
