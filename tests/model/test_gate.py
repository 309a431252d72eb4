"""SwiGLU's gate and squared ReLU, fused: the same as step by step in float64, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.kernels.selection import select_kernels
from kabrn_dist.model.bitlinear import bitlinear
from kabrn_dist.model.experts.base import ExpertSpec
from kabrn_dist.model.experts.mlp import RELU2, Relu2Experts, SwigluExperts, square
from kabrn_dist.ops import activation, gate
from kabrn_dist.ops.activation import activate, activate_eager
from kabrn_dist.ops.activation_quant import Quantized, normalize_quantize, quantize, rms_norm
from kabrn_dist.ops.gate import gated, gated_eager

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (7, 15), (33, 16), (5, 50), (129, 264), (0, 8)]

fused = pytest.mark.skipif(select_kernels("cpu").kernels is None, reason=select_kernels("cpu").reason)

Layer = Callable[..., Quantized]


def squared(x: Quantized, quantized: bool) -> Quantized:
    return activate(x, RELU2, square, x.scale.new_empty(1, 1, 0), (len(x.codes),), quantized)


def squared_eager(x: Quantized, quantized: bool) -> Quantized:
    return activate_eager(x, square, x.scale.new_empty(1, 1, 0), (len(x.codes),), quantized)


# name → (as it is used, step by step, inputs)
LAYERS: dict[str, tuple[Layer, Layer, int]] = {
    "swiglu": (gated, gated_eager, 2),
    "relu2": (squared, squared_eager, 1),
}


def draw(shape: tuple[int, int], inputs: int, dtype: torch.dtype, size: float = 1.0) -> list[Quantized]:
    """Products with a scale for every row; the middle row is zero."""
    torch.manual_seed(0)
    found = []
    for _ in range(inputs):
        codes, scale = torch.randn(shape) * 40, torch.rand(shape[0], 1) * 40 + 20
        codes[shape[0] // 2 : shape[0] // 2 + 1] = 0
        found.append(Quantized((codes * size).to(dtype), scale))
    return found


def results(layer: Layer, inputs: list[Quantized], quantized: bool, noise: Tensor) -> list[Tensor]:
    """Codes, scale, and the gradient of each input's codes."""
    codes = [x.codes.clone().requires_grad_() for x in inputs]
    out = layer(*(Quantized(c, x.scale) for c, x in zip(codes, inputs, strict=True)), quantized)
    return [out.codes.detach(), out.scale, *torch.autograd.grad(out.codes, codes, noise.to(out.codes.dtype))]


