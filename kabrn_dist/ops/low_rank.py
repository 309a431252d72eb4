"""Low-rank factors beside a matrix (LoRA, arXiv 2106.09685), read by the same quantized input.

Shapes:
    N: rows, sorted by matrix.
    E: matrices (experts).
    O: output features.
    I: input features.
    R: rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kabrn_dist.ops.activation_quant import Quantized
from kabrn_dist.ops.grouped_mm import grouped_mm, grouped_weight_grad

# Behind the name of a parameter, the names of its factors.
A_SUFFIX, B_SUFFIX = "_lora_a", "_lora_b"


class LowRank(NamedTuple):
    """Factors of a matrix that is added to another one: W·x becomes W·x + B·(A·x).

    Attributes:
        a: [E,R,I] fp32.
        b: [E,O,R] fp32, with all factors in it.
    """

    a: Tensor
    b: Tensor


class LowRankModule(nn.Module):
    """A module whose matrices may have low-rank factors beside them: fixed ones, ones that are trained, or both.

    Attributes:
        fixed_low_ranks: factors that are not trained, by the name of the parameter.
        low_rank_scales: by the name of the parameter, [E,1,1] fp32, what B of its trained factors, the parameters
            NAME_lora_a and NAME_lora_b, is multiplied by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fixed_low_ranks: dict[str, LowRank] = {}
        self.low_rank_scales: dict[str, Tensor] = {}

    def trained_low_rank(self, name: str) -> LowRank | None:
        """Return the trained factors of a parameter, differentiable; None if it has none."""
        scale = self.low_rank_scales.get(name)
        if scale is None:
            return None
        if scale.device != self.get_parameter(name).device:
            scale = self.low_rank_scales[name] = scale.to(self.get_parameter(name).device)
        return self.scaled_factors(name, scale)

    def scaled_factors(self, name: str, scale: Tensor) -> LowRank:
        """Return the parameters NAME_lora_a and NAME_lora_b, B times a scale [E,1,1]; differentiable."""
        a, b = (self.get_parameter(name + suffix) for suffix in (A_SUFFIX, B_SUFFIX))
        scaled = b * scale.to(b.dtype)
        return LowRank(a if a.ndim == 3 else a[None], scaled)

    def low_rank(self, name: str) -> LowRank | None:
        """Return all factors beside a parameter, one below the other along R; None if there are none."""
        fixed, trained = self.fixed_low_ranks.get(name), self.trained_low_rank(name)
        if fixed is None or trained is None:
            return trained if fixed is None else fixed
        return join_low_ranks([fixed, trained])


def join_low_ranks(parts: Iterable[LowRank]) -> LowRank:
    """Return factors of the sum of several products."""
    a, b = zip(*parts, strict=True)
    return LowRank(torch.cat(a, 1), torch.cat(b, 2))


def low_rank_product(
    x: Quantized, low_rank: LowRank, rows_per_matrix: Sequence[int], factor: Tensor | None = None
) -> Tensor:
    """Multiply rows by their factors: B·(A·x).

    Args:
        x: codes [N,I] and scale [N,1]; rows sorted by matrix.
        low_rank: of E matrices; those without rows get gradients of zeros.
        rows_per_matrix: rows of each of the E matrices, which sum to N.
        factor: [N,1], what the product of the codes is multiplied by; by default 1 / scale. It gets no gradient.

    Returns:
        [N,O] in fp32, or in fp64 for codes in fp64.
    """
    kept = x.codes.detach() if x.int8_codes is None else x.int8_codes
    factor = x.scale.reciprocal() if factor is None else factor
    product: Tensor = _LowRankProduct.apply(x.codes, kept, factor.detach(), *low_rank, tuple(rows_per_matrix))
    return product


def low_rank_product_naive(x: Quantized, low_rank: LowRank, rows_per_matrix: Sequence[int]) -> Tensor:
    """Compute `low_rank_product` by definition: the matrix B·A times the dequantized rows, matrix by matrix."""
    rows = (x.codes / x.scale).split(list(rows_per_matrix))
    return torch.cat([part @ (b @ a).T for part, a, b in zip(rows, *low_rank, strict=True)])


class _LowRankProduct(torch.autograd.Function):
    """Keeps the codes, a byte each where they are int8, and A·x."""

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, kept: Tensor, factor: Tensor, a: Tensor, b: Tensor, rows_per_matrix: tuple[int, ...]
    ) -> Tensor:
        dtype = torch.promote_types(codes.dtype, torch.float32)
        inner = grouped_mm(kept.to(dtype), a.to(dtype), rows_per_matrix)
        ctx.save_for_backward(kept, factor, a, b, inner)
        ctx.rows_per_matrix, ctx.dtype = rows_per_matrix, codes.dtype
        return grouped_mm(inner, b.to(dtype), rows_per_matrix) * factor.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, factor, a, b, inner = ctx.saved_tensors
        rows_per_matrix, dtype = ctx.rows_per_matrix, inner.dtype
        grad = grad * factor.to(dtype)
        grad_inner = grouped_mm(grad, b.to(dtype).transpose(1, 2), rows_per_matrix)
        grad_codes = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_codes = grouped_mm(grad_inner, a.to(dtype).transpose(1, 2), rows_per_matrix).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            grad_a = grouped_weight_grad(grad_inner, kept.to(dtype), rows_per_matrix).to(a.dtype)
        if ctx.needs_input_grad[4]:
            grad_b = grouped_weight_grad(grad, inner, rows_per_matrix).to(b.dtype)
        return grad_codes, None, None, grad_a, grad_b, None


def add_low_rank(out: Tensor, x: Tensor, low_rank: LowRank | None) -> Tensor:
    """Return out [...,O], the product of a plain matrix and x [...,I], plus that of its factors, of one matrix.

    In the dtype of out; the sum is taken in fp32 or wider. Without factors it is `out` itself.
    """
    if low_rank is None:
        return out
    dtype = torch.promote_types(out.dtype, torch.float32)
    a, b = (part[0].to(dtype) for part in low_rank)
    return (out + F.linear(F.linear(x.to(dtype), a), b)).to(out.dtype)
