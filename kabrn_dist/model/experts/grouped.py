"""Experts whose learned functions are shared by groups of channels: two matrices, a function layer before each.

Shapes:
    N: rows (routed tokens).
    D: hidden size of the model.
    E: experts of this rank.
    G: groups of channels.
    C: coefficients of a function.
    P: points where functions are evaluated.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kabrn_dist.kernels.univariate import UnivariateFunction
from kabrn_dist.model.bitlinear import bitlinear, bitlinear_unscaled
from kabrn_dist.model.experts.base import Experts, ExpertSpec, MatrixSpec, check_tokens_per_expert
from kabrn_dist.ops.activation import activate
from kabrn_dist.ops.activation_quant import Quantized

LAYERS = ("inner", "outer")


def per_row(coefficients: Tensor, tokens_per_expert: tuple[int, ...]) -> Tensor:
    """Repeat [E,G,C] to [N,G,C,1] (or [1,G,C,1], which broadcasts, if there is one expert)."""
    if len(tokens_per_expert) == 1:
        return coefficients.unsqueeze(-1)
    parts = [c.expand(n, *c.shape) for c, n in zip(coefficients, tokens_per_expert, strict=True)]
    return torch.cat(parts).unsqueeze(-1)


def sum_per_expert(rows: Tensor, tokens_per_expert: tuple[int, ...]) -> Tensor:
    """Sum each expert's rows: [N,...] → [E,...]."""
    return torch.stack([part.sum(0) for part in rows.split(list(tokens_per_expert))])


class GroupedExperts(Experts):
    """y = W₂ q(φ₂(W₁ q(φ₁(x)))), q = RMSNorm and int8; φ is one learned function per group and expert.

    Args:
        spec: of the layer.
        function: the form of φ, as the kernels compute it.

    Attributes:
        function: the same.
        range_ends: the range of inputs that φ is made for.
        up: [E,H,D], ternary, W₁.
        down: [E,D,H], ternary, W₂.
    """

    function_keys: ClassVar[tuple[str, ...]] = ("function_groups",)

    up: Tensor
    down: Tensor

    def __init__(self, spec: ExpertSpec, function: UnivariateFunction) -> None:
        super().__init__(spec)
        self.function, self.range_ends = function, self.function_range(spec.config)

    @classmethod
    def define_matrices(cls, spec: ExpertSpec) -> dict[str, MatrixSpec]:
        """Return W₁ and W₂."""
        return {
            "up": MatrixSpec(spec.expert_hidden_size, spec.hidden_size),
            "down": MatrixSpec(spec.hidden_size, spec.expert_hidden_size, spec.init_gain, reads_hidden=True),
        }

    @abstractmethod
    def coefficients(self, layer: str) -> Tensor:
        """Return the coefficients [E,G,C] of "inner" (φ₁) or "outer" (φ₂)."""

    @abstractmethod
    def apply_eager(self, x: Tensor, coefficients: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """Return φ(x) [N,D] of x [N,D] in torch's operations, for devices and dtypes without a kernel."""

    def forward(self, x: Quantized, tokens_per_expert: Sequence[int]) -> Tensor:
        """Apply both functions and matrices; see `Experts.forward`."""
        check_tokens_per_expert(len(x.codes), tokens_per_expert, len(self.expert_ids))
        x = self._activate("inner", x, tokens_per_expert)
        x = bitlinear_unscaled(x, self.matrices("up"), tokens_per_expert)
        x = self._activate("outer", x, tokens_per_expert)
        if self.lam < 1:  # all scales are 1
            return bitlinear_unscaled(x, self.matrices("down"), tokens_per_expert).codes
        return bitlinear(x, self.matrices("down"), tokens_per_expert)

    def _activate(self, layer: str, x: Quantized, tokens_per_expert: Sequence[int]) -> Quantized:
        return activate(x, self.function, self.apply_eager, self.coefficients(layer), tokens_per_expert, self.lam)

    @torch.no_grad()
    def functions(self, points: Tensor, edges: int) -> dict[str, Tensor]:
        """Evaluate the functions of all groups [E,G,P]; see `Experts.functions`."""
        values = {}
        for layer in LAYERS:
            coefficients = self.coefficients(layer)
            experts, groups, _ = coefficients.shape
            rows = points.repeat(experts)[:, None].expand(-1, groups)
            out = self.apply_eager(rows, coefficients, [len(points)] * experts)
            values[layer] = out.view(experts, len(points), groups).transpose(1, 2)
        return values

    @torch.no_grad()
    def outside(self, x: Quantized, tokens_per_expert: Sequence[int]) -> dict[str, Tensor]:
        """Measure the fraction of both function layers' inputs outside their range; see `Experts.outside`."""
        activated = self._activate("inner", x, tokens_per_expert)
        hidden = bitlinear_unscaled(activated, self.matrices("up"), tokens_per_expert)
        inputs = zip(LAYERS, (x, hidden), strict=True)
        return {layer: self._fraction_outside(part, tokens_per_expert) for layer, part in inputs}

    def _fraction_outside(self, x: Quantized, tokens_per_expert: Sequence[int]) -> Tensor:
        values, (low, high) = x.codes / x.scale, self.range_ends
        outside = ((values < low) | (values > high)).to(values.dtype).mean(1)
        rows = torch.tensor(tokens_per_expert, device=outside.device).clamp(min=1)
        return sum_per_expert(outside, tuple(tokens_per_expert)) / rows
