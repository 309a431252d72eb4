"""Ternary matrices: latents rounded to −1, 0, 1 (BitNet b1.58, arXiv 2402.17764), two bits a code.

A product reads `TernaryMatrices`, whether their latents are a whole parameter or shards that other ranks hold.

Shapes:
    E: matrices (experts).
    O: output features.
    I: input features.
    R: runs of latents with a scale each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kabrn_dist.kernels.selection import kernels_for, select_kernels
from kabrn_dist.kernels.univariate import KERNEL_DTYPES
from kabrn_dist.ops.activation_quant import MIN_ABSMAX, to_fp32
from kabrn_dist.ops.low_rank import LowRank, LowRankModule
from kabrn_dist.ops.packing import pack, unpack

# A Gaussian latent keeps 0.4386 of its variance as γ·{-1,0,1} (31 % zeros).
TERNARY_VARIANCE = 0.4386


class TernaryMatrices(NamedTuple):
    """Ternary matrices as a product reads them.

    Attributes:
        latents: [E,O,I]; carries the gradient, straight through the rounding. Its values are read only if nothing is
            packed: a plain, or not yet wholly quantized, matrix.
        packed: uint8, two bits a code (`pack`); None for plain matrices.
        gamma: [E,1,1] fp32, or [E,O,1] if groups of outputs have a scale of their own; None for plain matrices.
        int8_codes: [E,O,I] int8, the codes if they have just been computed; else they are unpacked.
        wide_codes: [E,O,I] fp32 or fp64, the codes if they are kept so.
        low_rank: factors whose product is added to the matrices; None for none.
    """

    latents: Tensor
    packed: Tensor | None = None
    gamma: Tensor | None = None
    int8_codes: Tensor | None = None
    wide_codes: Tensor | None = None
    low_rank: LowRank | None = None

    def codes(self, dtype: torch.dtype) -> Tensor:
        """Return the codes [E,O,I] in `dtype`."""
        assert self.packed is not None
        if self.wide_codes is not None and self.wide_codes.dtype == dtype:
            return self.wide_codes
        if self.int8_codes is None:
            return unpack(self.packed, tuple(self.latents.shape), dtype)
        return self.int8_codes if dtype == torch.int8 else cast_codes(self.int8_codes, dtype)


class QuantState:
    """How far values are quantized; one object that all ternary modules of a model share.

    Attributes:
        lam: 0 for plain values, 1 for quantized ones; between them a value is x + lam·(q(x) − x).
        scale_group_size: outputs that share a scale; None: all of a matrix.
    """

    def __init__(self, lam: float, scale_group_size: int | None = None) -> None:
        self.lam, self.scale_group_size = float(lam), scale_group_size


class TernarySource(ABC):
    """A source of ternary codes other than the parameter itself, such as shards on several ranks.

    Attributes:
        sharded: whether the parameter is only this rank's shard of the latents.
    """

    sharded: ClassVar[bool] = False

    @abstractmethod
    def read(self, parameter: nn.Parameter) -> TernaryMatrices:
        """Return the matrices, differentiable in the parameter."""


class TernaryModule(LowRankModule):
    """Holds latents of ternary matrices by name.

    Args:
        stds: standard deviations of the latents at the start, by name.
        quant: the `QuantState` that a model's modules share; True for ternary matrices, False for plain ones.

    Attributes:
        sources: by name, of the parameters whose codes come from elsewhere.
    """

    def __init__(self, stds: dict[str, float], quant: bool | QuantState) -> None:
        super().__init__()
        self.stds = stds
        self.quant = quant if isinstance(quant, QuantState) else QuantState(quant)
        self.sources: dict[str, TernarySource] = {}

    @property
    def lam(self) -> float:
        """How far values are quantized now; see `QuantState`."""
        return self.quant.lam

    def matrices(self, name: str) -> TernaryMatrices:
        """Return the matrices of a parameter as products read them now."""
        parameter = self.get_parameter(name)
        source, low_rank = self.sources.get(name), self.low_rank(name)
        if source is not None:
            found = source.read(parameter)
        else:
            latents = parameter if parameter.ndim == 3 else parameter[None]
            found = ternarize(latents, self.quant.lam, self.quant.scale_group_size)
        return found if low_rank is None else found._replace(low_rank=low_rank)


def ternarize(latents: Tensor, lam: float = 1.0, scale_group_size: int | None = None) -> TernaryMatrices:
    """Return the matrices of whole latents [E,O,I]; `lam` and `scale_group_size` as in `QuantState`.

    Example:
        >>> matrices = ternarize(torch.tensor([[[0.9, -0.1], [-1.4, 0.0]]]))
        >>> matrices.codes(torch.int8).tolist(), round(matrices.gamma.item(), 4)
        ([[[1, 0], [-1, 0]]], 0.6)
    """
    if lam == 1:
        placeholder, *rest = _Ternarize.apply(latents, scale_group_size)
        return TernaryMatrices(placeholder, *rest)
    if not lam:
        return TernaryMatrices(latents)
    with torch.no_grad():
        codes, gamma = absmean_quantize(latents, scale_group_size)
        step = (lam * (codes * gamma - to_fp32(latents))).to(latents.dtype)
    return TernaryMatrices(latents + step)


class _Ternarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, group: int | None) -> tuple[Tensor, ...]:
        gamma = absmean_scales(latents, group)
        codes = round_latents(latents, gamma)
        packed = pack(codes)
        ctx.mark_non_differentiable(packed, gamma, codes)
        return grad_placeholder(latents), packed, gamma, codes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        return grad, None


def grad_placeholder(x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return zeros of a shape (by default that of x) that take no memory, for autograd to send a gradient to."""
    return x.new_zeros(1).expand(shape or x.shape)


