"""Experts whose learned functions are shared by groups of channels: two matrices, a function layer before each.

Shapes: N rows, D width, E experts, G groups of channels, C coefficients of a function.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from kabrn_dist.kernels.univariate import UnivariateFunction
from kabrn_dist.model.bitlinear import bitlinear, bitlinear_unscaled
from kabrn_dist.model.experts.base import Experts, check_counts
from kabrn_dist.ops.activation import activate
from kabrn_dist.ops.activation_quant import Quantized
from kabrn_dist.ops.weight_quant import QuantState

LAYERS = ("inner", "outer")


def per_row(coefficients: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[E,G,C] → [N,G,C,1] (or [1,G,C,1], which broadcasts, where there is one expert)."""
    if len(counts) == 1:
        return coefficients.unsqueeze(-1)
    parts = [c.expand(n, *c.shape) for c, n in zip(coefficients, counts, strict=True)]
    return torch.cat(parts).unsqueeze(-1)


def per_expert(rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[N,...] → [E,...], sums over each expert's rows."""
    return torch.stack([part.sum(0) for part in rows.split(list(counts))])


class GroupedExperts(Experts):
    """y = W₂ q(φ₂(W₁ q(φ₁(x)))), q = RMSNorm and int8; φ one function per group and expert.

    Args:
        function: the form of φ.
        ends: the range of inputs that φ was made for.
    """

    up: Tensor
    down: Tensor

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: range,
        quantized: bool | QuantState,
        gain: float,
        function: UnivariateFunction,
        ends: tuple[float, float],
    ) -> None:
        super().__init__({"up": (hidden, width, 1.0), "down": (width, hidden, gain)}, experts, quantized)
        self.function, self.ends = function, ends

    @abstractmethod
    def coefficients(self, layer: str) -> Tensor:
        """[E,G,C] of "inner" (φ₁) or "outer" (φ₂)."""

    @abstractmethod
    def eager(self, x: Tensor, coefficients: Tensor, counts: Sequence[int]) -> Tensor:
        """[N,D] → φ(x) [N,D] in torch's operations."""

    def forward(self, codes: Tensor, scale: Tensor, counts: Sequence[int], kept: Tensor | None = None) -> Tensor:
        """[N,D] codes and [N,1] scales, rows sorted by expert → [N,D]. Raises ValueError: see `check_counts`."""
        check_counts(len(codes), counts, len(self.expert_ids))
        x = self._activate("inner", Quantized(codes, scale), counts)
        x = bitlinear_unscaled(x, self.matrices("up"), counts)
        x = self._activate("outer", x, counts)
        if self.lam < 1:  # all scales are 1
            return bitlinear_unscaled(x, self.matrices("down"), counts).codes
        return bitlinear(x, self.matrices("down"), counts)

    def _activate(self, layer: str, x: Quantized, counts: Sequence[int]) -> Quantized:
        return activate(x, self.function, self.eager, self.coefficients(layer), counts, self.lam)

    @torch.no_grad()
    def functions(self, points: Tensor, edges: int) -> dict[str, Tensor]:
        """Values of the learned functions at points [P]: "inner" and "outer" [E,G,P]. Groups, not edges, have them."""
        found = {}
        for layer in LAYERS:
            coefficients = self.coefficients(layer)
            experts, groups, _ = coefficients.shape
            rows = points.repeat(experts)[:, None].expand(-1, groups)
            values = self.eager(rows, coefficients, [len(points)] * experts)
            found[layer] = values.view(experts, len(points), groups).transpose(1, 2)
        return found

    @torch.no_grad()
    def outside(self, codes: Tensor, scale: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
        """Share of each function layer's inputs beyond the range: "inner" and "outer" [E], 0 without rows."""
        inner = Quantized(codes, scale)
        outer = bitlinear_unscaled(self._activate("inner", inner, counts), self.matrices("up"), counts)
        return {layer: self._beyond(x, counts) for layer, x in zip(LAYERS, (inner, outer), strict=True)}

    def _beyond(self, x: Quantized, counts: Sequence[int]) -> Tensor:
        values = x.codes / x.scale
        beyond = ((values < self.ends[0]) | (values > self.ends[1])).to(values.dtype).mean(1)
        rows = torch.tensor(counts, device=beyond.device).clamp(min=1)
        return per_expert(beyond, tuple(counts)) / rows
