"""The control types: experts without learned functions, in everything else like the others.

Shapes:
    N: rows (routed tokens).
    D: hidden size of the model.
    H: hidden units of an expert.
    E: experts of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kabrn_dist.kernels.gate import GateKernel
from kabrn_dist.kernels.selection import kernels_for
from kabrn_dist.kernels.univariate import UnivariateFunction
from kabrn_dist.model.bitlinear import bitlinear, bitlinear_unscaled
from kabrn_dist.model.experts.base import Experts, ExpertSpec, MatrixSpec, check_tokens_per_expert
from kabrn_dist.ops.activation import activate
from kabrn_dist.ops.activation_quant import Quantized, interpolate_quantized, quantize, rms_norm, to_fp32

RELU2 = UnivariateFunction("relu2")


class _MlpExperts(Experts):
    def _multiply_down(self, x: Quantized, tokens_per_expert: Sequence[int]) -> Tensor:
        down = self.matrices("down")
        if self.lam < 1:  # all scales are 1
            return bitlinear_unscaled(x, down, tokens_per_expert).codes
        return bitlinear(x, down, tokens_per_expert)


class SwigluExperts(_MlpExperts):
    """y = W₃ q(swish(W₁ x) · W₂ x), q = RMSNorm and int8: a modern MLP (arXiv 2002.05202).

    Attributes:
        gate: [E,H,D], ternary, W₁.
        up: [E,H,D], ternary, W₂.
        down: [E,D,H], ternary, W₃.
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def define_matrices(cls, spec: ExpertSpec) -> dict[str, MatrixSpec]:
        """Return W₁, W₂ and W₃."""
        return {
            "gate": MatrixSpec(spec.expert_hidden_size, spec.hidden_size),
            "up": MatrixSpec(spec.expert_hidden_size, spec.hidden_size),
            "down": MatrixSpec(spec.hidden_size, spec.expert_hidden_size, spec.init_gain, reads_hidden=True),
        }

    def forward(self, x: Quantized, tokens_per_expert: Sequence[int]) -> Tensor:
        """Apply the gated MLP; see `Experts.forward`."""
        check_tokens_per_expert(len(x.codes), tokens_per_expert, len(self.expert_ids))
        gate, up = (bitlinear_unscaled(x, self.matrices(name), tokens_per_expert) for name in ("gate", "up"))
        return self._multiply_down(gated(gate, up, self.lam), tokens_per_expert)


class Relu2Experts(_MlpExperts):
    """y = W₂ q(relu(W₁ x)²), q = RMSNorm and int8: an MLP of two matrices (Primer, arXiv 2109.08668).

    Attributes:
        up: [E,H,D], ternary, W₁.
        down: [E,D,H], ternary, W₂.
    """

    up: Tensor
    down: Tensor

    @classmethod
    def define_matrices(cls, spec: ExpertSpec) -> dict[str, MatrixSpec]:
        """Return W₁ and W₂."""
        return {
            "up": MatrixSpec(spec.expert_hidden_size, spec.hidden_size),
            "down": MatrixSpec(spec.hidden_size, spec.expert_hidden_size, spec.init_gain, reads_hidden=True),
        }

    def forward(self, x: Quantized, tokens_per_expert: Sequence[int]) -> Tensor:
        """Apply the MLP; see `Experts.forward`."""
        check_tokens_per_expert(len(x.codes), tokens_per_expert, len(self.expert_ids))
        up = bitlinear_unscaled(x, self.matrices("up"), tokens_per_expert)
        no_coefficients = up.scale.new_empty(1, 1, 0)
        squares = activate(up, RELU2, square, no_coefficients, (len(up.codes),), self.lam)
        return self._multiply_down(squares, tokens_per_expert)


def square(x: Tensor, coefficients: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
    """Return relu(RMSNorm(x))² [N,H] of rows [N,H].

    Normalizing before squaring too changes no result after the next norm, and keeps squares within fp16's range.

    Args:
        x: [N,H].
        coefficients: not used; `activate` passes them to every function.
        tokens_per_expert: not used.
    """
    return F.relu(rms_norm(x)).square()


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
