"""A product in a wider dtype where that is faster: closer to the exact one, with the gradients' own dtypes."""

from __future__ import annotations

import pytest
import torch

from kabrn_dist.ops import plain_product as module
from kabrn_dist.ops.plain_product import plain_product


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 17), (1, 0, 4), (33,)])
def test_values_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_wide = wide and dtype == torch.bfloat16
    monkeypatch.setattr(module, "matmul_dtype", lambda _, own: torch.float32 if is_wide else own)
    generator = torch.Generator().manual_seed(0)
    values, matrix = torch.randn(*shape, generator=generator), torch.randn(7, shape[-1], generator=generator)
    x, weight = (each.to(dtype).requires_grad_() for each in (values, matrix))
    exact_x, exact_weight = (each.detach().double().requires_grad_() for each in (x, weight))
    out, expected = plain_product(x, weight), exact_x @ exact_weight.T
    assert out.dtype == (torch.float32 if is_wide else dtype)
    noise = torch.randn(expected.shape, generator=generator).to(out.dtype)
    (out * noise).sum().backward()
    (expected * noise.double()).sum().backward()
    limit = {torch.bfloat16: 2**-6, torch.float32: 1e-5, torch.float64: 1e-12}
    assert x.grad is not None and weight.grad is not None and x.grad.dtype == weight.grad.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=limit[out.dtype], atol=4 * limit[out.dtype])
    for one, other in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        torch.testing.assert_close(one.double(), other, rtol=limit[dtype], atol=4 * limit[dtype])
