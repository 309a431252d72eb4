"""The controls: experts without learnable functions, in everything else like the others.

Shapes: N rows, D width, H hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.kernels.gate import GateKernel
from kabrn_dist.kernels.selection import kernels_for
from kabrn_dist.kernels.univariate import UnivariateFunction
from kabrn_dist.model.bitlinear import bitlinear, bitlinear_unscaled
from kabrn_dist.model.experts.base import Experts, check_counts
from kabrn_dist.ops.activation import activate
from kabrn_dist.ops.activation_quant import Quantized, interpolate_quantized, quantize, rms_norm, to_fp32
from kabrn_dist.ops.weight_quant import QuantState

RELU2 = UnivariateFunction("relu2")


class _Controls(Experts):
    def _multiply_down(self, x: Quantized, counts: Sequence[int]) -> Tensor:
        down = self.matrices("down")
        if self.lam < 1:  # all scales are 1
            return bitlinear_unscaled(x, down, counts).codes
        return bitlinear(x, down, counts)


class SwigluExperts(_Controls):
    """The control: y = W₃ q(swish(W₁ x) · W₂ x), a modern MLP (arXiv 2002.05202)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def __init__(
        self,
        width: int,
        hidden: int,
        settings: ExpertsConfig,
        experts: range,
        quantized: bool | QuantState = True,
        gain: float = 1.0,
    ) -> None:
        matrices = {"gate": (hidden, width, 1.0), "up": (hidden, width, 1.0), "down": (width, hidden, gain)}
        super().__init__(matrices, experts, quantized)

    def forward(self, codes: Tensor, scale: Tensor, counts: Sequence[int], kept: Tensor | None = None) -> Tensor:
        """[N,D] codes and [N,1] scales, rows sorted by expert → [N,D]."""
        check_counts(len(codes), counts, len(self.expert_ids))
        x = Quantized(codes, scale, kept)
        gate, up = (bitlinear_unscaled(x, self.matrices(name), counts) for name in ("gate", "up"))
        return self._multiply_down(gated(gate, up, self.lam), counts)


class Relu2Experts(_Controls):
    """The control: y = W₂ q(relu(W₁ x)²), the matmuls of an MLP (Primer, arXiv 2109.08668)."""

    up: Tensor
    down: Tensor

    def __init__(
        self,
        width: int,
        hidden: int,
        settings: ExpertsConfig,
        experts: range,
        quantized: bool | QuantState = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__({"up": (hidden, width, 1.0), "down": (width, hidden, gain)}, experts, quantized)

    def forward(self, codes: Tensor, scale: Tensor, counts: Sequence[int], kept: Tensor | None = None) -> Tensor:
        """[N,D] codes and [N,1] scales, rows sorted by expert → [N,D]."""
        check_counts(len(codes), counts, len(self.expert_ids))
        up = bitlinear_unscaled(Quantized(codes, scale, kept), self.matrices("up"), counts)
        nothing = up.scale.new_empty(1, 1, 0)
        squares = activate(up, RELU2, square, nothing, (len(codes),), self.lam)
        return self._multiply_down(squares, counts)


def square(x: Tensor, coefficients: Tensor, counts: Sequence[int]) -> Tensor:
    """relu(RMSNorm(x))² of rows; coefficients and counts as others take them, unused.

    Normalised before it is squared too, which changes no result after the next norm and keeps squares within fp16.
    """
    return F.relu(rms_norm(x)).square()


def gated(gate: Quantized, up: Quantized, share: float) -> Quantized:
    """q(RMSNorm(silu(gate) · up)), what the last product reads. Keeps gate and up alone for backward.

    Args:
        gate, up: codes [N,H] and scale [N,1], products that are not yet scaled.
        share: how far the quantiser goes; 0 (or False) leaves it out.
    """
    kernels = kernels_for(gate.codes)
    if kernels is not None:
        fused = _Fused.apply(*gate[:2], *up[:2], share == 1, kernels.gate)
        return interpolate_quantized(Quantized(*fused), share) if 0 < share < 1 else Quantized(*fused)
    return Quantized(*_Eager.apply(*gate[:2], *up[:2], share))


def gated_eager(gate: Quantized, up: Quantized, share: float) -> Quantized:
    """`gated` step by step, in fp32 (or wider): products of two of fp16's values pass its range."""
    values, factors = to_fp32(up.codes) / up.scale, F.silu(to_fp32(gate.codes) / gate.scale)
    found = quantize(rms_norm(factors * values), share)
    return found._replace(codes=found.codes.to(gate.codes.dtype))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, gate_scale: Tensor, up: Tensor, up_scale: Tensor, quantized: bool, kernel: GateKernel
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = gate.contiguous(), gate_scale.reciprocal(), up.contiguous(), up_scale.reciprocal()
        codes, scale, rms, kept = kernel.forward(*inputs, quantized)
        ctx.save_for_backward(*inputs, scale, rms)
        ctx.kernel = kernel
        ctx.mark_non_differentiable(scale, *(() if kept is None else (kept,)))
        return codes, scale, kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gate, gate_factor, up, up_factor, scale, rms = ctx.saved_tensors
        grads = ctx.kernel.backward(gate, gate_factor, up, up_factor, grad.contiguous(), scale, rms)
        return grads[0], None, grads[1], None, None, None


class _Eager(torch.autograd.Function):
    """Runs again in backward what autograd would keep a handful of fp32 tensors for."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, gate_scale: Tensor, up: Tensor, up_scale: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(gate, gate_scale, up, up_scale)
        ctx.share = share
        codes, scale, kept = gated_eager(Quantized(gate, gate_scale), Quantized(up, up_scale), share)
        ctx.mark_non_differentiable(scale, *(() if kept is None else (kept,)))
        return codes, scale, kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gate, gate_scale, up, up_scale = ctx.saved_tensors
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            again = gated_eager(Quantized(gate, gate_scale), Quantized(up, up_scale), ctx.share)
        for_gate, for_up = torch.autograd.grad(again.codes, (gate, up), grad)
        return for_gate, None, for_up, None, None
