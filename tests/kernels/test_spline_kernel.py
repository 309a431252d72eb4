"""The passes around the products of a spline layer, fused: as step by step, on any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.kernels.selection import select_kernels
from kabrn_dist.kernels.spline import CODES, PLAIN, VALUES, SplineKernel
from kabrn_dist.ops.edge_layer import edge_layer, edge_layer_eager
from kabrn_dist.ops.grids import Grid
from kabrn_dist.ops.splines import basis, basis_bound, basis_slope, make_spline_spec

DTYPES = [torch.float32, torch.bfloat16]
# The second grid leaves zero outside.
GRIDS = [
    Grid(low, low + 4, g, p) for low, g, p in [(-2, 2, 1), (1, 5, 1), (-2, 4, 2), (-2, 5, 3), (1, 9, 5), (-2, 7, 7)]
]
SHAPES = [(1, 1), (3, 15), (5, 16), (9, 37)]
fused = pytest.mark.skipif(select_kernels("cpu").kernels is None, reason=select_kernels("cpu").reason)


def kernel() -> SplineKernel:
    kernels = select_kernels("cpu").kernels
    assert kernels is not None
    return kernels.spline


def rows(shape: tuple[int, int], grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inside, far outside, and at both ends of the grid."""
    torch.manual_seed(0)
    x = 2 * torch.randn(shape) + (grid.low + grid.high) / 2
    for place, value in enumerate((grid.low, grid.high, grid.low - 300, grid.high + 300)[: x.numel()]):
        x.view(-1)[place] = value
    return x.to(dtype)


def expanded(x: Tensor, grid: Grid, form: int) -> tuple[Tensor, Tensor]:
    out = x.new_empty(len(x), x.shape[1] * (grid.size + 1))
    return out, kernel().expand(make_spline_spec(grid), x, form, out)


@fused
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_slopes_are_those_of_float64(shape: tuple[int, int], grid: Grid) -> None:
    x = rows(shape, grid)
    wide = x.double()
    expected = torch.cat([basis(wide, grid).flatten(1), F.silu(wide)], 1)
    torch.testing.assert_close(expanded(x, grid, PLAIN)[0].double(), expected, atol=2e-6, rtol=2e-6)
    grad, gammas = torch.randn_like(expected).float(), torch.tensor([0.5, 3.0])
    found = kernel().gather(make_spline_spec(grid), x, grad, gammas)
    splines, silu = grad.double().split([x.shape[1] * grid.size, x.shape[1]], 1)
    slope = basis_slope(wide, splines.unflatten(-1, (grid.size, -1)), grid)
    at = 0.5 * slope + 3 * torch.ops.aten.silu_backward(silu.contiguous(), wide)
    torch.testing.assert_close(found.double(), at, atol=2e-5, rtol=2e-6)


@fused
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_int8_with_the_scales_of_the_row(shape: tuple[int, int], grid: Grid) -> None:
    x = rows(shape, grid)
    codes, scale = expanded(x, grid, CODES)
    splines = 127 / basis_bound(x.double(), grid)
    silu = 127 / F.silu(x.double()).abs().amax(-1, keepdim=True).clamp(min=1e-5)
    torch.testing.assert_close(scale.double(), torch.cat([splines, silu], 1), atol=0, rtol=1e-6)
    assert torch.equal(codes, codes.round()) and float(codes.abs().max()) <= 127
    # A value may lie on the other side of a half.
    exact = torch.cat([basis(x.double(), grid).flatten(1) * splines, F.silu(x.double()) * silu], 1)
    assert float((codes - exact).abs().max()) < 0.5 + 1e-3
    widths = [x.shape[1] * grid.size, x.shape[1]]
    each = torch.cat([s.expand(-1, n) for s, n in zip(scale.split(1, 1), widths, strict=True)], 1)
    torch.testing.assert_close(expanded(x, grid, VALUES)[0], codes / each, atol=0, rtol=1e-6)


def layer(grid: Grid, dtype: torch.dtype, inputs: int, outputs: int, counts: tuple[int, ...]) -> list[Tensor]:
    x = rows((sum(counts), inputs), Grid(grid.low / 4, grid.high / 4, grid.intervals, grid.degree))
    x = x.clamp(grid.low - 2, grid.high + 2)
    weights = [torch.randn(len(counts), outputs, inputs * k) / inputs**0.5 for k in (1, grid.size)]
    return [t.to(dtype).requires_grad_() for t in (x, *weights)]


def passes(inputs: list[Tensor], counts: tuple[int, ...], grid: Grid, quantized: bool, eager: bool) -> list[Tensor]:
    x, base, spline = inputs
    out = (edge_layer_eager if eager else edge_layer)(x, base, spline, counts, grid, quantized)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, inputs, torch.randn(out.shape).to(out.dtype))]


@fused
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_layer_is_the_eager_one(
    grid: Grid, quantized: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = (9, 0, 14)
    inputs = layer(grid, dtype, 21, 7, counts)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    found = passes(inputs, counts, grid, quantized, False)
    eager, exact = passes(inputs, counts, grid, quantized, True), passes(wide, counts, grid, quantized, True)
    monkeypatch.setattr("kabrn_dist.ops.edge_layer.CHUNK", 21 * (grid.size + 1) * 4)
    chunked = passes(inputs, counts, grid, quantized, False)
    for mine, parts, theirs, true in zip(found, chunked, eager, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        # As near to float64 as the eager path is; in the ternary mode one code may differ.
        size = true.abs().max()
        slack = 1e-5 if dtype == torch.float32 else 1e-2
        allowed = 1.5 * (theirs - true).abs().max() + (slack + (0.02 if quantized else 0)) * size
        assert (mine - true).abs().max() <= allowed
        assert (parts - true).abs().max() <= allowed


@fused
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [PLAIN, CODES, VALUES])
def test_threads_have_no_say(form: int, dtype: torch.dtype) -> None:
    grid, before = GRIDS[3], torch.get_num_threads()
    x = rows((33, 37), grid, dtype)
    grad = torch.randn(33, 37 * (grid.size + 1)).to(dtype)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([*expanded(x, grid, form), kernel().gather(make_spline_spec(grid), x, grad, torch.ones(2))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@fused
def test_a_wrong_size_is_refused() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="is not the expansion of"):
        kernel().expand(make_spline_spec(GRIDS[3]), x, PLAIN, torch.empty(3, 4 * GRIDS[3].size))


@fused
def test_other_dtypes_take_the_eager_path() -> None:
    grid, counts = GRIDS[3], (5,)
    for dtype in (torch.float64, torch.float16):
        inputs = layer(grid, dtype, 6, 3, counts)
        pairs = zip(*(passes(inputs, counts, grid, True, eager) for eager in (True, False)), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
