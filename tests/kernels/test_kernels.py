"""C kernels: the same as torch's operations, whatever the shape and number of threads; built once, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.kernels.build import KernelUnavailable, load_library
from kabrn_dist.kernels.selection import ENV_SWITCH, Kernels, select_kernels
from kabrn_dist.model import bitlinear as bitlinear_module
from kabrn_dist.model.bitlinear import bitlinear, bitlinear_naive
from kabrn_dist.model.experts.base import ExpertSpec
from kabrn_dist.model.experts.chebyshev import ChebyshevExperts
from kabrn_dist.model.experts.grouped import GroupedExperts
from kabrn_dist.model.experts.rational import RationalExperts
from kabrn_dist.ops import weight_quant
from kabrn_dist.ops.activation import activate, activate_eager
from kabrn_dist.ops.activation_quant import Quantized, normalize_quantize, quantize, rms_norm
from kabrn_dist.ops.packing import pack_naive
from kabrn_dist.ops.weight_quant import ternarize

FORMS = {"rational": RationalExperts, "chebyshev": ChebyshevExperts}
COUNTS = [(5,), (70, 0, 200, 1), (0, 0), (0, 64, 0), (65, 63)]
DTYPES = [torch.float32, torch.bfloat16]
GROUPS = 4
ROOT = Path(__file__).parents[2]

Step = Callable[[Quantized, Tensor], Quantized]
Results = tuple[Tensor, Tensor, Tensor, Tensor]

pytestmark = pytest.mark.skipif(select_kernels("cpu").kernels is None, reason=select_kernels("cpu").reason)


@pytest.fixture
def kernels() -> Kernels:
    found = select_kernels("cpu").kernels
    assert found is not None
    return found


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make(form: str, experts: int, width: int) -> tuple[GroupedExperts, Tensor]:
    """Experts, and coefficients near the start that differ between experts and groups."""
    settings = ExpertsConfig(
        num_experts=experts, top_k=1, expert_hidden_size=width, function_groups=GROUPS, grid_range=(-1.5, 2.5)
    )
    made = FORMS[form](ExpertSpec(width, width, settings, range(experts)))
    made.initialize(0, "experts")
    coefficients = made.coefficients("outer").detach()
    return made, coefficients + torch.randn(coefficients.shape) * 0.05


def results(step: Step, x: Quantized, coefficients: Tensor, noise: Tensor) -> Results:
    """Codes, scale, and gradients of input and coefficients."""
    codes, coefficients = x.codes.clone().requires_grad_(), coefficients.clone().requires_grad_()
    out = step(Quantized(codes, x.scale), coefficients)
    found = torch.autograd.grad(out.codes, (codes, coefficients), noise.to(out.codes.dtype))
    return out.codes.detach(), out.scale, *found


def close(mine: Tensor, exact: Tensor, error: float) -> None:
    """Within `error` of the largest; nothing is close to NaN."""
    size = float(exact.abs().max()) if exact.numel() else 1.0
    torch.testing.assert_close(mine.double(), exact.double(), atol=error * size, rtol=0)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 20, 64, 72, 264])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("form", FORMS)
def test_activations_are_the_eager_ones(
    form: str, counts: tuple[int, ...], width: int, dtype: torch.dtype, quantized: bool
) -> None:
    torch.manual_seed(0)
    module, coefficients = make(form, len(counts), width)
    codes, scale, _ = quantize(torch.randn(sum(counts), width), quantized)
    # A scale for every row, as a product has, and zeros, where the denominator has its corner.
    x = Quantized(codes.to(dtype), scale * torch.rand(sum(counts), 1).add(0.5))
    noise = torch.randn(x.codes.shape).to(dtype)
    exact = Quantized(x.codes.double(), x.scale.double())
    mine = results(
        lambda x, c: activate(x, module.function, module.apply_eager, c, counts, quantized), x, coefficients, noise
    )
    theirs = results(
        lambda x, c: activate_eager(x, module.apply_eager, c, counts, quantized),
        exact,
        coefficients.double(),
        noise.double(),
    )
    rounding = torch.finfo(dtype).eps
    if quantized:
        apart = (mine[0].double() - theirs[0]).abs()
        # Another code only where the value lies between two.
        assert not apart.numel() or (float(apart.max()) <= 1 and float(apart.mean()) < 1e-3)
    else:
        close(mine[0], theirs[0], max(rounding, 2e-6))
    for found, expected, error in zip(mine[1:], theirs[1:], (2e-6, max(rounding, 5e-6), 5e-6), strict=True):
        close(found, expected, error)
    assert mine[0].dtype == mine[2].dtype == dtype and mine[1].dtype == mine[3].dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_far_inputs_are_finite_and_a_nan_stays_in_its_row(form: str) -> None:
    module, coefficients = make(form, 1, 64)
    sizes = torch.logspace(-3, 4, 32)
    rows = torch.cat([-sizes, sizes]).repeat(3, 1)
    rows[1] *= 1e-8
    for dtype in DTYPES:
        x = Quantized(rows.to(dtype), torch.ones(3, 1))
        found = results(
            lambda x, c: activate(x, module.function, module.apply_eager, c, (3,), True),
            x,
            coefficients,
            torch.ones(3, 64),
        )
        assert all(bool(part.isfinite().all()) for part in found)
    rows[1, 5] = torch.nan
    for dtype in DTYPES:
        x = Quantized(rows.to(dtype), torch.ones(3, 1))
        codes = activate(x, module.function, module.apply_eager, coefficients, (3,), True).codes
        assert bool(codes[1].isnan().all()) and bool(codes[[0, 2]].isfinite().all())


@pytest.mark.parametrize("form", FORMS)
def test_threads_change_nothing(form: str, two_threads: None) -> None:
    torch.manual_seed(0)
    counts = (300, 0, 77)
    module, coefficients = make(form, 3, 64)
    x, noise, latents = quantize(torch.randn(377, 64)), torch.randn(377, 64), torch.randn(3, 90, 91)
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        part = results(
            lambda x, c: activate(x, module.function, module.apply_eager, c, counts, True), x, coefficients, noise
        )
        kernels = select_kernels("cpu").kernels
        assert kernels is not None
        found.append([*part, *(each for each in ternarize(latents)[1:] if each is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_products_are_the_eager_ones(dtype: torch.dtype, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    counts = (40, 0, 9)
    x = quantize(torch.randn(49, 65).to(dtype), enabled)
    weight, noise = (torch.randn(3, 37, 65) * 0.1).to(dtype), torch.randn(49, 37).to(dtype)

    def run(multiply: Callable[..., Tensor]) -> list[Tensor]:
        codes, latents = x.codes.clone().requires_grad_(), weight.clone().requires_grad_()
        out = multiply(Quantized(codes, x.scale), latents, counts, enabled)
        return [out.detach(), *torch.autograd.grad(out, (codes, latents), noise)]

    mine = run(bitlinear)
    monkeypatch.setattr(bitlinear_module, "kernels_for", lambda x: None)
    monkeypatch.setattr(weight_quant, "kernels_for", lambda x: None)
    monkeypatch.setattr(bitlinear_module, "int8_matmul_is_faster", lambda *_: False)
    for found, eager in zip(mine, run(bitlinear), strict=True):
        close(found, eager, 4 * torch.finfo(dtype).eps)
        assert found.dtype == eager.dtype == dtype
    if dtype == torch.float64:
        for found, exact in zip(mine, run(bitlinear_naive), strict=True):
            close(found, exact, 1e-12)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 7, 65), (70, 33), (0, 5), (130, 256)])
def test_normalize_is_norm_then_quantizer(shape: tuple[int, ...], dtype: torch.dtype, enabled: bool) -> None:
    torch.manual_seed(0)
    x, noise = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype)
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    found, expected = normalize_quantize(mine, enabled), quantize(rms_norm(exact), enabled)
    assert found.codes.dtype == dtype and found.scale.shape == expected.scale.shape
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(found.scale.double(), expected.scale, rtol=1e-5, atol=0)
    apart = (found.codes.detach().double() - expected.codes.detach()).abs()
    if enabled:
        # Values of bf16 often lie midway between two codes, where the last bit of the norm decides.
        assert bool((apart <= 1).all()) and int((apart > 0).sum()) <= 1 + apart.numel() // 50
    else:
        close(found.codes.detach(), expected.codes.detach(), 8 * precision)
    for codes, noisy in ((found.codes, noise), (expected.codes, noise.double())):
        (codes * noisy).sum().backward()
    close(mine.grad, exact.grad, 32 * precision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 37, 65), (2, 80, 103)])
def test_ternary_codes_are_the_eager_ones(dtype: torch.dtype, shape: tuple[int, ...], kernels: Kernels) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    weight[0, 0, 0] = 300.0
    found = ternarize(weight)
    assert found.gamma is not None and found.packed is not None and found.int8_codes is not None
    wide = weight.double()
    gamma = wide.abs().mean((1, 2), keepdim=True)
    expected = (wide / gamma).round().clamp(-1, 1)
    torch.testing.assert_close(found.gamma.double(), gamma, atol=0, rtol=1e-7)
    assert torch.equal(found.int8_codes.double(), expected)
    assert torch.equal(found.packed, pack_naive(found.int8_codes))
    for wanted in (dtype, torch.int8, torch.float32):
        assert torch.equal(found.codes(wanted), found._replace(int8_codes=None).codes(wanted))
        assert found.codes(wanted).dtype == wanted and torch.equal(found.codes(wanted).double(), expected)
    nothing = ternarize(torch.zeros(shape, dtype=dtype))
    assert nothing.gamma is not None and not bool(nothing.codes(dtype).any()) and bool((nothing.gamma > 0).all())


@pytest.mark.parametrize("shape", [(0, 7), (1, 9000), (33, 17)])
def test_rows_are_scaled_and_rounded_as_torch_does(shape: tuple[int, int], kernels: Kernels) -> None:
    torch.manual_seed(0)
    x, factor = torch.randn(shape), torch.randn(shape[0], 1)
    x.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0]) if x.numel() else x.view(-1)
    for dtype in DTYPES:
        rounded = x.to(dtype)
        expected = (rounded * factor).to(dtype)
        torch.testing.assert_close(
            kernels.ternary.scale_rows(rounded, factor, dtype), expected, rtol=0, atol=0, equal_nan=True
        )


def test_counts_that_do_not_fit_are_refused() -> None:
    module, coefficients = make("rational", 2, 64)
    for counts in ((3, 3), (5,), (6, -1)):
        with pytest.raises(ValueError, match=str(list(counts))[1:-1]):
            activate(quantize(torch.randn(5, 64)), module.function, module.apply_eager, coefficients, counts, True)


def test_eager_torch_wherever_kernels_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decide = select_kernels.__wrapped__
    assert decide("cpu").kernels and decide("cpu").reason.startswith("fused C kernels")
    assert decide("cuda") == (None, "eager torch, because there is no kernel for cuda")
    monkeypatch.setenv(ENV_SWITCH, "off")
    assert decide("cpu") == (None, f"eager torch, because {ENV_SWITCH} is off")
    monkeypatch.delenv(ENV_SWITCH)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert decide("cpu").kernels is None and "Not a directory" in decide("cpu").reason
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert decide("cpu") == (None, "eager torch, because no C compiler was found")


def test_what_the_compiler_says_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wrong = tmp_path / "wrong.c"
    wrong.write_text("int f(void) { return nothing; }")
    with pytest.raises(KernelUnavailable, match=r"wrong\.c:1:.*nothing"):
        load_library(wrong)
    wrong.write_text("int missing(void); int f(void) { return missing(); }")
    with pytest.raises(KernelUnavailable, match="missing"):
        load_library(wrong).f()


def test_ranks_that_start_at_once_share_one_build(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from kabrn_dist.kernels.build import find_or_compile;"
        "print(find_or_compile(pathlib.Path(sys.argv[1])).read_bytes()[:4])"
    )
    source = ROOT / "kabrn_dist" / "kernels" / "ternary.c"
    command = [sys.executable, "-c", program, str(source)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == [str(b"\x7fELF")] * 3
    (built,) = (tmp_path / "kabrn_dist").iterdir()
    assert built.name.startswith("ternary-") and built.suffix == ".so"
