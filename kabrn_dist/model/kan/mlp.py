"""The controls: experts without learnable functions, in everything else like the others.

Shapes: N rows, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.config import Experts as Settings
from kabrn_dist.model.bitlinear import Quantised, bit_product, rms_norm
from kabrn_dist.model.kan.stacked import StackedExperts, check_counts


class SwigluExperts(StackedExperts):
    """The control: y = W₃ q(swish(W₁ x) · W₂ x), a modern MLP (arXiv 2002.05202)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def __init__(
        self, width: int, hidden: int, settings: Settings, experts: range, quantised: bool = True, gain: float = 1.0
    ) -> None:
        matrices = {"gate": (hidden, width, 1.0), "up": (hidden, width, 1.0), "down": (width, hidden, gain)}
        super().__init__(matrices, experts, quantised)

    def forward(self, codes: Tensor, scale: Tensor, counts: Sequence[int]) -> Tensor:
        """[N,D] codes and [N,1] scales, rows sorted by expert → [N,D]."""
        check_counts(len(codes), counts, len(self.experts))
        x = Quantised(codes, scale)
        gate = bit_product(x, self.gate, counts, self.quantised)
        up = bit_product(x, self.up, counts, self.quantised)
        return bit_product(self._requantise(F.silu(gate) * up), self.down, counts, self.quantised)


class Relu2Experts(StackedExperts):
    """The control: y = W₂ q(relu(W₁ x)²), the matmuls of an MLP (Primer, arXiv 2109.08668)."""

    up: Tensor
    down: Tensor

    def __init__(
        self, width: int, hidden: int, settings: Settings, experts: range, quantised: bool = True, gain: float = 1.0
    ) -> None:
        super().__init__({"up": (hidden, width, 1.0), "down": (width, hidden, gain)}, experts, quantised)

    def forward(self, codes: Tensor, scale: Tensor, counts: Sequence[int]) -> Tensor:
        """[N,D] codes and [N,1] scales, rows sorted by expert → [N,D]."""
        check_counts(len(codes), counts, len(self.experts))
        up = bit_product(Quantised(codes, scale), self.up, counts, self.quantised)
        # Normalised before it is squared too, which changes no value and keeps squares within fp16.
        squares = F.relu(rms_norm(up)).square()
        return bit_product(self._requantise(squares), self.down, counts, self.quantised)
