"""The networks of stacked experts in a model."""

from __future__ import annotations

from typing import NamedTuple

from kabrn_dist.model.experts.base import Experts
from kabrn_dist.model.mixkabrn import MixKABRN
from kabrn_dist.model.moe import MixtureOfExperts


class Network(NamedTuple):
    """The stacked experts of one layer.

    Attributes:
        layer: Index of the layer.
        kind: routed, shared or dense.
        experts: The experts.
    """

    layer: int
    kind: str
    experts: Experts


def list_networks(model: MixKABRN) -> list[Network]:
    """Return all stacked experts of a model, layer by layer."""
    networks = []
    for layer, block in enumerate(model.blocks):
        mixture = isinstance(block.mixture, MixtureOfExperts)
        for name in ("routed", "shared"):
            part = getattr(block.mixture, name, None)
            if isinstance(part, Experts):
                networks.append(Network(layer, name if mixture else "dense", part))
    return networks
