"""KAN experts: the rational function by its formula, sane everywhere, and experts that do not see each other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.experts.base import Experts, ExpertSpec
from kabrn_dist.model.experts.rational import IDENTITY_COEFFICIENTS, SWISH, rational, rational_naive
from kabrn_dist.model.experts.registry import EXPERT_TYPES
from kabrn_dist.ops.activation_quant import Quantized, quantize, rms_norm

WIDTH, HIDDEN, GROUPS = 12, 16, 4
COUNTS = [(6,), (0,), (2, 0, 3, 1, 0), (0, 0, 5, 0, 0), (0, 0, 0, 0, 0), (3, 4, 2, 1, 2)]
SETTINGS = ExpertsConfig(num_experts=1, top_k=1, expert_hidden_size=HIDDEN, function_groups=GROUPS)


def draw(counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    experts = len(counts)
    shapes = [(sum(counts), WIDTH), (experts, GROUPS, 6), (experts, GROUPS, 4)]
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x, a, b


@pytest.mark.parametrize("counts", COUNTS)
def test_rational_is_its_formula(counts: tuple[int, ...]) -> None:
    inputs = draw(counts)
    found, expected = rational(*inputs, counts), rational_naive(*inputs, counts)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    noise = torch.randn_like(found)
    grads = [torch.autograd.grad((out * noise).sum(), inputs) for out in (found, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("counts", [(4,), (2, 0, 1, 0, 2)])
def test_rational_passes_gradcheck(counts: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(lambda *inputs: rational(*inputs, counts), draw(counts))


def test_rational_takes_any_memory_layout() -> None:
    x, a, b = draw((6,))
    expected = rational(x, a, b, (6,))
    noise = torch.randn(WIDTH, 6, dtype=torch.float64)
    grad = torch.autograd.grad((expected.T * noise).sum(), (x, a, b))
    turned = x.detach().T.contiguous().T.requires_grad_()
    out = rational(turned, a, b, (6,))
    assert not turned.is_contiguous() and torch.equal(out, expected)
    again = torch.autograd.grad((out.T.contiguous() * noise).sum(), (turned, a, b))
    for mine, theirs in zip(again, grad, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def start(which: tuple[tuple[float, ...], tuple[float, ...]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One expert's and one group's coefficients at the start."""
    a, b = (torch.tensor(part, dtype=dtype)[None, None].requires_grad_() for part in which)
    return a, b


def column(values: Tensor) -> Tensor:
    return values[:, None].clone().requires_grad_()


def test_identity_start() -> None:
    x = column(torch.cat([torch.linspace(-6, 6, 1001), torch.tensor([-1e4, -100.0, 100.0, 1e4])]))
    a, b = start(IDENTITY_COEFFICIENTS, torch.float32)
    out = rational(x, a, b, (len(x),))
    torch.testing.assert_close(out, x, atol=1e-6, rtol=1e-6)
    (out[:1001] * torch.linspace(0, 1, 1001)[:, None]).sum().backward()
    # At b = 0 the denominator would have no slope and would never train.
    assert bool((b.grad.abs() > 1e-3).all()) and bool((a.grad.abs() > 1e-3).all())
    torch.testing.assert_close(x.grad[:1001, 0], torch.linspace(0, 1, 1001), atol=1e-5, rtol=1e-5)


def test_swish_start() -> None:
    a, b = start(SWISH, torch.float64)
    for reach, error in ((3, 2e-4), (8, 6e-3)):
        near = torch.linspace(-reach, reach, 2001, dtype=torch.float64)[:, None]
        assert float((rational(near, a, b, (2001,)) - F.silu(near)).detach().abs().max()) < error
    sizes = torch.logspace(-2, 4, 2000, dtype=torch.float64)[:, None]
    up, down = rational(sizes, a, b, (2000,)), rational(-sizes, a, b, (2000,))
    # Swish's sign, and between 0 and the identity in size, as far as activations ever go.
    assert bool((up >= 0.4 * sizes).all()) and bool((up <= 1.01 * sizes).all())
    assert bool((down < 0).all()) and bool((down >= -0.5 * sizes).all())
    slope = torch.autograd.grad(rational(x := column(torch.cat([-sizes, sizes])[:, 0]), a, b, (4000,)).sum(), x)[0]
    assert float(slope.abs().max()) < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", [IDENTITY_COEFFICIENTS, SWISH], ids=["identity", "swish"])
