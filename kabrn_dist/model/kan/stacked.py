"""What all forms of experts share: stacked ternary matrices, drawn expert by expert.

Experts of a rank are stacked and run over rows sorted by expert: `forward(codes [N,D], scale [N,1], counts)`.

Shapes: N rows, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kabrn_dist.model.bitlinear import Quantised, latent_std, quantise, rms_norm
from kabrn_dist.model.initial import draw_experts


class StackedExperts(nn.Module):
    """Experts with stacked matrices: draws each by its global number, the last scaled for the residual stream.

    A form is a subclass `Form(width, hidden, settings, experts, quantised, gain)`. Parameters whose names are in
    `stds` are matrices; all others are coefficients of functions, which stay fp32 and carry no weight decay.

    Args:
        matrices: name → (outputs, inputs, gain).
        experts: global numbers of the experts here.
        quantised: False trains plain matrices.
    """

    def __init__(self, matrices: dict[str, tuple[int, int, float]], experts: range, quantised: bool) -> None:
        super().__init__()
        self.experts, self.quantised = experts, quantised
        self.stds = {name: latent_std(i, gain, quantised) for name, (_, i, gain) in matrices.items()}
        for name, (outputs, inputs, _) in matrices.items():
            self.register_parameter(name, nn.Parameter(torch.empty(len(experts), outputs, inputs)))

    def initialise(self, seed: int, name: str) -> None:
        for matrix, std in self.stds.items():
            weight = self.get_parameter(matrix)
            drawn = draw_experts(seed, f"{name}.{matrix}", self.experts, tuple(weight.shape[1:]), std)
            weight.data.copy_(drawn)

    def _requantise(self, x: Tensor) -> Quantised:
        return quantise(rms_norm(x), self.quantised)

    def forward(self, codes: Tensor, scale: Tensor, counts: Sequence[int]) -> Tensor:
        """[N,D] codes and [N,1] scales (a `Quantised`), rows sorted by expert, `counts` of each → [N,D]."""
        raise NotImplementedError
