"""BitLinear (BitNet b1.58, arXiv 2402.17764): ternary weights, int8 activations, straight-through gradients.

The product is taken on whole numbers, in int32 where the processor is fast at that and in fp32 elsewhere, which holds
every sum there can be: the results are the same bits. It is scaled afterwards and rounded once. One normalised and
quantized input is shared by all matrices that read it. Backward keeps one byte per value and two bits per weight.

Shapes:
    N: rows, sorted by matrix.
    I: input features.
    O: output features.
    E: matrices (experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kabrn_dist.kernels.selection import int8_matmul_is_faster, kernels_for, matmul_dtype
from kabrn_dist.kernels.univariate import KERNEL_DTYPES
from kabrn_dist.model.init import draw_normal
from kabrn_dist.ops.activation_quant import Quantized
from kabrn_dist.ops.grouped_mm import grouped_mm, grouped_weight_grad
from kabrn_dist.ops.low_rank import low_rank_product
from kabrn_dist.ops.packing import unpack
from kabrn_dist.ops.weight_quant import (
    QuantState,
    TernaryMatrices,
    TernaryModule,
    absmean_quantize,
    cast_codes,
    latent_std,
    ternarize,
)


def bitlinear(
    x: Quantized, weight: TernaryMatrices | Tensor, rows_per_matrix: Sequence[int], lam: float = 1.0
) -> Tensor:
    """Multiply rows by their ternary matrices.

    Args:
        x: codes [N,I] and scale [N,1]; rows sorted by matrix.
        weight: E matrices, or their latents [E,O,I]; matrices without rows get a gradient of zeros, never None.
        rows_per_matrix: rows of each of the E matrices, which sum to N.
        lam: how far latents are quantized (see `QuantState`); not used for `TernaryMatrices`.

    Returns:
        [N,O] in the dtype of the codes.
    """
    return _multiply(x, weight, rows_per_matrix, lam, True).codes


def bitlinear_unscaled(
    x: Quantized, weight: TernaryMatrices | Tensor, rows_per_matrix: Sequence[int], lam: float = 1.0
) -> Quantized:
    """Multiply as `bitlinear`, and leave the scaling to the reader: codes [N,O] / scale [N,1] is the result."""
    return _multiply(x, weight, rows_per_matrix, lam, False)


def bitlinear_naive(x: Quantized, weight: Tensor, rows_per_matrix: Sequence[int], lam: float = 1.0) -> Tensor:
    """Compute `bitlinear` by definition: dequantize both sides, multiply, let autograd differentiate.

    Args:
        x: as in `bitlinear`.
        weight: latents [E,O,I].
        rows_per_matrix: as in `bitlinear`.
        lam: as in `bitlinear`.
    """
    codes, gamma = absmean_quantize(weight)
    used = weight + lam * (codes * gamma - weight).detach()
    rows = (x.codes / x.scale).split(list(rows_per_matrix))
    return torch.cat([part @ matrix.T for part, matrix in zip(rows, used, strict=True)])


def _multiply(
    x: Quantized, weight: TernaryMatrices | Tensor, rows_per_matrix: Sequence[int], lam: float, scaled: bool
) -> Quantized:
    if isinstance(weight, Tensor):
        weight = ternarize(weight, lam)
    found = _multiply_codes(x, weight, rows_per_matrix, scaled)
    if weight.low_rank is None:
        return found
    # In units of the result's codes, whether these are scaled or not.
    factor = x.scale.reciprocal() if scaled else found.scale / x.scale
    added = low_rank_product(x, weight.low_rank, rows_per_matrix, factor)
    return found._replace(codes=(found.codes + added).to(found.codes.dtype))


def _multiply_codes(x: Quantized, weight: TernaryMatrices, rows_per_matrix: Sequence[int], scaled: bool) -> Quantized:
    if weight.packed is None:
        product = _PlainProduct.apply(x.codes, weight.latents, tuple(rows_per_matrix))
        return Quantized(_ScaleRows.apply(product, x.scale.reciprocal()) if scaled else product, x.scale)
    int8_codes = x.int8_codes if x.int8_codes is not None else x.codes.detach().to(torch.int8)
    product, factor = _Product.apply(
        x.codes, x.scale, int8_codes, weight.latents, weight, tuple(rows_per_matrix), scaled
    )
    return Quantized(product, factor if scaled else factor.reciprocal())


class _Product(torch.autograd.Function):
    """The product of codes, scaled or not, and the factor [N,1] that makes it the result."""

    @staticmethod
    def forward(
        ctx: Any,
        codes: Tensor,
        scale: Tensor,
        int8_codes: Tensor,
        latents: Tensor,
        weight: TernaryMatrices,
        rows_per_matrix: tuple[int, ...],
        scaled: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = codes.dtype
        factor, columns = _split_scales(scale, weight, rows_per_matrix)
        product = _integer_product(codes, int8_codes, weight, rows_per_matrix)
        if scaled:
            out = _scale(product, factor, columns, rows_per_matrix, dtype)
        else:
            shift = _headroom(dtype)
            # The rows' factors are left out, the columns' are not.
            as_is = product.dtype == dtype and columns is None and shift == 1
            out = product if as_is else _scale(product, torch.full_like(factor, shift), columns, rows_per_matrix, dtype)
            factor = factor / shift
        ctx.save_for_backward(int8_codes, weight.packed, weight.gamma, factor if scaled else None)
        ctx.rows_per_matrix, ctx.scaled, ctx.shape = rows_per_matrix, scaled, tuple(latents.shape)
        ctx.shift = 1 if scaled else _headroom(dtype)
        ctx.mark_non_differentiable(factor)
        return out, factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        int8_codes, packed, gamma, factor = ctx.saved_tensors
        rows_per_matrix, dtype = ctx.rows_per_matrix, grad.dtype
        compute_dtype = matmul_dtype(grad.device.type, dtype)
        grad = grad.contiguous()
        grad = scale_rows(grad, factor, compute_dtype) if ctx.scaled else grad.to(compute_dtype)
        if ctx.shift != 1:
            grad = grad * ctx.shift
        grad_codes = grad_weight = None
        if ctx.needs_input_grad[3]:
            rows = cast_codes(int8_codes, compute_dtype)
            grad_weight = _weight_grad(grad, rows, gamma, rows_per_matrix, dtype)
        if ctx.needs_input_grad[0]:
            grad = _with_columns(grad, gamma, rows_per_matrix)
            signs = unpack(packed, ctx.shape, compute_dtype)
            grad_codes = grouped_mm(grad, signs.transpose(1, 2), rows_per_matrix).to(dtype)
        return grad_codes, None, None, grad_weight, None, None, None


def _split_scales(
    scale: Tensor, weight: TernaryMatrices, rows_per_matrix: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """The factor [N,1] of each row's result, and that of each column [E,O] where outputs have scales of their own."""
    assert weight.gamma is not None
    factor = scale.reciprocal()
    if weight.gamma.shape[1] == 1:
        return factor * _by_row(weight.gamma, rows_per_matrix), None
    return factor, weight.gamma.squeeze(-1)


