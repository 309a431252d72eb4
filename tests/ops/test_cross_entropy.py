"""The cross-entropy kernel is torch's cross-entropy: values and gradients, odd sizes, rows without a target."""

from __future__ import annotations

import pytest
import torch

from kabrn_dist.kernels.selection import kernels_for
from kabrn_dist.ops.cross_entropy import IGNORED, cross_entropy, cross_entropy_naive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (3, 2), (5, 15), (4, 16), (7, 17), (33, 257), (2, 5003), (0, 5)])
def test_values_and_gradients_are_those_of_torch(dtype: torch.dtype, rows: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(rows + classes)
    values = (4 * torch.randn(rows, classes, generator=generator)).to(dtype)
    targets = torch.randint(classes, (rows,), generator=generator)
    targets[1::3] = IGNORED
    weights = torch.rand(rows, generator=generator) * 3 - 1
    exact = values.double().clone().requires_grad_()
    expected = cross_entropy_naive(exact, targets)
    (expected * weights).sum().backward()
    logits = values.clone().requires_grad_()
    # A copy, as a head would have written it: the gradient takes its place.
    found = cross_entropy(logits * 1, targets)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    (found * weights.to(found.dtype)).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    assert logits.grad is not None and exact.grad is not None and logits.grad.dtype == dtype
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-12}[dtype]
    small = 1e-7 if dtype == torch.float16 else 1e-9 if dtype == torch.float64 else 2e-7
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=small)
    assert not found[1::3].any() and not logits.grad[1::3].any()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    logits, targets = torch.randn(37, 301, generator=torch.Generator().manual_seed(0)), torch.arange(37)
    before = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        x = logits.clone().requires_grad_()
        nats = cross_entropy(x * 1, targets)
        nats.sum().backward()
        results.append((nats.detach(), x.grad))
    torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None and results[1][1] is not None and torch.equal(results[0][1], results[1][1])


def test_extreme_logits() -> None:
    """Far apart, large, and not finite: as torch's own."""
    rows = [[0.0, -1e4, 1e4], [1e30, 0.0, 1.0], [-200.0, 0.0, 90.0], [float("nan"), 0.0, 1.0], [0.0, float("inf"), 1.0]]
    targets = torch.tensor([0, 0, 1, 1, 2])
    expected_x, x = (torch.tensor(rows).requires_grad_() for _ in range(2))
    expected, found = cross_entropy_naive(expected_x, targets), cross_entropy(x * 1, targets)
    expected[:3].sum().backward()
    found[:3].sum().backward()
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert x.grad is not None and expected_x.grad is not None
    torch.testing.assert_close(x.grad[:3], expected_x.grad[:3], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("target", [5, -1, -101, 2**40])
def test_a_target_that_is_no_class_is_refused(target: int) -> None:
    with pytest.raises(ValueError, match="a target is not one of 5 classes"):
        cross_entropy(torch.zeros(2, 5), torch.tensor([0, target]))


def test_the_logits_are_consumed() -> None:
    if kernels_for(torch.zeros(1)) is None:
        pytest.skip("no C kernels here")
    logits = torch.randn(3, 4, requires_grad=True)
    nats = cross_entropy(logits * 1, torch.tensor([0, 1, 2])).sum()
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten by their gradient"):
        nats.backward()
