"""Numbers of parameters, counted on a model that takes no memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch

from kabrn_dist.config import Config, ModelConfig
from kabrn_dist.distributed.expert_placement import ExpertPlacement
from kabrn_dist.distributed.mesh import single_process_mesh
from kabrn_dist.inference.base import adapter_spec
from kabrn_dist.inference.working_copy import empty_full_model
from kabrn_dist.model.adapter import find_targets
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
    """Return the numbers of parameters, counted on the meta device without allocating memory.

    One layer of each kind is built, so that the time does not depend on their number.
    """
    moe_layers = set(config.moe_layers)
    kinds = Counter((mixer, layer in moe_layers) for layer, mixer in enumerate(config.layers))
    total = routed = ternary = outside = 0
    for (mixer, has_mixture), count in kinds.items():
        model = _build_layer(config, mixer, has_mixture)
        inside = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks."))
        outside = sum(p.numel() for p in model.parameters()) - inside
        total += count * inside
        routed += count * sum(p.numel() for p in model.select_parameters(lambda p: p.routed))
        ternary += count * sum(p.numel() for p in model.select_parameters(lambda p: p.ternary))
    total += outside
    layers = len(moe_layers)
    per_expert = routed // (config.experts.num_experts * layers) if layers else 0
    replicated = total - routed
    # The embedding is a look-up of one row.
    active = replicated - config.vocab_size * config.hidden_size + config.hidden_size
    active += per_expert * config.experts.top_k * layers
    return ParameterCounts(total, active, per_expert, replicated, ternary)


def count_adapter_parameters(config: Config) -> int:
    """Return the number of parameters that a fine-tuning trains beside its base, without allocating memory.

    Args:
        config: With a section `finetune` of another method than `full`.

    Raises:
        UserError: if its targets or its rank do not fit the model.
    """
    finetune, retention = config.finetune, config.model.retention
    assert finetune is not None
    model = empty_full_model(config)
    sizes = [model.get_parameter(name).shape for name in find_targets(model, adapter_spec(finetune))]
    if finetune.method == "state":
        return (
            config.model.layers.count("R")
            * retention.num_heads
            * finetune.rank
            * (retention.key_dim + retention.value_dim)
        )
    return sum(finetune.rank * prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in sizes)


def _build_layer(config: ModelConfig, mixer: str, has_mixture: bool) -> MixKABRN:
    """The model with a single layer of one kind, on the meta device."""
    experts = config.experts.model_copy(update={"moe_layer_interval": 1, "num_dense_layers": int(not has_mixture)})
    single = config.model_copy(update={"layers": mixer, "experts": experts})
    with torch.device("meta"):
        return MixKABRN(single, ExpertPlacement.single(experts.num_experts), single_process_mesh("meta"))
