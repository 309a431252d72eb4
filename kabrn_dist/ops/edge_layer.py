"""A layer of a Kolmogorov-Arnold network with a function on every edge: y_o = Σᵢ [b_oi·silu(xᵢ) + Σₖ s_oik·Bₖ(xᵢ)].

Source: KAN (arXiv 2404.19756, eq. 2.10), with one ternary matrix for all base weights and one for all coefficients.

In the ternary mode both branches are int8 codes with a scale for each row. The base branch is scaled by the largest
silu(x) of the row. The basis branch is scaled by the largest value that basis functions can take in the row: inside
the grid that is a constant (1 for hats), so all rows share one scale; where an input leaves the grid it grows with
the distance, and its resolution is what int8 codes of such an outlier have anyway.

Rows are expanded to K values an input chunk by chunk, in memory that stays in the cache, and expanded again in
backward: only x is saved.

Shapes: N rows, I inputs, O outputs, K = G + p basis functions, E experts, rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.kernels.selection import Kernels, kernels_for
from kabrn_dist.kernels.spline import CODES, MAX_DEGREE, PLAIN, VALUES
from kabrn_dist.ops.activation_quant import MIN_ABSMAX, quantize, to_fp32
from kabrn_dist.ops.grids import Grid
from kabrn_dist.ops.splines import basis, basis_bound, basis_naive, basis_slope, make_spline_spec
from kabrn_dist.ops.weight_quant import TernaryMatrices, absmean_quantize, ternarize

# Values of a chunk: 8 MiB of fp32 on CPUs; elsewhere few large products are better.
CHUNK, CHUNK_ELSEWHERE = 1 << 21, 1 << 26


def edge_layer(
    x: Tensor,
    base: TernaryMatrices | Tensor,
    spline: TernaryMatrices | Tensor,
    tokens_per_expert: Sequence[int],
    grid: Grid,
    quantized: bool = True,
) -> Tensor:
    """Apply the layer of every expert to its rows.

    Args:
        x: [N,I] of any float dtype, rows sorted by expert.
        base: [E,O,I], matrices with one scale each, or latents.
        spline: [E,O,I·K], the K coefficients of an edge next to each other.
        tokens_per_expert: rows of each expert; they sum to N.
        grid: of the splines.
        quantized: whether latents are quantized; values are rounded where matrices are.

    Returns:
        [N,O] in the dtype of x.

    Example:
        >>> grid = Grid(low=-1.0, high=1.0, intervals=2, degree=1)  # K = 3
        >>> x, base, spline = torch.zeros(2, 4), torch.ones(1, 5, 4), torch.ones(1, 5, 12)
        >>> edge_layer(x, base, spline, [2], grid)[0]  # Σᵢ (silu(0) + Σₖ Bₖ(0)) = 4·(0 + 1)
        tensor([4., 4., 4., 4., 4.])
    """
    base, spline = (m if isinstance(m, TernaryMatrices) else ternarize(m, quantized) for m in (base, spline))
    kernels = kernels_for(x)
    if kernels is None or grid.degree > MAX_DEGREE or not x.dtype == base.latents.dtype == spline.latents.dtype:
        return _EdgeLayer.apply(x, base.latents, spline.latents, (base, spline), tuple(tokens_per_expert), grid)
    return _FusedLayer.apply(x, base.latents, spline.latents, (base, spline), tuple(tokens_per_expert), grid, kernels)


def edge_layer_eager(
    x: Tensor, base: Tensor, spline: Tensor, tokens_per_expert: Sequence[int], grid: Grid, quantized: bool = True
) -> Tensor:
    """Compute `edge_layer` in torch's own operations, for any device and dtype."""
    both = ternarize(base, quantized), ternarize(spline, quantized)
    return _EdgeLayer.apply(x, both[0].latents, both[1].latents, both, tuple(tokens_per_expert), grid)


def edge_layer_naive(
    x: Tensor, base: Tensor, spline: Tensor, tokens_per_expert: Sequence[int], grid: Grid, quantized: bool = True
) -> Tensor:
    """Compute `edge_layer` by definition, expert by expert, with autograd's gradient (straight through rounding)."""

    def effective(weight: Tensor) -> Tensor:
        codes, gamma = absmean_quantize(weight)
        return weight + (codes * gamma - weight).detach() if quantized else weight

    out = []
    for rows, b, s in zip(x.split(list(tokens_per_expert)), effective(base), effective(spline), strict=True):
        silu, scale, _ = quantize(F.silu(rows), quantized)
        values = basis_naive(rows, grid).flatten(-2)
        if quantized:
            steps = 127 / basis_bound(rows, grid)
            values = values + ((values * steps).round() / steps - values).detach()
        out.append((silu / scale) @ b.T + values @ s.T)
    return torch.cat(out)


class _Branch(NamedTuple):
    """A branch's input for some rows: `codes / scale` is the value."""

    codes: Tensor
    scale: Tensor


