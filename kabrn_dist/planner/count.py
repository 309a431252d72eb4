"""Numbers of parameters, counted on a model without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kabrn_dist.config import Model as Settings
from kabrn_dist.distributed.expert_placement import Placement
from kabrn_dist.distributed.mesh import alone
from kabrn_dist.model.mixkabrn import MixKABRN


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        total: of the whole model; active: that one token passes through; expert: of one routed expert of one layer;
        dense: that every rank holds; ternary: that are ternary in the forward pass.
    """

    total: int
    active: int
    expert: int
    dense: int
    ternary: int


def count_parameters(settings: Settings) -> Parameters:
    """Count on the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = MixKABRN(settings, Placement((settings.experts.routed,), 0), alone("meta"))
    layers = len(settings.mixture_layers)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for p in model.routed_parameters())
    expert = routed // (settings.experts.routed * layers) if layers else 0
    dense = total - routed
    # The embedding is a look-up of one row.
    active = dense - settings.vocabulary * settings.width + settings.width
    active += expert * settings.experts.top_k * layers
    ternary = sum(w.numel() for _, w in model.bit_weights()) if settings.quantise else 0
    return Parameters(total, active, expert, dense, ternary)