def close(mine: Tensor, exact: Tensor, error: float) -> None:
    """Within `error` of the largest of its row; nothing is close to NaN."""
    size = exact.abs().amax(-1, keepdim=True) if exact.numel() else exact
    assert bool(((mine.double() - exact).abs() <= error * size + 1e-30).all())


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_ones_of_float64(name: str, shape: tuple[int, int], dtype: torch.dtype, quantized: bool) -> None:
    layer, eager, number = LAYERS[name]
    inputs, noise = draw(shape, number, dtype), torch.randn(shape).to(dtype)
    exact = [Quantized(x.codes.double(), x.scale.double()) for x in inputs]
    mine = results(layer, inputs, quantized, noise)
    theirs = results(eager, exact, quantized, noise.double())
    in_fp32 = dtype in DTYPES and (name == "swiglu" or select_kernels("cpu").kernels is not None)
    rounding = max(torch.finfo(dtype).eps, 2e-6)
    slack = 2 if in_fp32 else 8  # the eager squares are rounded to their dtype
    if quantized:
        apart = (mine[0].double() - theirs[0]).abs()
        most, mean = (1, max(1e-3, 2 * rounding)) if in_fp32 else (3, 40 * rounding)
        assert not apart.numel() or (float(apart.max()) <= most and float(apart.mean()) < mean)
    else:
        close(mine[0], theirs[0], slack * rounding)
    close(mine[1], theirs[1], 3e-6 if in_fp32 else slack * rounding)
    for found, expected in zip(mine[2:], theirs[2:], strict=True):
        close(found, expected, 2 * slack * rounding)
        assert found.dtype == mine[0].dtype == dtype


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_small_rows_are_not_lost_in_the_norms_epsilon(name: str, quantized: bool) -> None:
    layer, eager, number = LAYERS[name]
    inputs, noise = draw((9, 40), number, torch.float32, 2e-3), torch.randn(9, 40)
    exact = [Quantized(x.codes.double(), x.scale.double()) for x in inputs]
    mine, theirs = results(layer, inputs, quantized, noise), results(eager, exact, quantized, noise.double())
    for found, expected in zip(mine[1:], theirs[1:], strict=True):
        close(found, expected, 5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_huge_inputs_are_finite_and_a_nan_stays_in_its_row(name: str, dtype: torch.dtype) -> None:
    layer, _, number = LAYERS[name]
    sizes = torch.logspace(-3, 4, 25)
    rows = torch.cat([-sizes, sizes]).repeat(3, 1)
    inputs = [Quantized((rows * sign).to(dtype), torch.ones(3, 1)) for sign in (1, -1)[:number]]
    for quantized in (True, False):
        found = results(layer, inputs, quantized, torch.ones(3, 50))
        assert all(bool(part.isfinite().all()) for part in found)
    inputs[-1].codes[1, 7] = torch.nan
    codes = layer(*inputs, True).codes
    assert bool(codes[1].isnan().all()) and bool(codes[[0, 2]].isfinite().all())


@fused
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_threads_change_nothing(name: str, dtype: torch.dtype) -> None:
    layer, _, number = LAYERS[name]
    inputs, noise, before = draw((201, 70), number, dtype), torch.randn(201, 70), torch.get_num_threads()
    found = []
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            found.append(results(layer, inputs, True, noise))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@fused
def test_exponentials_are_right_over_the_whole_range() -> None:
    kernels = select_kernels("cpu").kernels
    assert kernels is not None
    x = torch.cat([torch.linspace(-87, 87, 400_001), torch.logspace(-40, 1, 999), -torch.logspace(-40, 1, 999)])
    exact = x.double().exp()
    assert float(((kernels.gate.exp(x).double() - exact) / exact).abs().max()) < 3e-7
    far = kernels.gate.exp(torch.tensor([-torch.inf, -3e38, 3e38, torch.inf, torch.nan]))
    ends = torch.tensor([-87.0, -87.0, 87.0, 87.0]).exp()
    torch.testing.assert_close(far[:4], ends, rtol=1e-6, atol=0)
    assert bool(far[4].isnan())


@fused
def test_shapes_that_do_not_fit_are_refused() -> None:
    gate, up = (Quantized(torch.ones(n, 8), torch.ones(n, 1)) for n in (3, 2))
    with pytest.raises(ValueError, match=r"\[3, 8\].*\[2, 8\]"):
        gated(gate, up, True)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("form", [SwigluExperts, Relu2Experts])
def test_experts_are_their_formula(
    form: type[SwigluExperts | Relu2Experts],
    dtype: torch.dtype,
    quantized: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts, width, hidden = (7, 0, 30), 24, 40
    config = ExpertsConfig(num_experts=3, top_k=1, expert_hidden_size=hidden)
    experts = form(ExpertSpec(width, hidden, config, range(3), quantized))
    experts.initialize(0, "experts")
    experts.to(dtype)
    codes, scale, _ = quantize(torch.randn(37, width).to(dtype), quantized)

    def formula(x: Quantized) -> Tensor:
        if isinstance(experts, SwigluExperts):
            gate, up = (bitlinear(x, weight, counts, quantized) for weight in (experts.gate, experts.up))
            values = F.silu(gate) * up
        else:
            values = F.relu(rms_norm(bitlinear(x, experts.up, counts, quantized))).square()
        return bitlinear(normalize_quantize(values, quantized), experts.down, counts, quantized)

    def run(forward: Callable[[Quantized], Tensor]) -> list[Tensor]:
        leaf = codes.clone().requires_grad_()
        out = forward(Quantized(leaf, scale))
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *experts.parameters()])]

    mine, theirs = run(lambda x: experts(x, counts)), run(formula)
    for module in (activation, gate):
        monkeypatch.setattr(module, "kernels_for", lambda x: None)
    eager = run(lambda x: experts(x, counts))
    for found in (mine, eager):
        for one, other in zip(found, theirs, strict=True):
            # Roundings of half-precision steps flip a code here and there.
            error = {torch.float32: 2e-5 if not quantized else 1e-2}.get(dtype, 0.05)
            assert one.dtype == other.dtype == dtype
            assert float((one - other).double().norm()) <= error * float(other.double().norm())
