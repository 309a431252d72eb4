"""BitLinear (BitNet b1.58, arXiv 2402.17764): ternary weights, int8 activations, straight-through gradients.

The product is taken on integers, which every dtype here holds exactly, and scaled afterwards. One normalised and
quantised input is shared by all matrices that read it.

Shapes: N rows, I input width, O output width, E matrices (experts), rows sorted by matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kabrn_dist.kernels.choice import choose, kernels_for
from kabrn_dist.kernels.functions import DTYPES, Function, Functions
from kabrn_dist.model.initial import draw_normal

SMALLEST = 1e-5
IDENTITY = Function("identity")
# A Gaussian latent keeps 0.4386 of its variance as γ·{-1,0,1} (31 % zeros).
TERNARY_VARIANCE = 0.4386


class Quantised(NamedTuple):
    """A quantised input: `codes / scale` is the value.

    Attributes:
        codes: [..., I] whole numbers −128…127 in the compute dtype (plain values where quantisation is off).
        scale: [..., 1] fp32, 127 / max|x| of each row (1 where quantisation is off).
    """

    codes: Tensor
    scale: Tensor


def widen(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Divide by the root mean square over the last dimension, in fp32 (or wider); no gain. Same dtype out."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def quantise(x: Tensor, enabled: bool = True) -> Quantised:
    """Absmax int8 per row (eq. 4 of arXiv 2402.17764), straight-through: d(codes/scale)/dx = 1.

    Args:
        x: [..., I] of any float dtype.
        enabled: False passes x through, with a scale of 1.
    """
    if not enabled:
        return Quantised(x, torch.ones_like(widen(x[..., :1])))
    codes, scale = _Round.apply(x)
    return Quantised(codes, scale)


def normalise(x: Tensor, enabled: bool = True) -> Quantised:
    """`quantise(rms_norm(x))`, what every product reads, in one pass where there is a kernel for it. x: [..., I]."""
    kernels = kernels_for(x)
    if kernels is None:
        return quantise(rms_norm(x), enabled)
    codes, scale = _Normalise.apply(x.reshape(-1, x.shape[-1]), enabled, kernels.functions)
    return Quantised(codes.view_as(x), scale.view(*x.shape[:-1], 1))


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, enabled: bool, kernels: Functions) -> tuple[Tensor, Tensor]:
        x, nothing = x.contiguous(), x.new_empty(1, 1, 0, dtype=torch.float32)
        codes, scale, rms = kernels.forward(IDENTITY, x, None, nothing, [len(x)], enabled)
        ctx.save_for_backward(x, nothing, scale, rms)
        ctx.kernels = kernels
        ctx.mark_non_differentiable(scale)
        return codes, scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        x, nothing, scale, rms = ctx.saved_tensors
        grads = ctx.kernels.backward(IDENTITY, x, None, nothing, [len(x)], grad.contiguous(), scale, rms)
        return grads[0], None, None


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = widen(x)
        scale = 127 / wide.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST)
        codes = (wide * scale).round_().clamp_(-128, 127)
        ctx.save_for_backward(scale)
        ctx.mark_non_differentiable(scale)
        return codes.to(x.dtype), scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return (grad * scale).to(grad.dtype)


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Absmean quantisation (eq. 1–3 of arXiv 2402.17764), one scale per matrix.

    Args:
        weight: [E,O,I] latent weights.

    Returns:
        codes [E,O,I] of −1, 0, 1 in fp32 (or wider), and γ [E,1,1], the mean |w| of each matrix.
    """
    kernels = kernels_for(weight)
    if kernels is not None:
        codes, gamma, _ = kernels.products.ternary(weight.detach().contiguous())
        return widen(codes), gamma
    wide = widen(weight)
    gamma = wide.abs().mean((1, 2), keepdim=True).clamp_(min=SMALLEST)
    return (wide / gamma).round_().clamp_(-1, 1), gamma


def bit_product(x: Quantised, weight: Tensor, counts: Sequence[int], enabled: bool = True) -> Tensor:
    """Rows times their ternary matrices.

    Args:
        x: codes [N,I] and scale [N,1]; rows sorted by matrix.
        weight: [E,O,I] latent weights; matrices without rows get a gradient of zeros, never none.
        counts: rows of each of the E matrices, which sum to N.
        enabled: False multiplies by the latent weights themselves.

    Returns:
        [N,O] in the dtype of the codes.
    """
    return _ScaleRows.apply(*_Product.apply(x.codes, x.scale, weight, tuple(counts), enabled))


def unscaled_product(x: Quantised, weight: Tensor, counts: Sequence[int], enabled: bool = True) -> Quantised:
    """`bit_product` whose scaling is left to what reads it: product [N,O] / scale [N,1] is the result."""
    product, factor = _Product.apply(x.codes, x.scale, weight, tuple(counts), enabled)
    return Quantised(product, factor.reciprocal())


