"""Rotation and norm of heads: values and gradients of the steps in torch, in any order in memory, on any threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kabrn_dist.ops.heads import norm_heads, norm_heads_naive, rotate, rotate_naive

SHAPES = [(1, 1, 1, 2), (2, 3, 5, 6), (1, 2, 33, 32), (2, 4, 17, 64), (1, 1, 3, 70), (0, 2, 3, 4)]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float64: 1e-12}


def draw(shape: tuple[int, ...], dtype: torch.dtype, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Heads [B,H,T,D] whose memory has another order, and angles."""
    batch, heads, time, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    if order == "by token":
        x = torch.randn(batch, time, heads, width, generator=generator).transpose(1, 2)
    elif order == "by head":
        x = torch.randn(*shape, generator=generator)
    else:
        x = torch.randn(batch, heads, width, time, generator=generator).transpose(2, 3)
    angles = torch.randn(batch, 1, time, width // 2, generator=generator)
    return x.to(dtype), angles.cos(), angles.sin()


def check(found: Callable[[Tensor], Tensor], naive: Callable[[Tensor], Tensor], x: Tensor) -> None:
    dtype = x.dtype
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out, expected = found(mine), naive(exact)
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    (out * noise).sum().backward()
    (expected * noise.double()).sum().backward()
    assert out.dtype == dtype and mine.grad is not None and exact.grad is not None
    for one, other in ((out, expected), (mine.grad, exact.grad)):
        torch.testing.assert_close(one.double(), other, rtol=ROUNDING[dtype], atol=4 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("order", ["by token", "by head", "by channel"])
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_rotate(shape: tuple[int, ...], order: str, dtype: torch.dtype) -> None:
    x, cos, sin = draw(shape, dtype, order)
    assert rotate(x, cos, sin).is_contiguous()
    check(lambda y: rotate(y, cos, sin), lambda y: rotate_naive(y, cos.double(), sin.double()), x)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("order", ["by token", "by head", "by channel"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 5, 1), (1, 1, 1, 1)])
def test_heads_are_normalized_and_stand_side_by_side(shape: tuple[int, ...], order: str, dtype: torch.dtype) -> None:
    x, _, _ = draw(shape, dtype, order)
    batch, heads, time, width = shape
    assert norm_heads(x, 1e-2).shape == (batch, time, heads * width)
    check(lambda y: norm_heads(y, 1e-2), lambda y: norm_heads_naive(y, 1e-2), x)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    x, cos, sin = draw((2, 3, 37, 20), torch.float32, "by token")
    before, results = torch.get_num_threads(), []
    for count in (1, threads):
        torch.set_num_threads(count)
        leaf = x.clone().requires_grad_()
        out = norm_heads(rotate(leaf, cos, sin), 1e-2)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_angles_that_do_not_fit_are_refused() -> None:
    x, cos, sin = draw((1, 2, 5, 8), torch.float32, "by head")
    with pytest.raises(ValueError, match="do not fit angles"):
        rotate(x, cos[:, :, :4], sin[:, :, :4])