def test_starts_are_finite_far_out(which: tuple[tuple[float, ...], tuple[float, ...]], dtype: torch.dtype) -> None:
    sizes = torch.cat([torch.zeros(1), torch.logspace(-3, 4, 500)])
    x = column(torch.cat([-sizes, sizes]).to(dtype))
    a, b = start(which, torch.float32)
    out = rational(x, a, b, (len(x),))
    assert out.dtype == dtype and bool(out.isfinite().all())
    out.float().mean().backward()
    assert all(bool(t.grad.isfinite().all()) for t in (x, a, b))
    exact = rational(x.detach().double(), a.detach().double(), b.detach().double(), (len(x),))
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(out.detach().double(), exact, atol=precision, rtol=8 * precision)


def make(form: str, experts: range, quantized: bool = True) -> Experts:
    made = EXPERT_TYPES[form](ExpertSpec(WIDTH, HIDDEN, SETTINGS, experts, quantized))
    made.initialize(5, "experts")
    # Each expert's functions differ too, as after some training.
    for name, parameter in made.named_parameters():
        if name not in made.stds:
            noise = torch.stack([torch.full(parameter.shape[1:], 0.01 * (e + 1)) for e in experts])
            parameter.data += noise
    return made.double()


def rows(counts: tuple[int, ...], quantized: bool) -> tuple[Tensor, Quantized]:
    torch.manual_seed(2)
    x = torch.randn(sum(counts), WIDTH, dtype=torch.float64, requires_grad=True)
    return x, quantize(rms_norm(x), quantized)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("form", EXPERT_TYPES)
def test_stacked_experts_are_each_expert_alone(form: str, quantized: bool) -> None:
    counts = (3, 0, 4, 1)
    stacked = make(form, range(4), quantized)
    x, inputs = rows(counts, quantized)
    out = stacked(inputs, counts)
    noise = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * noise).sum(), x, retain_graph=True)
    (out * noise).sum().backward()
    first = 0
    for expert, n in enumerate(counts):
        alone, here = make(form, range(expert, expert + 1), quantized), slice(first, first + n)
        part = x.detach()[here].requires_grad_()
        its = alone(quantize(rms_norm(part), quantized), (n,))
        torch.testing.assert_close(its, out[here], atol=1e-12, rtol=0)
        (its * noise[here]).sum().backward()
        torch.testing.assert_close(part.grad, grad[here], atol=1e-11, rtol=0)
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(parameter.grad[0], stacked.get_parameter(name).grad[expert], atol=1e-10, rtol=0)
            assert n > 0 or not bool(parameter.grad.any())
        first += n


@pytest.mark.parametrize("counts", [(0, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("form", EXPERT_TYPES)
def test_experts_without_rows_get_zeros_for_gradients(form: str, counts: tuple[int, ...]) -> None:
    experts = make(form, range(3))
    _, x = rows(counts, True)
    # ZeRO waits for every parameter in every backward, so None would hang the other ranks.
    experts(x._replace(codes=x.codes.detach()), counts).square().sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        for gradient, n in zip(parameter.grad, counts, strict=True):
            assert bool(gradient.any()) == (n > 0), name


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("form", EXPERT_TYPES)
def test_initial_weights_do_not_depend_on_placement(form: str, quantized: bool) -> None:
    whole = make(form, range(6), quantized)
    for placed in (range(1), range(1, 4), range(4, 6), range(5, 6)):
        for name, parameter in make(form, placed, quantized).named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name)[placed.start : placed.stop]), name
    drawn = whole.get_parameter(next(iter(whole.stds)))
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(6) for j in range(i))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", EXPERT_TYPES)
def test_forms_run_in_training_precisions(form: str, dtype: torch.dtype) -> None:
    counts = (20, 0, 30)
    experts = make(form, range(3)).to(dtype)
    # The same rounded weights, so that no ternary code differs.
    exact = copy.deepcopy(experts).double()
    torch.manual_seed(0)
    x = torch.randn(50, WIDTH).to(dtype).requires_grad_()
    out = experts(quantize(rms_norm(x)), counts)
    assert out.dtype == dtype
    expected = exact(quantize(rms_norm(x.detach().double())), counts)
    # Rounding flips a few codes of a low-precision run; a wrong scale or an overflow would show at once.
    assert float(((out.double() - expected).std() / expected.std()).detach()) < 0.05
    out.sum().backward()
    assert all(bool(t.grad.isfinite().all()) for t in (x, *experts.parameters()))


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("form", EXPERT_TYPES)
def test_initial_outputs_have_the_variance_of_the_inputs(form: str, quantized: bool) -> None:
    width, gain, experts = 128, 0.5, 4
    settings = ExpertsConfig(num_experts=1, top_k=1, expert_hidden_size=256, function_groups=GROUPS)
    made = EXPERT_TYPES[form](ExpertSpec(width, 256, settings, range(experts), quantized, gain))
    made.initialize(1, "experts")
    torch.manual_seed(0)
    x = torch.randn(experts * 2000, width)
    with torch.no_grad():
        out = made(quantize(rms_norm(x), quantized), [2000] * experts)
    assert out.numel() > 1e6
    assert float(out.square().mean()) == pytest.approx(gain**2, rel=0.05)
    assert abs(float(out.mean())) < 0.05 * gain


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", EXPERT_TYPES)
def test_forms_are_finite_for_inputs_of_any_size(form: str, dtype: torch.dtype, quantized: bool) -> None:
    experts = make(form, range(2), quantized).to(dtype)
    torch.manual_seed(0)
    sizes = torch.tensor([1e-3, 0.1, 1.0, 100.0, 1e4])[:, None]
    outlier = 1e-2 * torch.randn(4, WIDTH)
    outlier[:, 3] = torch.tensor([1e4, -1e4, 300.0, -300.0])
    x = torch.cat([sizes * torch.randn(5, WIDTH).clamp(-1, 1), outlier]).to(dtype).requires_grad_()
    out = experts(quantize(rms_norm(x), quantized), (5, 4))
    out.float().square().mean().backward()
    assert all(bool(t.isfinite().all()) for t in (out, x.grad, *(p.grad for p in experts.parameters())))