def _weight_grad(
    grad: Tensor, rows: Tensor, gamma: Tensor, rows_per_matrix: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The gradient of latents from that of the rows' results, times the rows' factors, and the codes of the rows."""
    grad_weight = grouped_weight_grad(grad, rows, rows_per_matrix)
    # Straight through: the result's slope in a latent is that in γ·sign, 1/γ of that in the sign.
    return grad_weight.to(dtype) if gamma.shape[1] != 1 else scale_rows(grad_weight, gamma.reciprocal(), dtype)


def _with_columns(grad: Tensor, gamma: Tensor, rows_per_matrix: tuple[int, ...]) -> Tensor:
    """The gradient times the factors of the columns, where outputs have scales of their own."""
    if gamma.shape[1] == 1:
        return grad
    ones = torch.ones_like(grad[:, :1], dtype=gamma.dtype)
    return _scale(grad, ones, gamma.squeeze(-1), rows_per_matrix, grad.dtype)


class _PlainProduct(torch.autograd.Function):
    """Rows times plain matrices, with a gradient for each matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows_per_matrix: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows_per_matrix = rows_per_matrix
        compute_dtype = matmul_dtype(x.device.type, x.dtype)
        return grouped_mm(x.to(compute_dtype), weight.to(compute_dtype), rows_per_matrix).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        compute_dtype, grad_x, grad_weight = matmul_dtype(grad.device.type, grad.dtype), None, None
        rows = grad.to(compute_dtype)
        if ctx.needs_input_grad[0]:
            grad_x = grouped_mm(rows, weight.to(compute_dtype).transpose(1, 2), ctx.rows_per_matrix).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_weight_grad(rows, x.to(compute_dtype), ctx.rows_per_matrix).to(grad.dtype)
        return grad_x, grad_weight, None


def _integer_product(
    codes: Tensor, int8_codes: Tensor, weight: TernaryMatrices, rows_per_matrix: tuple[int, ...]
) -> Tensor:
    """[N,I] × [E,O,I] → [N,O] without rounding: int32, fp32, or fp64 where the codes are that."""
    if int8_matmul_is_faster(codes.device.type, codes.dtype) and _int8_fits(
        codes.device, weight.latents.shape, rows_per_matrix
    ):
        return grouped_mm(int8_codes, weight.codes(torch.int8), rows_per_matrix)
    exact = torch.promote_types(codes.dtype, torch.float32)
    return grouped_mm(codes.to(exact), weight.codes(exact), rows_per_matrix)


def _int8_fits(device: torch.device, shape: torch.Size, rows_per_matrix: tuple[int, ...]) -> bool:
    # torch's own on the CPU is wrong at width 1, where rows and columns look alike; the rest is what cuBLAS asks for.
    if device.type == "cpu":
        return shape[2] > 1
    return shape[1] % 8 == 0 and shape[2] % 8 == 0 and all(n == 0 or n > 16 for n in rows_per_matrix)


def _scale(
    product: Tensor, factor: Tensor, columns: Tensor | None, rows_per_matrix: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The product [N,O] times factor [N,1] and the columns [E,O] of each row's matrix, rounded once, to `dtype`."""
    if columns is None or len(columns) == 1:
        return scale_rows(product, factor, dtype, None if columns is None else columns[0])
    parts = zip(product.split(list(rows_per_matrix)), factor.split(list(rows_per_matrix)), columns, strict=True)
    return torch.cat([scale_rows(rows, factors, dtype, column) for rows, factors, column in parts])


def scale_rows(x: Tensor, factor: Tensor, dtype: torch.dtype | None = None, columns: Tensor | None = None) -> Tensor:
    """Multiply x [N,...] by factor [N,1,...] and, if given, by columns [...].

    The product is taken in fp32 or wider and rounded once, to `dtype`, by default that of x.
    """
    dtype = dtype or x.dtype
    kernels = kernels_for(x.new_empty(0, dtype=dtype))
    if kernels is not None and factor.dtype == torch.float32 and x.dtype in (torch.int32, *KERNEL_DTYPES):
        columns = None if columns is None else columns.contiguous()
        return kernels.ternary.scale_rows(x.contiguous(), factor.contiguous(), dtype, columns)
    out = x * factor
    return (out if columns is None else out * columns).to(dtype)


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return scale_rows(x, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scale_rows(grad, ctx.saved_tensors[0]), None


def _headroom(dtype: torch.dtype) -> float:
    # A sum of 127s passes fp16's 65,504 at width 516; a power of two in front loses no bit.
    return 1 / 128 if dtype == torch.float16 else 1


def _by_row(per_matrix: Tensor, rows_per_matrix: tuple[int, ...]) -> Tensor:
    if len(rows_per_matrix) == 1:
        return per_matrix.view(1, 1)
    return torch.cat([value.expand(n, 1) for value, n in zip(per_matrix.view(-1, 1), rows_per_matrix, strict=True)])


class BitLinear(TernaryModule):
    """One ternary matrix, no bias. Its input is quantized outside, once for all matrices that read it.

    Args:
        in_features: I.
        out_features: O.
        init_gain: standard deviation of the output at the start, for an input of unit variance.
        quant: the `QuantState` that a model's modules share; True for a ternary matrix, False for a plain one.

    Attributes:
        weight: [O,I], latent.
    """

    def __init__(
        self, in_features: int, out_features: int, init_gain: float = 1.0, quant: bool | QuantState = True
    ) -> None:
        super().__init__({"weight": latent_std(in_features, init_gain, quant)}, quant)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def initialize(self, seed: int, name: str) -> None:
        """Draw the weight from `seed` and the module's `name`."""
        self.weight.data.copy_(draw_normal(seed, f"{name}.weight", tuple(self.weight.shape), self.stds["weight"]))

    def forward(self, x: Quantized) -> Tensor:
        """Multiply [...,I] → [...,O]."""
        rows = x.rows()
        out = bitlinear(rows, self.matrices("weight"), (len(rows.codes),))
        return out.view(*x.codes.shape[:-1], -1)
