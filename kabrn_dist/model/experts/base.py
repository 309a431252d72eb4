"""What all forms of experts share: stacked ternary matrices, drawn expert by expert.

Experts of a rank are stacked and run over rows sorted by expert: `forward(codes [N,D], scale [N,1], counts)`.

Shapes: N rows, D width, E experts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kabrn_dist.model.init import draw_experts
from kabrn_dist.ops.activation_quant import Quantized, normalize_quantize
from kabrn_dist.ops.weight_quant import QuantState, TernaryModule, latent_std


class Experts(TernaryModule, ABC):
    """Experts with stacked matrices: draws each by its global number, the last scaled for the residual stream.

    A form is a subclass `Form(width, hidden, settings, experts, quantised, gain)`. Parameters whose names are in
    `stds` are matrices; all others are coefficients of functions, which stay fp32 and carry no weight decay.

    Args:
        matrices: name → (outputs, inputs, gain).
        experts: global numbers of the experts here.
        quantised: False trains plain matrices; a model's modules share a `Blend`.
    """

    def __init__(
        self, matrices: dict[str, tuple[int, int, float]], experts: range, quantized: bool | QuantState
    ) -> None:
        super().__init__({name: latent_std(i, gain, quantized) for name, (_, i, gain) in matrices.items()}, quantized)
        self.expert_ids = experts
        for name, (outputs, inputs, _) in matrices.items():
            self.register_parameter(name, nn.Parameter(torch.empty(len(experts), outputs, inputs)))

    def initialize(self, seed: int, name: str) -> None:
        for matrix, std in self.stds.items():
            weight = self.get_parameter(matrix)
            drawn = draw_experts(seed, f"{name}.{matrix}", self.expert_ids, tuple(weight.shape[1:]), std)
            weight.data.copy_(drawn)

    def functions(self, points: Tensor, edges: int) -> dict[str, Tensor]:
        """Values of the learnable univariate functions, for pictures.

        Args:
            points: [P] inputs of a function, normalised as in training.
            edges: most functions of a layer, evenly chosen, where every edge has one; groups are all shown.

        Returns:
            "inner" and "outer" → [E,F,P] in fp32 or wider, F functions of each expert; empty for controls.
        """
        return {}

    def outside(self, codes: Tensor, scale: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
        """Of the inputs of `forward`: "inner" and "outer" → [E] fp32, the share of function inputs outside the range.

        0 for experts without rows; empty for forms without a range.
        """
        return {}

    def _requantize(self, x: Tensor) -> Quantized:
        return normalize_quantize(x, self.lam)

    @abstractmethod
    def forward(self, codes: Tensor, scale: Tensor, counts: Sequence[int], kept: Tensor | None = None) -> Tensor:
        """[N,D] codes, [N,1] scales and kept bytes (a `Quantised`), rows sorted by expert, `counts` of each → [N,D].

        Raises:
            ValueError: `counts` are not one for each expert here, or do not sum to N (see `check_counts`).
        """


def check_counts(rows: int, counts: Sequence[int], experts: int) -> None:
    """Raise ValueError, with the numbers, unless there is one count for each expert and they sum to the rows."""
    if len(counts) != experts:
        raise ValueError(f"{len(counts)} counts for {experts} experts; pass one count for each expert")
    if any(n < 0 for n in counts) or sum(counts) != rows:
        raise ValueError(f"counts {list(counts)} sum to {sum(counts)}, but there are {rows} rows, each of one expert")


def normal_mean(function: Callable[[Tensor], Tensor]) -> float:
    """The mean of f(z), z ~ N(0,1), by the trapezoid rule on [−12,12]; `function` maps [P] fp64 to [P].

    Exact to 1e-6 also for functions with corners. Layers' inputs are normalised, so this is their statistics.
    """
    z = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(function(z) * density, z))
