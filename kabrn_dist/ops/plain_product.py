"""The product of rows and a plain matrix, in the dtype that this machine multiplies fastest.

Shapes:
    I: input features.
    O: output features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kabrn_dist.kernels.selection import matmul_dtype


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [...,I] by weight [O,I].

    Processors without fast units for half precision multiply in fp32: the result then stays fp32, and is not rounded.

    Returns:
        [...,O], in the dtype of x or in fp32.
    """
    compute_dtype = matmul_dtype(x.device.type, x.dtype)
    if compute_dtype == x.dtype:
        return F.linear(x, weight)
    product: Tensor = _WideProduct.apply(x, weight, compute_dtype)
    return product


class _WideProduct(torch.autograd.Function):
    """Keeps both factors in their own dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.to(grad.dtype)).view_as(x).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ inputs.to(grad.dtype)).to(weight.dtype)
        return grad_x, grad_weight, None
