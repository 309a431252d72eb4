"""Low-rank factors beside matrices, and initial states of retention, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kabrn_dist.model.bitlinear import bitlinear, bitlinear_naive, bitlinear_unscaled
from kabrn_dist.ops.activation_quant import Quantized, quantize
from kabrn_dist.ops.edge_layer import edge_layer, edge_layer_naive
from kabrn_dist.ops.edge_low_rank import add_edge_low_ranks, edge_low_rank_naive
from kabrn_dist.ops.grids import Grid
from kabrn_dist.ops.low_rank import LowRank, add_low_rank, join_low_ranks, low_rank_product, low_rank_product_naive
from kabrn_dist.ops.retention import retention_chunk, retention_recurrent, retention_step
from kabrn_dist.ops.retention_initial import add_initial_state, decay_since_start, retention_initial_naive
from kabrn_dist.ops.weight_quant import TernaryMatrices, ternarize

INPUTS, OUTPUTS, RANK = 13, 7, 3
COUNTS = [(6,), (2, 0, 3, 1), (0, 0)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


def factors(matrices: int, inputs: int = INPUTS, seed: int = 1, rank: int = RANK) -> LowRank:
    return LowRank(draw(matrices, rank, inputs, seed=seed), draw(matrices, OUTPUTS, rank, seed=seed + 1))


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = draw(*out.shape, seed=9, dtype=out.dtype)
    return torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("quantized", [True, False])
def test_product_is_its_definition(counts: tuple[int, ...], quantized: bool) -> None:
    results = []
    for form in (low_rank_product, low_rank_product_naive):
        x, a, b = leaves(draw(sum(counts), INPUTS), *factors(len(counts)))
        out = form(quantize(x, quantized), LowRank(a, b), counts)
        results.append([out, *gradients(out, (x, a, b))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("group", [None, 3])
def test_ternary_products_add_it(counts: tuple[int, ...], quantized: bool, scaled: bool, group: int | None) -> None:
    """With scales of groups too, and where the scaling is left to the reader."""
    results = []
    for fast in (True, False):
        x, weight, a, b = leaves(
            draw(sum(counts), INPUTS), draw(len(counts), OUTPUTS, INPUTS, seed=4), *factors(len(counts))
        )
        rows, low_rank = quantize(x, quantized), LowRank(a, b)
        matrices = ternarize(weight, quantized, group)
        if not fast:
            alone = bitlinear(rows, matrices, counts)
            out = alone + low_rank_product_naive(rows, low_rank, counts)
            if group is None:
                torch.testing.assert_close(alone, bitlinear_naive(rows, weight, counts, quantized))
        elif scaled:
            out = bitlinear(rows, matrices._replace(low_rank=low_rank), counts)
        else:
            codes, scale, _ = bitlinear_unscaled(rows, matrices._replace(low_rank=low_rank), counts)
            out = codes / scale
        results.append([out, *gradients(out, (x, weight, a, b))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_sum_and_keeps_the_factors_in_fp32(dtype: torch.dtype) -> None:
    x, weight = draw(5, 300, dtype=torch.float32), draw(2, OUTPUTS, 300, seed=4, dtype=torch.float32)
    low_rank = LowRank(*(part.float().requires_grad_() for part in factors(2, 300)))
    out = {}
    for each in (dtype, torch.float32):
        rows = quantize(x.to(dtype).to(each).requires_grad_())
        found = bitlinear_unscaled(rows, ternarize(weight)._replace(low_rank=low_rank), (2, 3))
        assert found.codes.dtype == each
        out[each] = found.codes.float() / found.scale
        gradients(out[each], tuple(low_rank))
    torch.testing.assert_close(out[dtype], out[torch.float32], rtol=2e-2, atol=0.2)


def test_without_factors_nothing_is_computed_and_joined_factors_are_the_sum() -> None:
    rows, parts = quantize(draw(6, INPUTS)), [factors(2), factors(2, seed=5, rank=1)]
    joined = join_low_ranks(parts)
    assert joined.a.shape == (2, RANK + 1, INPUTS) and joined.b.shape == (2, OUTPUTS, RANK + 1)
    found = low_rank_product(rows, joined, (2, 4))
    torch.testing.assert_close(found, sum(low_rank_product(rows, part, (2, 4)) for part in parts))
    out, x, one = draw(5, OUTPUTS), draw(5, INPUTS), factors(1)
    assert add_low_rank(out, x, None) is out
    torch.testing.assert_close(add_low_rank(out, x, one), out + x @ (one.b[0] @ one.a[0]).T)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_edge_layers_add_it(counts: tuple[int, ...], quantized: bool, degree: int, which: tuple[bool, bool]) -> None:
    grid = Grid(-1.5, 1.5, 3, degree)
    shapes = (len(counts), OUTPUTS, INPUTS), (len(counts), OUTPUTS, INPUTS * grid.size)
    results = []
    for fast in (True, False):
        # Some inputs lie outside the grid.
        weights = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes, 3)]
        low = [factors(len(counts), shape[2], seed) for seed, shape in enumerate(shapes, 5)]
        low = [part if used else LowRank(part.a * 0, part.b) for part, used in zip(low, which, strict=True)]
        x, base, spline, *four = leaves(draw(sum(counts), INPUTS), *weights, *low[0], *low[1])
        pair = LowRank(*four[:2]), LowRank(*four[2:])
        if fast:
            matrices = [
                ternarize(weight, quantized)._replace(low_rank=part if used else None)
                for weight, part, used in zip((base, spline), pair, which, strict=True)
            ]
            out = edge_layer(x, *matrices, counts, grid)
            out = add_edge_low_ranks(out, x, *matrices, counts, grid)
        else:
            out = edge_layer_naive(x, base, spline, counts, grid, quantized)
            out = out + edge_low_rank_naive(x, *pair, counts, grid, quantized)
        chosen = [part for low_rank, used in zip(pair, which, strict=True) if used for part in low_rank]
        results.append([out, *gradients(out, (x, *chosen))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edge_layers_learn_nothing_where_their_matrices_are_frozen(dtype: torch.dtype) -> None:
    grid = Grid(-1.5, 1.5, 3, 2)
    base, spline = (draw(2, OUTPUTS, inputs, dtype=torch.float32).to(dtype) for inputs in (INPUTS, INPUTS * grid.size))
    found = []
    for trained in (True, False):
        x = draw(5, INPUTS, dtype=torch.float32).to(dtype).requires_grad_()
        matrices = [ternarize(weight.clone().requires_grad_(trained)) for weight in (base, spline)]
        edge_layer(x, *matrices, (3, 2), grid).float().square().sum().backward()
        found.append(x.grad)
    assert isinstance(found[0], Tensor) and torch.equal(found[0], found[1])


def retention_inputs(time: int = 23) -> tuple[Tensor, ...]:
    q, k, v = draw(2, 3, time, 4), draw(2, 3, time, 4, seed=1), draw(2, 3, time, 5, seed=2)
    return q, k, v, draw(3, 4, 5, seed=3)


def packed(time: int) -> tuple[Tensor, Tensor, Tensor]:
    """Documents, positions and starts of two rows; documents of one token are among them."""
    starts = torch.zeros(2, time, dtype=torch.bool)
    starts[:, 0] = True
    starts[0, [7, 8, 17]] = True
    starts[1, 5] = True
    places = torch.arange(time).expand(2, time)
    return starts.cumsum(1) - 1, places - torch.where(starts, places, 0).cummax(1).values, starts


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_initial_state_of_packed_documents_is_its_definition(chunk: int) -> None:
    decay = torch.tensor([0.5, 0.9, 1 - 2**-9], dtype=torch.float64).log()
    documents, positions, starts = packed(23)
    results = []
    for fast in (True, False):
        q, k, v, initial = inputs = leaves(*retention_inputs())
        if fast:
            out, _ = retention_chunk(q, k, v, decay, documents, None, chunk)
            out = add_initial_state(out, q, decay, initial, positions)
        else:
            out, _ = retention_initial_naive(q, k, v, decay, starts, initial)
        results.append([out, *gradients(out, inputs)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_initial_state_in_decoding_is_its_definition() -> None:
    decay = torch.tensor([0.5, 0.9, 1 - 2**-9]).log()
    _, _, starts = packed(23)
    q, k, v, initial = (part.float() for part in retention_inputs())
    wanted, last = retention_initial_naive(q, k, v, decay, starts, initial)
    out, state = retention_recurrent(q, k, v, decay, starts, None, initial)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(state, last)
    state = torch.zeros_like(state)
    for t in range(23):
        step, state = retention_step(q[:, :, t], k[:, :, t], v[:, :, t], decay, state, starts[:, t], initial)
        torch.testing.assert_close(step, wanted[:, :, t])
    torch.testing.assert_close(state, last)


def test_what_is_left_of_an_initial_state_is_exact_far_in() -> None:
    decay = torch.tensor([1 - 2.0**-9]).log().double()
    left = decay_since_start(decay, torch.tensor([[0, 999, 10**6]]))
    torch.testing.assert_close(
        left, (decay * torch.tensor([1, 1000, 10**6 + 1.0])).exp()[None, None], rtol=1e-12, atol=0
    )


def test_products_that_have_no_factors_are_the_same_object() -> None:
    x, grid = draw(4, INPUTS), Grid(-1.0, 1.0, 2, 1)
    out, matrices = draw(4, OUTPUTS), TernaryMatrices(draw(1, OUTPUTS, INPUTS))
    assert add_edge_low_ranks(out, x, matrices, matrices, (4,), grid) is out
    assert bitlinear_unscaled(Quantized(x, x.new_ones(4, 1)), matrices, (4,)).codes.shape == (4, OUTPUTS)
