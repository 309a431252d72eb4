"""Numbers of parameters, counted on a model that takes no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kabrn_dist.config import ModelConfig
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.model.mixkabrn import MixKABRN


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
        total: Parameters of the whole model.
        active: Parameters that one token passes through.
        per_expert: Parameters of one routed expert of one layer.
        replicated: Parameters outside the routed experts, which every rank holds.
        ternary: Parameters that are ternary in the forward pass.
    """

    total: int
    active: int
    per_expert: int
    replicated: int
    ternary: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Return the numbers of parameters, counted on the meta device without allocating memory."""
    with torch.device("meta"):
        model = MixKABRN(config, ExpertPlacement.single(config.experts.num_experts), single_process_mesh("meta"))
    layers = len(config.moe_layers)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for p in model.select_parameters(lambda p: p.routed))
    per_expert = routed // (config.experts.num_experts * layers) if layers else 0
    replicated = total - routed
    # The embedding is a look-up of one row.
    active = replicated - config.vocab_size * config.hidden_size + config.hidden_size
    active += per_expert * config.experts.top_k * layers
    ternary = sum(p.numel() for p in model.select_parameters(lambda p: p.ternary))
    return ParameterCounts(total, active, per_expert, replicated, ternary)
