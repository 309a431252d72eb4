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

from kabrn_dist.model.initial import draw_normal

SMALLEST = 1e-5
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
    return _BitProduct.apply(x.codes, x.scale, weight, tuple(counts), enabled)


def bit_product_naive(x: Quantised, weight: Tensor, counts: Sequence[int], enabled: bool = True) -> Tensor:
    """The same by definition: dequantise both sides, multiply, let autograd differentiate."""
    codes, gamma = ternary(weight)
    used = weight + (codes * gamma - weight).detach() if enabled else weight
    rows = (x.codes / x.scale).split(list(counts))
    return torch.cat([part @ matrix.T for part, matrix in zip(rows, used, strict=True)])


class _BitProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, codes: Tensor, scale: Tensor, weight: Tensor, counts: tuple[int, ...], enabled: bool
    ) -> Tensor:
        factor = scale.reciprocal()
        if enabled:
            signs, gamma = ternary(weight)
            weight = signs.to(codes.dtype)
            factor = factor * _by_row(gamma, counts)
        shift = _headroom(codes.dtype)
        product = grouped_product(codes if shift == 1 else codes * shift, weight, counts)
        ctx.save_for_backward(codes, scale, factor, weight.to(torch.int8) if enabled else weight)
        ctx.counts = counts
        return (product * (factor / shift)).to(codes.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        codes, scale, factor, weight = ctx.saved_tensors
        for_codes = for_weight = None
        if ctx.needs_input_grad[0]:
            for_codes = grouped_product(
                (grad * factor).to(grad.dtype), weight.to(grad.dtype).transpose(1, 2), ctx.counts
            )
        if ctx.needs_input_grad[2]:
            for_weight = grouped_outer((grad / scale).to(grad.dtype), codes, ctx.counts)
        return for_codes, None, for_weight, None, None


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
    out = left.new_zeros(len(counts), left.shape[1], right.shape[1])
    start = 0
    for matrix, n in zip(out, counts, strict=True):
        if n:
            torch.mm(left[start : start + n].T, right[start : start + n], out=matrix)
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
