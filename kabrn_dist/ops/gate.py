"""A gate by SiLU, normalized and quantized: q(RMSNorm(silu(gate) · up)), fused if there is a kernel.

Shapes:
    N: rows.
    H: channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kabrn_dist.kernels.gate import GateKernel
from kabrn_dist.kernels.selection import kernels_for
from kabrn_dist.ops.activation_quant import Quantized, interpolate_quantized, quantize, rms_norm, to_fp32


def gated(gate: Quantized, up: Quantized, lam: float) -> Quantized:
    """Return q(RMSNorm(silu(gate) · up)), the input of the last product. Backward keeps only gate and up.

    Args:
        gate: codes [N,H] and scale [N,1] of a product that is not yet scaled.
        up: the same.
        lam: how far values are quantized, see `QuantState`; 0 (or False) leaves the quantizer out.
    """
    kernels = kernels_for(gate.codes)
    if kernels is not None:
        fused = _Fused.apply(*gate[:2], *up[:2], lam == 1, kernels.gate)
        return interpolate_quantized(Quantized(*fused), lam) if 0 < lam < 1 else Quantized(*fused)
    return Quantized(*_Eager.apply(*gate[:2], *up[:2], lam))


def gated_eager(gate: Quantized, up: Quantized, lam: float) -> Quantized:
    """Compute `gated` step by step, in fp32 or wider: products of two fp16 values leave the range of fp16."""
    values, factors = to_fp32(up.codes) / up.scale, F.silu(to_fp32(gate.codes) / gate.scale)
    out = quantize(rms_norm(factors * values), lam)
    return out._replace(codes=out.codes.to(gate.codes.dtype))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, gate_scale: Tensor, up: Tensor, up_scale: Tensor, quantized: bool, kernel: GateKernel
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = gate.contiguous(), gate_scale.reciprocal(), up.contiguous(), up_scale.reciprocal()
        codes, scale, rms, int8_codes = kernel.forward(*inputs, quantized)
        ctx.save_for_backward(*inputs, scale, rms)
        ctx.kernel = kernel
        ctx.mark_non_differentiable(scale, *(() if int8_codes is None else (int8_codes,)))
        return codes, scale, int8_codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gate, gate_factor, up, up_factor, scale, rms = ctx.saved_tensors
        grads = ctx.kernel.backward(gate, gate_factor, up, up_factor, grad.contiguous(), scale, rms)
        return grads[0], None, grads[1], None, None, None


class _Eager(torch.autograd.Function):
    """Recomputes in backward, where autograd would keep a handful of fp32 tensors."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, gate_scale: Tensor, up: Tensor, up_scale: Tensor, lam: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(gate, gate_scale, up, up_scale)
        ctx.lam = lam
        codes, scale, int8_codes = gated_eager(Quantized(gate, gate_scale), Quantized(up, up_scale), lam)
        ctx.mark_non_differentiable(scale, *(() if int8_codes is None else (int8_codes,)))
        return codes, scale, int8_codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gate, gate_scale, up, up_scale = ctx.saved_tensors
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            out = gated_eager(Quantized(gate, gate_scale), Quantized(up, up_scale), ctx.lam)
        grad_gate, grad_up = torch.autograd.grad(out.codes, (gate, up), grad)
        return grad_gate, None, grad_up, None, None
