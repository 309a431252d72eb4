"""The interface of all types of experts: stacked ternary matrices, drawn expert by expert.

The experts of a rank are stacked and run over rows that are sorted by expert.

Shapes:
    N: rows (routed tokens).
    D: hidden size of the model.
    E: experts of this rank.
    F: functions of an expert.
    P: points where functions are evaluated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kabrn_dist.config import ExpertsConfig
from kabrn_dist.model.init import draw_experts
from kabrn_dist.ops.activation_quant import Quantized
from kabrn_dist.ops.weight_quant import QuantState, TernaryModule, latent_std


@dataclass(frozen=True)
class ExpertSpec:
    """Everything that the experts of one layer are built from.

    Attributes:
        hidden_size: D, of the model.
        expert_hidden_size: units of an expert's hidden layer.
        config: the `model.experts` section; types read their functions' settings from it.
        expert_ids: global numbers of the experts on this rank.
        quant: the `QuantState` that a model's modules share; True for ternary matrices, False for plain ones.
        init_gain: standard deviation of the output at the start, for inputs of unit variance.
    """

    hidden_size: int
    expert_hidden_size: int
    config: ExpertsConfig
    expert_ids: range
    quant: bool | QuantState = True
    init_gain: float = 1.0


class MatrixSpec(NamedTuple):
    """One matrix of an expert.

    Attributes:
        out_features: rows.
        in_features: columns.
        init_gain: standard deviation of its product at the start, for inputs of unit variance.
        reads_hidden: True if its columns belong to hidden units, which growing may redraw; else its rows do.
    """

    out_features: int
    in_features: int
    init_gain: float = 1.0
    reads_hidden: bool = False


class Experts(TernaryModule, ABC):
    """The experts of one layer on one rank. A new type of expert subclasses this; see experts/registry.py.

    Parameters named in `define_matrices` are matrices; all others are coefficients of functions, which stay fp32 and
    have no weight decay.

    Attributes:
        function_keys: keys of `model.experts` that define this type's learned functions; none for types without.
        spec: what the experts were built from.
        expert_ids: global numbers of the experts on this rank.
        matrix_specs: name → `MatrixSpec`.
    """

    function_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: ExpertSpec) -> None:
        matrices = self.define_matrices(spec)
        stds = {name: latent_std(m.in_features, m.init_gain, spec.quant) for name, m in matrices.items()}
        super().__init__(stds, spec.quant)
        self.spec, self.expert_ids, self.matrix_specs = spec, spec.expert_ids, matrices
        for name, matrix in matrices.items():
            shape = len(spec.expert_ids), matrix.out_features, matrix.in_features
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @classmethod
    @abstractmethod
    def define_matrices(cls, spec: ExpertSpec) -> dict[str, MatrixSpec]:
        """Return name → shape and initial gain of every matrix of an expert."""

    @classmethod
    def function_range(cls, config: ExpertsConfig) -> tuple[float, float]:
        """Return the range of inputs that the functions are made for: by default the ends of the grid."""
        return config.grid_range

    def initialize(self, seed: int, name: str) -> None:
        """Draw each expert's matrices from `seed`, the module's `name` and the expert's global number."""
        for matrix, std in self.stds.items():
            weight = self.get_parameter(matrix)
            drawn = draw_experts(seed, f"{name}.{matrix}", self.expert_ids, tuple(weight.shape[1:]), std)
            weight.data.copy_(drawn)

    @abstractmethod
    def forward(self, x: Quantized, tokens_per_expert: Sequence[int]) -> Tensor:
        """Apply each expert to its rows.

        Args:
            x: codes [N,D] and scale [N,1], rows sorted by expert.
            tokens_per_expert: rows of each expert on this rank.

        Returns:
            [N,D] in the dtype of the codes.

        Raises:
            ValueError: if `tokens_per_expert` does not fit; see `check_tokens_per_expert`.
        """

    def functions(self, points: Tensor, edges: int) -> dict[str, Tensor]:
        """Evaluate the learned univariate functions, for pictures.

        Args:
            points: [P] inputs of a function, normalized as in training.
            edges: largest number of functions of a layer, evenly chosen, for types with one on every edge; functions
                of groups are all evaluated.

        Returns:
            "inner" (before the hidden layer) and "outer" (after it) → [E,F,P] in fp32 or wider; empty for types
            without functions.
        """
        return {}

    def outside(self, x: Quantized, tokens_per_expert: Sequence[int]) -> dict[str, Tensor]:
        """Measure which fraction of the functions' inputs lies outside `function_range`. Arguments as `forward`.

        Returns:
            "inner" and "outer" → [E]; 0 for experts without rows; empty for types without a range.
        """
        return {}


def check_tokens_per_expert(rows: int, tokens_per_expert: Sequence[int], experts: int) -> None:
    """Check that there is one count for each expert and that they sum to the rows.

    Raises:
        ValueError: with the numbers, if not.
    """
    if len(tokens_per_expert) != experts:
        raise ValueError(f"{len(tokens_per_expert)} counts for {experts} experts; pass one count for each expert")
    if any(n < 0 for n in tokens_per_expert) or sum(tokens_per_expert) != rows:
        raise ValueError(
            f"counts {list(tokens_per_expert)} sum to {sum(tokens_per_expert)}, but there are {rows} rows, "
            "each of one expert"
        )


def normal_mean(function: Callable[[Tensor], Tensor]) -> float:
    """Return the mean of f(z), z ~ N(0,1), by the trapezoid rule on [−12,12].

    Exact to 1e-6, also for functions with corners. The layers' inputs are normalized, so this is their statistics.

    Args:
        function: maps [P] fp64 to [P].
    """
    # Models are also built on the meta device, where numbers have no values.
    with torch.device("cpu"):
        z = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        return float(torch.trapezoid(function(z) * density, z))