@pytest.mark.parametrize("counts", [(3,), (1, 0, 2, 0)])
@pytest.mark.parametrize("form", EXPERT_TYPES)
def test_forms_pass_gradcheck(form: str, counts: tuple[int, ...]) -> None:
    settings = ExpertsConfig(
        num_experts=1, top_k=1, expert_hidden_size=4, function_groups=2, grid_size=3, spline_order=2
    )
    experts = EXPERT_TYPES[form](ExpertSpec(4, 4, settings, range(len(counts)), False))
    experts.initialize(0, "experts")
    experts.double()
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*experts.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(experts, given, (Quantized(x, torch.ones_like(x[:, :1])), counts))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("form", EXPERT_TYPES)
def test_counts_that_do_not_fit_are_refused(form: str) -> None:
    experts = make(form, range(3))
    _, x = rows((6,), True)
    for counts, message in (
        ((2, 1, 2), r"\[2, 1, 2\] sum to 5, but there are 6 rows"),
        ((4, 3, 0), r"\[4, 3, 0\] sum to 7, but there are 6 rows"),
        ((4, 3, -1), r"\[4, 3, -1\] sum to 6, but"),
        ((6,), "1 counts for 3 experts"),
        ((2, 2, 1, 1), "4 counts for 3 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            experts(x, counts)


@pytest.mark.parametrize("form", EXPERT_TYPES)
def test_functions_and_their_inputs_can_be_read(form: str) -> None:
    counts = (2, 0, 4)
    experts = make(form, range(3))
    _, x = rows(counts, True)
    shown, shares = experts.functions(torch.linspace(-3, 3, 7), 2), experts.outside(x, counts)
    assert all(not values.requires_grad for values in (*shown.values(), *shares.values()))
    if form in ("swiglu", "relu2"):
        assert shown == shares == {}
        return
    functions = 2 if form in ("hat", "bspline") else GROUPS
    assert {name: tuple(values.shape) for name, values in shown.items()} == dict.fromkeys(
        ("inner", "outer"), (3, functions, 7)
    )
    values = x.codes / x.scale
    reach = 3 if form == "rational" else 2
    expected = [float((part.abs() > reach).double().mean()) if len(part) else 0.0 for part in values.split(counts)]
    assert shares["inner"].tolist() == pytest.approx(expected) and list(shares) == ["inner", "outer"]
    assert 0 <= float(shares["outer"].sum()) < 1


@pytest.mark.parametrize("form", EXPERT_TYPES)
def test_every_type_is_built_without_memory(form: str) -> None:
    here = make(form, range(2))
    with torch.device("meta"):
        empty = EXPERT_TYPES[form](ExpertSpec(WIDTH, HIDDEN, SETTINGS, range(2)))
    assert empty.stds == here.stds and all(parameter.is_meta for parameter in empty.parameters())
