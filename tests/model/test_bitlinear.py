"""Ternary matrices and int8 inputs: the product by definition, exact integers, straight-through gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.report import kept_bytes
from kabrn_dist.model import bitlinear as bitlinear_module
from kabrn_dist.model.bitlinear import (
    BitLinear,
    bitlinear,
    bitlinear_naive,
    bitlinear_unscaled,
)
from kabrn_dist.ops.activation_quant import Quantized, normalize_quantize, quantize, rms_norm
from kabrn_dist.ops.grouped_mm import _common_count, grouped_mm, grouped_weight_grad
from kabrn_dist.ops.weight_quant import absmean_quantize, ternarize

INPUTS, OUTPUTS = 24, 10
COUNTS = [(5,), (0,), (1,), (3, 4), (0, 6), (6, 0), (2, 0, 3, 0), (0, 0, 7, 0, 0), (0, 0, 0)]


def draw(counts: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows for the counts and as many matrices, of unlike sizes so that each has a γ of its own."""
    torch.manual_seed(0)
    x = torch.randn(sum(counts), INPUTS, dtype=dtype)
    weight = torch.randn(len(counts), OUTPUTS, INPUTS, dtype=dtype)
    weight *= torch.arange(1, len(counts) + 1)[:, None, None]
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
def test_product_is_its_definition(counts: tuple[int, ...], enabled: bool) -> None:
    x, weight = draw(counts)
    noise = torch.randn(sum(counts), OUTPUTS, dtype=torch.float64)
    found, expected = (form(quantize(x, enabled), weight, counts, enabled) for form in (bitlinear, bitlinear_naive))
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    grads = [torch.autograd.grad((out * noise).sum(), (x, weight)) for out in (found, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)
    for matrix, n in zip(grads[0][1], counts, strict=True):
        assert bool(matrix.any()) == (n > 0)


@pytest.mark.parametrize("counts", [(7,), (4, 0, 3)])
def test_plain_product_passes_gradcheck(counts: tuple[int, ...]) -> None:
    x, weight = draw(counts)
    scale = torch.rand(len(x), 1, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda c, w: bitlinear(Quantized(c, scale), w, counts, False), (x, weight))


def integer_product(codes: Tensor, scale: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Accumulated in int64, scaled last."""
    signs, gamma = absmean_quantize(weight)
    parts = codes.to(torch.int64).split(list(counts))
    out = []
    for rows, s, matrix, g in zip(parts, scale.split(list(counts)), signs.to(torch.int64), gamma, strict=True):
        out.append((rows @ matrix.T).float() * (s.reciprocal() * g))
    return torch.cat(out)


@pytest.mark.parametrize("width", [1, 7, 64, 1000, 4096, 8192])
def test_fp32_product_is_an_integer_product(width: int) -> None:
    torch.manual_seed(width)
    counts = (5, 0, 3)
    weight = torch.randn(3, 12, width)
    x = quantize(torch.randn(8, width) * torch.logspace(-3, 3, 8)[:, None])
    assert torch.equal(bitlinear(x, weight, counts), integer_product(*x[:2], weight, counts))
    # The largest sums there are: all codes 127 or −128 and all weights of one sign.
    for code in (127.0, -128.0):
        extreme = Quantized(torch.full((8, width), code), torch.ones(8, 1))
        whole = torch.full((3, 12, width), 0.5)
        found = bitlinear(extreme, whole, counts)
        assert torch.equal(found, integer_product(*extreme[:2], whole, counts))
        assert torch.equal(found, torch.full((8, 12), code * width / 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [515, 516, 4096])
def test_half_precision_has_headroom(width: int, dtype: torch.dtype) -> None:
    # Raw, the sum 127·4096 is eight times fp16's largest number.
    codes = torch.full((3, width), 127.0, dtype=dtype).requires_grad_()
    weight = torch.full((2, 4, width), 1 / 64, dtype=dtype).requires_grad_()
    out = bitlinear(Quantized(codes, torch.full((3, 1), 127.0)), weight, (1, 2))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), torch.full((3, 4), width / 64).double(), atol=0, rtol=4e-3)
    out.sum().backward()
    torch.testing.assert_close(codes.grad, torch.full_like(codes, 4 / 64 / 127), atol=0, rtol=8e-3)
    expected = torch.tensor([1.0, 2.0])[:, None, None].expand(2, 4, width)
    torch.testing.assert_close(weight.grad.float(), expected, atol=0, rtol=8e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_int8_and_scales_absmax(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(50, 33) * torch.logspace(-2, 2, 50)[:, None]).to(dtype)
    codes, scale, _ = quantize(x)
    assert codes.dtype == dtype and codes.shape == x.shape and scale.shape == (50, 1)
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(codes, codes.round()) and float(codes.min()) >= -128 and float(codes.max()) <= 127
    # The largest of each row has the code 127: the range is used whole.
    assert bool((codes.abs().amax(-1) == 127).all())
    torch.testing.assert_close(scale, 127 / x.to(scale.dtype).abs().amax(-1, keepdim=True), atol=0, rtol=1e-6)
    error = (codes.to(scale.dtype) / scale - x.to(scale.dtype)).abs() * scale
    assert float(error.max()) < 0.5 + 1e-4


def test_straight_through_gradient_is_the_identity() -> None:
    torch.manual_seed(0)
    x = (torch.randn(6, 17, dtype=torch.float64) * 5).requires_grad_()
    noise = torch.randn(6, 17, dtype=torch.float64)
    codes, scale, _ = quantize(x)
    assert codes.requires_grad and not scale.requires_grad
    (grad,) = torch.autograd.grad((codes / scale * noise).sum(), x)
    torch.testing.assert_close(grad, noise, atol=0, rtol=1e-14)


def test_quantizers_off_pass_values_through() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.bfloat16)
    codes, scale, _ = quantize(x, 0.0)
    assert torch.equal(codes, x) and torch.equal(scale, torch.ones(3, 4, 1))
    x, weight = draw((4,), torch.float32)
    torch.testing.assert_close(bitlinear(quantize(x, False), weight, (4,), False), x @ weight[0].T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 8, dtype=dtype)
    x[1] = 1
    x.requires_grad_()
    codes, scale, _ = quantize(rms_norm(x))
    assert not bool(codes[[0, 2]].any()) and bool((codes[1] == 127).all()) and bool(scale.isfinite().all())
    weight = torch.randn(1, 4, 8, dtype=dtype).requires_grad_()
    out = bitlinear(Quantized(codes, scale), weight, (3,))
    assert not bool(out[[0, 2]].any())
    out.sum().backward()
    assert bool(x.grad.isfinite().all()) and bool(weight.grad.isfinite().all())


def test_ternary_has_a_scale_for_each_expert() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 20, 30, dtype=torch.float64) * torch.tensor([0.01, 1.0, 50.0])[:, None, None]
    codes, gamma = absmean_quantize(weight)
    for expert in range(3):
        mean = weight[expert].abs().mean()
        torch.testing.assert_close(gamma[expert].squeeze(), mean, atol=0, rtol=1e-14)
        assert torch.equal(codes[expert], (weight[expert] / mean).round().clamp(-1, 1))
        alone, its_gamma = absmean_quantize(weight[expert : expert + 1])
        assert torch.equal(alone[0], codes[expert]) and torch.equal(its_gamma[0], gamma[expert])
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    # A Gaussian's share of zeros, P(|w| < γ/2).
    assert abs(float((codes == 0).double().mean()) - 0.31) < 0.03


def test_ternary_of_zeros_and_of_half_precision() -> None:
    codes, gamma = absmean_quantize(torch.zeros(2, 3, 4))
    assert not bool(codes.any()) and bool((gamma > 0).all())
    codes, gamma = absmean_quantize(torch.randn(2, 3, 4, dtype=torch.bfloat16))
    assert codes.dtype == gamma.dtype == torch.float32


@pytest.mark.parametrize("gain", [1.0, 0.25])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("width", [128, 512])
def test_outputs_start_at_the_stated_deviation(width: int, enabled: bool, gain: float) -> None:
    layer = BitLinear(width, width, gain, enabled)
    layer.initialize(1, "layer")
    torch.manual_seed(0)
    with torch.no_grad():
        out = layer(quantize(torch.randn(2000, width), enabled))
    assert abs(float(out.std()) / gain - 1) < 0.05


def test_layer_keeps_leading_dimensions_and_draws_by_name() -> None:
    layers = [BitLinear(8, 6) for _ in range(3)]
    for layer, (seed, name) in zip(layers, [(1, "a"), (1, "a"), (1, "b")], strict=True):
        layer.initialize(seed, name)
    a, same, other = (layer.weight for layer in layers)
    assert torch.equal(a, same) and not torch.equal(a, other)
    x = torch.randn(2, 3, 5, 8)
    out = layers[0](quantize(x))
    rows = layers[0](quantize(x.flatten(0, 2)))
    assert out.shape == (2, 3, 5, 6) and torch.equal(out.flatten(0, 2), rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 4, 10, 64])
@pytest.mark.parametrize("counts", [(5,), (3, 0, 4)])
def test_groups_of_scales_are_their_definition(counts: tuple[int, ...], group: int, dtype: torch.dtype) -> None:
    x, weight = draw(counts)
    with torch.no_grad():
        weight *= torch.linspace(0.2, 3, OUTPUTS, dtype=torch.float64)[:, None]
    noise = torch.randn(sum(counts), OUTPUTS, dtype=torch.float64)
    exact_weight = weight.detach().to(dtype).double().requires_grad_()
    rows = [w.split(group) for w in exact_weight]
    gamma = torch.stack([torch.cat([p.detach().abs().mean().expand(len(p), 1) for p in parts]) for parts in rows])
    used = exact_weight + ((exact_weight / gamma).round().clamp(-1, 1) * gamma - exact_weight).detach()
    mine, its = x.detach().to(dtype).requires_grad_(), x.detach().to(dtype).double().requires_grad_()
    small = weight.detach().to(dtype).requires_grad_()
    read, exact = quantize(mine), quantize(its)
    values = (exact.codes / exact.scale).split(list(counts))
    expected = torch.cat([part @ matrix.T for part, matrix in zip(values, used, strict=True)])
    wanted = torch.autograd.grad((expected * noise).sum(), (its, exact_weight))
    for unscaled in (False, True):
        product = bitlinear_unscaled(read, ternarize(small, 1.0, group), counts)
        found = product.codes / product.scale if unscaled else bitlinear(read, ternarize(small, 1.0, group), counts)
        grads = torch.autograd.grad((found * noise.to(found.dtype)).sum(), (mine, small), retain_graph=True)
        error = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        for one, other in zip((found, *grads), (expected, *wanted), strict=True):
            torch.testing.assert_close(one.double(), other, atol=error * float(other.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_between_plain_and_quantized(share: float) -> None:
    counts = (4, 3)
    x, weight = draw(counts)
    noise = torch.randn(7, OUTPUTS, dtype=torch.float64)
    whole = quantize(x)
    blended = x + share * (whole.codes / whole.scale - x).detach()
    codes, gamma = absmean_quantize(weight)
    used = weight + share * (codes * gamma - weight).detach()
    expected = torch.cat([part @ matrix.T for part, matrix in zip(blended.split([4, 3]), used, strict=True)])
    read = quantize(x, share)
    assert read.int8_codes is None and bool((read.scale == 1).all())
    found = bitlinear(read, weight, counts, share)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    grads = [torch.autograd.grad((out * noise).sum(), (x, weight)) for out in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    for dtype in (torch.float32, torch.bfloat16):
        near = normalize_quantize(x.detach().to(dtype), share)
        assert near.codes.dtype == dtype and near.int8_codes is None
        exact = rms_norm(x.detach())
        coded = quantize(exact)
        wanted = exact + share * (coded.codes / coded.scale - exact)
        torch.testing.assert_close(near.codes.double(), wanted, atol=0.03 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_and_fp32_products_are_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    counts = (33, 0, 20)
    x, weight = quantize(torch.randn(53, 96).to(dtype)), torch.randn(3, 48, 96).to(dtype)
    found = []
    for fast in (True, False):
        monkeypatch.setattr(bitlinear_module, "int8_matmul_is_faster", lambda *_, fast=fast: fast)
        product = bitlinear_unscaled(x, weight, counts)
        found.append([bitlinear(x, weight, counts), *product[:2]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    # Within one rounding of the exact result.
    exact = integer_product(x.codes.double(), x.scale.double(), weight.double(), counts)
    spacing = torch.finfo(dtype).eps * exact.abs()
    assert bool(
        ((found[0][0].double() - exact).abs() <= spacing * (0.51 if dtype != torch.float32 else 2) + 1e-30).all()
    )


def test_a_row_that_is_not_finite_stays_so() -> None:
    x = torch.randn(4, 32)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    weight = torch.randn(1, 8, 32)
    for dtype in (torch.float32, torch.bfloat16):
        out = bitlinear(normalize_quantize(x.to(dtype)), weight.to(dtype), (4,))
        assert not bool(out[[1, 2]].isfinite().any()) and bool(out[[0, 3]].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_keeps_little_for_backward(dtype: torch.dtype) -> None:
    """Norm, quantiser and four readers, six times, beside the fake-quantised form that quantises plain tensors."""
    torch.manual_seed(0)
    width = 256
    layers = [BitLinear(width, width) for _ in range(24)]
    for number, layer in enumerate(layers):
        layer.initialize(0, str(number))
        layer.to(dtype)
    x = torch.randn(512, width).to(dtype).requires_grad_()

    def ours() -> Tensor:
        y = x
        for step in range(6):
            read = normalize_quantize(y)
            y = sum(layer(read) for layer in layers[4 * step : 4 * step + 4]) * 0.5
        return y

    def fake() -> Tensor:
        y = x
        for step in range(6):
            values = F.rms_norm(y, (width,))
            scale = 127 / values.abs().amax(-1, keepdim=True).clamp(min=1e-5)
            read = values + ((values * scale).round().clamp(-128, 127) / scale - values).detach()
            total = torch.zeros_like(y)
            for layer in layers[4 * step : 4 * step + 4]:
                gamma = layer.weight.abs().mean().clamp(min=1e-5)
                used = layer.weight + ((layer.weight / gamma).round().clamp(-1, 1) * gamma - layer.weight).detach()
                total = total + read @ used.T
            y = total * 0.5
        return y

    assert kept_bytes(ours) <= 0.6 * kept_bytes(fake)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["ternary", "groups", "unscaled", "plain"])
def test_half_precision_gradients_are_the_exact_ones_rounded(
    form: str, dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiplied in fp32, they are rounded once; in half precision, at each operation."""
    monkeypatch.setattr(bitlinear_module, "matmul_dtype", lambda _, own: torch.float32 if wide else own)
    torch.manual_seed(0)
    counts, share = (33, 0, 20), float(form != "plain")
    x, latents = quantize(torch.randn(53, 96).to(dtype), bool(share)), (torch.randn(3, 48, 96) * 0.1).to(dtype)
    noise = torch.randn(53, 48).to(dtype)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        codes, leaf = x.codes.to(dtype).requires_grad_(), latents.to(dtype).requires_grad_()
        rows = Quantized(codes, x.scale.to(torch.promote_types(dtype, torch.float32)), None)
        weight = ternarize(leaf, share, 10 if form == "groups" else None)
        if form == "unscaled":
            product, scale, *_ = bitlinear_unscaled(rows, weight, counts)
            out = product / scale
        else:
            out = bitlinear(rows, weight, counts)
        return torch.autograd.grad(out, (codes, leaf), noise.to(out.dtype))

    eps = torch.finfo(dtype).eps
    for found, exact in zip(gradients(dtype), gradients(torch.float64), strict=True):
        assert found.dtype == dtype
        apart = float((found.double() - exact).norm() / exact.norm())
        assert apart <= eps * (0.35 if wide and form != "unscaled" else 1), f"{apart / eps:.2f} of a rounding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [(1, 0, 31), (32, 33, 0, 700), (0, 0, 5), (1100, 3, 515), (64, 64)])
def test_grouped_products_are_those_of_each_matrix(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whatever number of rows is really multiplied, also beside rows that are not finite."""
    generator = torch.Generator().manual_seed(sum(counts))
    rows, grads = (torch.randn(sum(counts), width, generator=generator).to(dtype) for width in (24, 17))
    weight = torch.randn(len(counts), 17, 24, generator=generator).to(dtype)
    last = sum(counts) - counts[-1]
    rows[last:], grads[last:] = float("nan"), float("inf")
    found, matrices = grouped_mm(rows, weight, counts), grouped_weight_grad(grads, rows, counts)
    assert found.dtype == matrices.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    start = 0
    for i, n in enumerate(counts[:-1]):
        part, grad = rows[start : start + n].double(), grads[start : start + n].double()
        expected = part @ weight[i].double().T
        torch.testing.assert_close(found[start : start + n].double(), expected, rtol=tolerance, atol=tolerance)
        outer = grad.T @ part
        atol = tolerance * max(float(outer.abs().max()), 1)
        torch.testing.assert_close(matrices[i].double(), outer, rtol=tolerance, atol=atol)
        start += n
    assert found[start:].isnan().all() and (not counts[-1] or matrices[-1].isnan().all())


def test_experts_ask_for_few_numbers_of_rows_in_half_precision() -> None:
    """A new one costs a compilation: see `_common_count`."""
    half, wide = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)
    counts = [_common_count(n, half) for n in range(1, 16385)]
    assert all(n <= count <= max(n + 31, 1.07 * n) for n, count in enumerate(counts, 1))
    assert len(set(counts)) <= 120
    assert [_common_count(n, wide) for n in (1, 33, 999)] == [1, 33, 999]
