"""The control types: experts without learned functions, in everything else like the others.

Shapes:
    N: rows (routed tokens).
    D: hidden size of the model.
    H: hidden units of an expert.
    E: experts of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from kabrn_dist.kernels.univariate import UnivariateFunction
from kabrn_dist.model.bitlinear import bitlinear, bitlinear_unscaled
from kabrn_dist.model.experts.base import Experts, ExpertSpec, MatrixSpec, check_tokens_per_expert
from kabrn_dist.ops.activation import activate
from kabrn_dist.ops.activation_quant import Quantized, rms_norm
from kabrn_dist.ops.gate import gated

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