class _FusedLayer(torch.autograd.Function):
    """Both branches as one: the splines of all inputs and then their silu, [N,(K+1)·I], by the kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        spline: Tensor,
        matrices: tuple[TernaryMatrices, TernaryMatrices],
        counts: tuple[int, ...],
        grid: Grid,
        kernels: Kernels,
    ) -> Tensor:
        x, quantized = x.contiguous(), matrices[0].packed is not None
        gammas = _gammas(matrices).flip(1)
        ctx.save_for_backward(x, gammas, *_kept(matrices))
        ctx.counts, ctx.grid, ctx.kernels, ctx.matrices = counts, grid, kernels, _empty(matrices)
        weights = [_values(m, x.dtype) for m in reversed(matrices)]
        matrix, line, inner = _joined(weights, grid, x.dtype), make_spline_spec(grid), spline.shape[2]
        out = x.new_empty(len(x), base.shape[1])
        values = _buffer(x, counts, matrix.shape[2])
        for e, rows in expert_chunks(counts, matrix.shape[2], x.device):
            some = values[: rows.stop - rows.start]
            scale = kernels.spline.expand(line, x[rows], CODES if quantized else PLAIN, some)
            if quantized:
                factor = gammas[e] / scale
                part = (some[:, inner:] @ matrix[e, :, inner:].T) * factor[:, 1:]
                part.addcmul_(some[:, :inner] @ matrix[e, :, :inner].T, factor[:, :1])
                out[rows] = part
            else:
                torch.mm(some, matrix[e].T, out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gammas, *kept = ctx.saved_tensors
        kernel, grid, grad = ctx.kernels.spline, ctx.grid, grad.contiguous()
        base, spline = _filled(ctx.matrices, kept)
        weights = [_values(m, x.dtype) for m in (spline, base)]
        form = PLAIN if base.packed is None else VALUES
        matrix, line = _joined(weights, grid, x.dtype), make_spline_spec(grid)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # Sums over chunks are taken in fp32. Matrices that are not trained get none.
        trained = any(ctx.needs_input_grad[1:3])
        grad_matrix = torch.zeros_like(matrix, dtype=torch.float32) if trained else None
        values = _buffer(x, ctx.counts, matrix.shape[2])
        for e, rows in expert_chunks(ctx.counts, matrix.shape[2], x.device):
            some, g = values[: rows.stop - rows.start], grad[rows]
            if grad_matrix is not None:
                kernel.expand(line, x[rows], form, some)
                if x.dtype == torch.float32:
                    grad_matrix[e].addmm_(g.T, some)
                else:
                    grad_matrix[e] += g.T @ some
            if grad_x is not None:
                torch.mm(g, matrix[e], out=some)
                grad_x[rows] = kernel.gather(line, x[rows], some, gammas[e])
        if grad_matrix is None:
            return grad_x, None, None, None, None, None, None
        grad_spline, grad_base = grad_matrix.split([spline.latents.shape[2], x.shape[1]], 2)
        turned = _knots_last(grad_spline.to(x.dtype), grid)
        return grad_x, grad_base.to(x.dtype), turned, None, None, None, None


def _values(matrices: TernaryMatrices, dtype: torch.dtype) -> Tensor:
    """[E,O,I] codes, or plain weights, in `dtype`."""
    return matrices.latents.to(dtype) if matrices.packed is None else matrices.codes(dtype)


def _gammas(matrices: tuple[TernaryMatrices, TernaryMatrices]) -> Tensor:
    """[E,2] scales of the base and the spline, ones for plain matrices."""
    ones = to_fp32(matrices[0].latents.new_ones(len(matrices[0].latents), 1, 1))
    return torch.cat([(ones if m.gamma is None else m.gamma).flatten(1) for m in matrices], 1)


def _kept(matrices: tuple[TernaryMatrices, TernaryMatrices]) -> list[Tensor]:
    """What backward needs of them: packed codes, or plain weights."""
    return [m.latents if m.packed is None else m.packed for m in matrices]


def _empty(matrices: tuple[TernaryMatrices, TernaryMatrices]) -> tuple[TernaryMatrices | None, TernaryMatrices | None]:
    """What `_filled` makes matrices of; None for plain ones."""
    base, spline = (None if m.packed is None else TernaryMatrices(m.latents.detach()) for m in matrices)
    return base, spline


def _filled(
    empty: tuple[TernaryMatrices | None, TernaryMatrices | None], kept: Sequence[Tensor]
) -> tuple[TernaryMatrices, TernaryMatrices]:
    base, spline = (
        TernaryMatrices(values) if m is None else m._replace(packed=values)
        for m, values in zip(empty, kept, strict=True)
    )
    return base, spline


def _joined(weights: Sequence[Tensor], grid: Grid, dtype: torch.dtype) -> Tensor:
    """[E,O,(K+1)·I] of a spline's matrix [E,O,I·K] and a base's [E,O,I]."""
    spline, base = weights
    experts, outputs, inputs = base.shape
    matrix = torch.empty(experts, outputs, grid.size + 1, inputs, dtype=dtype)
    matrix[:, :, :-1].copy_(spline.unflatten(-1, (inputs, grid.size)).transpose(-1, -2))
    matrix[:, :, -1].copy_(base)
    return matrix.flatten(-2)


def _buffer(x: Tensor, counts: Sequence[int], values: int) -> Tensor:
    """For the largest chunk, of `values` a row. All chunks use it, so that its memory stays in the cache."""
    most = max((rows.stop - rows.start for _, rows in expert_chunks(counts, values, x.device)), default=0)
    return x.new_empty(most, values)


class _EdgeLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        spline: Tensor,
        matrices: tuple[TernaryMatrices, TernaryMatrices],
        counts: tuple[int, ...],
        grid: Grid,
    ) -> Tensor:
        quantized = matrices[0].packed is not None
        # [2][E,1,1]
        gammas = _gammas(matrices).T[..., None, None]
        ctx.save_for_backward(x, gammas, *_kept(matrices))
        ctx.counts, ctx.grid, ctx.dtypes, ctx.matrices = counts, grid, (base.dtype, spline.dtype), _empty(matrices)
        used = _matrices([_values(m, x.dtype) for m in matrices], grid, x.dtype)
        out = x.new_empty(len(x), base.shape[1])
        for e, rows in expert_chunks(counts, spline.shape[2], x.device):
            branches = _branches(to_fp32(x[rows]), grid, quantized, x.dtype)
            base_part, spline_part = (
                (branch.codes @ matrix[e].T) * (gamma[e] / branch.scale)
                for branch, matrix, gamma in zip(branches, used, gammas, strict=True)
            )
            out[rows] = base_part.add_(spline_part)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gammas, *kept = ctx.saved_tensors
        grid, filled = ctx.grid, _filled(ctx.matrices, kept)
        quantized = filled[0].packed is not None
        codes = [_values(m, x.dtype) for m in filled]
        matrices = _matrices(codes, grid, x.dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # Sums over chunks are taken in fp32 or wider. Matrices that are not trained get none.
        trained = any(ctx.needs_input_grad[1:3])
        grad_weights = [torch.zeros_like(m, dtype=gammas.dtype) for m in matrices] if trained else []
        for e, rows in expert_chunks(ctx.counts, codes[1].shape[2], x.device):
            z, g = to_fp32(x[rows]), grad[rows]
            if trained:
                for branch, total in zip(_branches(z, grid, quantized, x.dtype), grad_weights, strict=True):
                    total[e] += (g / branch.scale).to(g.dtype).T @ branch.codes
            if grad_x is not None:
                silu, splines = ((g * gamma[e]).to(g.dtype) @ m[e] for gamma, m in zip(gammas, matrices, strict=True))
                slope = basis_slope(z, splines.unflatten(-1, (grid.size, -1)), grid)
                grad_x[rows] = slope.add_(torch.ops.aten.silu_backward(silu.to(z.dtype), z))
        if not trained:
            return grad_x, None, None, None, None, None
        grad_base, grad_spline = grad_weights
        grad_spline = _knots_last(grad_spline, grid)
        return grad_x, grad_base.to(ctx.dtypes[0]), grad_spline.to(ctx.dtypes[1]), None, None, None


def _matrices(codes: Sequence[Tensor], grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both branches' matrices for the product; the spline's inputs go last, which makes expanding contiguous."""
    base, spline = codes
    turned = spline.unflatten(-1, (-1, grid.size)).transpose(-1, -2)
    return base.to(dtype), turned.to(dtype, memory_format=torch.contiguous_format).flatten(-2)


