"""Weights of a trained model for its model file: plain values, and the ternary codes that the trainer computes with."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kabrn_dist.inference.checkpoint_weights import distinct_scales
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.ops.weight_quant import TernaryMatrices, TernaryModule


class WeightSource(Protocol):
    """Where the weights of a full model come from, by the names of its parameters: `ModelWeights`, `CheckpointWeights`.

    Attributes:
        lam: How far its matrices are quantized: 1 wholly, 0 not at all.
    """

    lam: float

    def values(self, name: str) -> Tensor:
        """Return a parameter, or a state of the routers, in fp32."""

    def matrices(self, name: str) -> TernaryMatrices:
        """Return a parameter of a ternary module as the trainer computes with it."""


class ModelWeights:
    """The weights of a full model in this process; see `WeightSource`."""

    def __init__(self, model: MixKABRN) -> None:
        self.lam = model.quant.lam if model.config.quantize else 0.0
        self._model = model
        self._named = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._named |= model.routers.named()

    def values(self, name: str) -> Tensor:
        """Return a parameter in fp32."""
        return self._named[name].float().cpu()

    @torch.no_grad()
    def matrices(self, name: str) -> TernaryMatrices:
        """Return the codes and scales of a ternary parameter."""
        prefix, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(prefix)
        assert isinstance(module, TernaryModule)
        return module.matrices(leaf)


class QuantizedStack:
    """Ternary matrices of one parameter, ready to be written.

    Args:
        matrices: Of a model that is wholly quantized.
        group: Outputs that share a scale; None for all of a matrix.

    Attributes:
        codes: int8 [E,O,I].
        scales: fp32 [E,S], each of a matrix's scales once.
    """

    def __init__(self, matrices: TernaryMatrices, group: int | None) -> None:
        self.codes: NDArray[np.int8] = matrices.codes(torch.int8).cpu().numpy()
        self.scales: NDArray[np.float32] = distinct_scales(matrices.gamma, group).cpu().numpy()