def bit_product_naive(x: Quantised, weight: Tensor, counts: Sequence[int], enabled: bool = True) -> Tensor:
    """The same by definition: dequantise both sides, multiply, let autograd differentiate."""
    codes, gamma = ternary(weight)
    used = weight + (codes * gamma - weight).detach() if enabled else weight
    rows = (x.codes / x.scale).split(list(counts))
    return torch.cat([part @ matrix.T for part, matrix in zip(rows, used, strict=True)])


class _Product(torch.autograd.Function):
    """The product of codes, and the factor [N,1] that makes it the result."""

    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, scale: Tensor, weight: Tensor, counts: tuple[int, ...], enabled: bool
    ) -> tuple[Tensor, Tensor]:
        factor, kept, gamma = scale.reciprocal(), weight, None
        if enabled:
            weight, gamma, kept = _signs(weight, codes.dtype)
            factor = factor * _by_row(gamma, counts)
        # Plain values are small, and who reads them unscaled would not know of a shift.
        shift = _headroom(codes.dtype) if enabled else 1
        if shift != 1:
            codes, factor = codes * shift, factor / shift
        product = grouped_product(codes, weight, counts)
        ctx.save_for_backward(codes, kept, gamma)
        ctx.counts, ctx.shift = counts, shift
        ctx.mark_non_differentiable(factor)
        return product, factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        codes, weight, gamma = ctx.saved_tensors
        for_codes = for_weight = None
        if ctx.needs_input_grad[0]:
            for_codes = grouped_product(grad, _widen_signs(weight, grad.dtype).transpose(1, 2), ctx.counts)
            for_codes = for_codes if ctx.shift == 1 else for_codes * ctx.shift
        if ctx.needs_input_grad[2]:
            for_weight = grouped_outer(grad, codes, ctx.counts)
            # Straight through: the result's slope in a latent is that in γ·sign, 1/γ of that in the sign.
            for_weight = for_weight if gamma is None else scale_rows(for_weight, gamma.reciprocal())
        return for_codes, None, for_weight, None, None


def _signs(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in `dtype`, γ, and the codes as bytes to keep."""
    kernels = kernels_for(weight)
    if kernels is not None and weight.dtype == dtype:
        return kernels.products.ternary(weight.contiguous())
    signs, gamma = ternary(weight)
    return signs.to(dtype), gamma, signs.to(torch.int8)


def _widen_signs(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Kept bytes, or plain weights, in `dtype`."""
    kernels = choose(kept.device.type).kernels
    if kernels is not None and kept.dtype == torch.int8 and dtype in DTYPES:
        return kernels.products.widen(kept, dtype)
    return kept.to(dtype)


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """x [N,...] times factor [N,1,...], multiplied in the wider dtype and rounded once to that of x."""
    kernels = kernels_for(x)
    if kernels is not None and factor.dtype == torch.float32:
        return kernels.products.scale(x.contiguous(), factor.contiguous())
    return (x * factor).to(x.dtype)


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


def _by_row(per_matrix: Tensor, counts: tuple[int, ...]) -> Tensor:
    if len(counts) == 1:
        return per_matrix.view(1, 1)
    return torch.cat([value.expand(n, 1) for value, n in zip(per_matrix.view(-1, 1), counts, strict=True)])


def grouped_product(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """[N,I] rows sorted by matrix × [E,O,I] → [N,O]."""
    if len(counts) == 1:
        return rows @ weight[0].T
    out = rows.new_empty(len(rows), weight.shape[1])
    start = 0
    for matrix, n in zip(weight, counts, strict=True):
        if n:
            torch.mm(rows[start : start + n], matrix.T, out=out[start : start + n])
        start += n
    return out


def grouped_outer(left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    """[N,O] and [N,I] rows sorted by matrix → [E,O,I] sums of outer products; zeros where no row is."""
    if len(counts) == 1:
        return (left.T @ right)[None]
    out = left.new_empty(len(counts), left.shape[1], right.shape[1])
    start = 0
    for matrix, n in zip(out, counts, strict=True):
        if n:
            torch.mm(left[start : start + n].T, right[start : start + n], out=matrix)
        else:
            matrix.zero_()
        start += n
    return out


class BitLinear(nn.Module):
    """One ternary matrix, no bias. Its input is quantised outside, once for all that read it.

    Args:
        inputs, outputs: widths.
        gain: standard deviation of the output at the start, for an input of unit variance.
        enabled: False makes it a plain matrix.
    """

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled
        self.std = latent_std(inputs, gain, enabled)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def initialise(self, seed: int, name: str) -> None:
        self.weight.data.copy_(draw_normal(seed, f"{name}.weight", tuple(self.weight.shape), self.std))

    def forward(self, x: Quantised) -> Tensor:
        """[..., inputs] quantised → [..., outputs]."""
        shape = x.codes.shape
        rows = Quantised(x.codes.reshape(-1, shape[-1]), x.scale.reshape(-1, 1))
        out = bit_product(rows, self.weight[None], (len(rows.codes),), self.enabled)
        return out.view(*shape[:-1], -1)


def latent_std(inputs: int, gain: float, enabled: bool) -> float:
    """Standard deviation of latents whose product with unit-variance input has standard deviation `gain`."""
    return gain / math.sqrt(inputs * (TERNARY_VARIANCE if enabled else 1.0))