def _knots_last(spline: Tensor, grid: Grid) -> Tensor:
    return spline.unflatten(-1, (grid.size, -1)).transpose(-1, -2).flatten(-2)


def _branches(z: Tensor, grid: Grid, quantized: bool, dtype: torch.dtype) -> tuple[_Branch, _Branch]:
    """Rows [n,I] → base branch [n,I] and basis branch [n,K·I], each with a scale [n,1]."""
    silu = F.silu(z)
    most = silu.abs().amax(-1, keepdim=True).clamp_(min=MIN_ABSMAX)
    values = basis(z, grid).flatten(-2)
    return encode_values(silu, most, quantized, dtype), encode_values(values, basis_bound(z, grid), quantized, dtype)


def encode_values(values: Tensor, most: Tensor, quantized: bool, dtype: torch.dtype) -> _Branch:
    """Return codes in `dtype` of values [n,I] that exceed `most` [n,1] nowhere; writes into the values."""
    scale = 127 / most if quantized else torch.ones_like(most)
    if quantized:
        values = values.mul_(scale).round_()
    if dtype == torch.float16:
        # It ends at 65,504, so its sums are of values up to 1. In the ternary mode that is a power of two.
        shift = torch.full_like(most, 1 / 128) if quantized else 1 / most
        values, scale = values.mul_(shift), scale * shift
    return _Branch(values.to(dtype), scale)


def expert_chunks(counts: Sequence[int], values: int, device: torch.device) -> Iterator[tuple[int, slice]]:
    """Yield every expert's rows in chunks, of `values` a row."""
    most = max(1, (CHUNK if device.type == "cpu" else CHUNK_ELSEWHERE) // values)
    first = 0
    for e, n in enumerate(counts):
        for start in range(first, first + n, most):
            yield e, slice(start, min(start + most, first + n))
        first += n