def absmean_quantize(latents: Tensor, scale_group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize to ternary codes by the absmean (eq. 1–3 of arXiv 2402.17764).

    Args:
        latents: [E,O,I].
        scale_group_size: outputs that share a scale, the last group of a matrix may be smaller; None: all of a matrix.

    Returns:
        codes [E,O,I] of −1, 0, 1 in fp32 (or wider), and γ, the mean |w|: [E,1,1], or [E,O,1] with groups.
    """
    gamma = absmean_scales(latents, scale_group_size)
    return round_latents(latents, gamma).to(gamma.dtype), gamma


def absmean_scales(latents: Tensor, scale_group_size: int | None = None) -> Tensor:
    """Return γ [E,1,1] or [E,O,1] in fp32 or wider of latents [E,O,I].

    Sums are taken in fp64, so that the result is the same in every layout.
    """
    experts, outputs, inputs = latents.shape
    if scale_group_size is None:
        return mean_magnitude(sum_magnitudes(latents.view(experts, -1)), outputs * inputs, latents.dtype).view(-1, 1, 1)
    # A group larger than the matrix is the matrix; it must not be written out in its full size.
    scale_group_size = min(scale_group_size, outputs)
    sums = sum_magnitudes(latents.reshape(-1, inputs)).view(experts, outputs)
    grouped = [part.sum(1) for part in sums.split(scale_group_size, 1)]
    means = [
        mean_magnitude(total, min(scale_group_size, outputs - i * scale_group_size) * inputs, latents.dtype)
        for i, total in enumerate(grouped)
    ]
    return torch.stack(means, 1).repeat_interleave(scale_group_size, 1)[:, :outputs, None].contiguous()


def mean_magnitude(total: Tensor, count: int | Tensor, dtype: torch.dtype) -> Tensor:
    """Return γ of Σ|w| [R] fp64, in fp32 or, for fp64 latents, in fp64."""
    mean = total / count
    return mean.to(torch.promote_types(dtype, torch.float32)).clamp_(min=MIN_ABSMAX)


def sum_magnitudes(runs: Tensor) -> Tensor:
    """Return Σ|w| [R] fp64 of runs of latents [R,n]."""
    kernels = kernels_for(runs)
    if kernels is not None:
        return kernels.ternary.abs_sums(runs.detach().contiguous())
    return runs.detach().double().abs().sum(1)


def round_latents(latents: Tensor, gamma: Tensor) -> Tensor:
    """Round latents [..., n] to int8 codes, with a γ that broadcasts: one for each row or for each matrix."""
    latents, kernels = latents.detach().contiguous(), kernels_for(latents)
    if kernels is not None and gamma.numel() and latents.numel() % gamma.numel() == 0:
        return kernels.ternary.ternarize(latents.view(gamma.numel(), -1), gamma.contiguous()).view_as(latents)
    return (to_fp32(latents) / gamma).round_().clamp_(-1, 1).to(torch.int8)


def cast_codes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast int8 codes to `dtype`."""
    kernels = select_kernels(codes.device.type).kernels
    if kernels is not None and dtype in KERNEL_DTYPES:
        return kernels.ternary.cast(codes.contiguous(), dtype)
    return codes.to(dtype)


def latent_std(inputs: int, init_gain: float, quant: bool | QuantState) -> float:
    """Return the standard deviation of latents whose product with unit-variance input has that of `init_gain`.

    If matrices are to be ternary in the end, it is that of the ternary product.
    """
    ends_ternary = isinstance(quant, QuantState) or quant
    return init_gain / math.sqrt(inputs * (TERNARY_VARIANCE if ends_ternary else 1.0))
